"""Changes that gpu.py tries and that need code in the rank; what proves itself moves into nemo_tutorial."""

from lightning.pytorch.callbacks import Callback


class FuseLoRA(Callback):
    """Have NeMo wrap linear layers in its TEFusedLoRALinear.

    Set after the model is built: from the start, it would also fuse the MLP, in which no layer can then be wrapped.
    """

    def on_fit_start(self, trainer, pl_module):
        pl_module.config.use_transformer_engine_op_fuser = True


def fold_norm():
    """Have LoRA's layers that norm their input do so by PyTorch's kernel: the gradient of what it gives is one sum."""
    import torch.nn.functional as F

    from nemo_tutorial import lora

    plain = lora.forward

    def forward(self, x, *args, **kwargs):
        base = self.to_wrap
        if not hasattr(base, "layer_norm_weight") or base.weight.requires_grad or base.config.fp8:
            return plain(self, x, *args, **kwargs)
        normed = F.rms_norm(x, x.shape[-1:], base.layer_norm_weight, base.config.layernorm_epsilon)
        a, b, scale = lora.low_rank(self)
        out, low = lora.FrozenAndDown.apply(normed, base.weight, a)
        return lora.Up.apply(out, low, b, scale), None

    lora.forward = forward

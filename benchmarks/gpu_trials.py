"""Changes that gpu.py tries and that need code in the rank; what proves itself moves into nemo_tutorial."""

import types

import torch
from lightning.pytorch.callbacks import Callback


def enable_wgrad_fusion():
    """Let Transformer Engine's layers add their weight gradients to the fp32 sum in the product itself.

    They can without Apex, which Megatron asks for only because of its own layer, the output one: here that adds after
    its product, as it does without the fusion.
    """
    from megatron.core.tensor_parallel import layers

    def accumulate(total_input, grad_output, main_grad):
        main_grad.add_(grad_output.t().mm(total_input))

    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate
    )


class FuseLoRA(Callback):
    """Have NeMo wrap linear layers in its TEFusedLoRALinear.

    Set after the model is built: from the start, it would also fuse the MLP, in which no layer can then be wrapped.
    """

    def on_fit_start(self, trainer, pl_module):
        pl_module.config.use_transformer_engine_op_fuser = True


class LowRank(torch.autograd.Function):
    """out + scale * (x A^T) B^T, added to `out` where it lies by the second product."""

    @staticmethod
    def forward(ctx, out, x, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])
        low = rows.mm(a.t())
        ctx.save_for_backward(rows, low, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        flat = out.detach().view(-1, out.shape[-1])
        torch.addmm(flat, low, b.t(), alpha=scale, out=flat)
        return flat.view(out.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, low, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_low = flat.mm(b).mul_(ctx.scale)
        grad_b = flat.t().mm(low).mul_(ctx.scale)
        grad_x = grad_low.mm(a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_low.t().mm(rows), grad_b, None


def patch_lora():
    """LoRALinear by LowRank where that computes the same: no dropout, no tensor parallelism, no expert."""
    from megatron.core import parallel_state
    from nemo.collections.llm.peft import lora

    stock = lora.LoRALinear.forward

    def forward(self, x, *args, **kwargs):
        adapter = self.adapter
        if (
            adapter.dropout is not None
            or adapter.is_expert
            or parallel_state.get_tensor_model_parallel_world_size() > 1
        ):
            return stock(self, x, *args, **kwargs)
        out, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        scale = adapter.alpha / adapter.dim
        return LowRank.apply(out, normed, adapter.linear_in.weight, adapter.linear_out.weight, scale), bias

    lora.LoRALinear.forward = forward

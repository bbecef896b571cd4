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


def join_products():
    """Have `linear_qkv` and `linear_fc1` make LoRA's narrow product with their own, as 16 more rows of their weight.

    The gradient of their input is one product then, too. Their norms are PyTorch's, outside of them.
    """
    import torch
    import torch.nn.functional as F

    from nemo_tutorial import lora, lora_kernels, rope

    class Joined(torch.autograd.Function):
        """x (..., k), joined (n + rank, k): the frozen weight and A; returns (t, n + rank)."""

        @staticmethod
        def forward(ctx, x, joined, a):
            rows = x.reshape(-1, x.shape[-1])
            ctx.save_for_backward(rows, joined, a)
            ctx.shape = x.shape
            return rows.mm(joined.t())

        @staticmethod
        def backward(ctx, grad):
            rows, joined, a = ctx.saved_tensors
            return grad.mm(joined).view(ctx.shape), None, lora.gradient(a, grad[:, -len(a) :], rows)

    class SwiGLU(torch.autograd.Function):
        """lora_kernels.SwiGLU of y and low in one tensor (t, 2 k + rank)."""

        @staticmethod
        def forward(ctx, both, b, scale, a):
            ctx.scale = scale
            y, low = both[:, : len(b)], both[:, len(b) :]
            h = both.new_empty(len(y), len(b) // 2)
            down = lora_kernels.launch(lora_kernels.swiglu_kernel, y, low, b, a, (h,), scale, len(a))
            ctx.save_for_backward(both, b, a, h)
            return h, down

        @staticmethod
        def backward(ctx, grad_h, grad_down):
            both, b, a, h = ctx.saved_tensors
            grad = torch.empty_like(both)
            (y, low), (grad_y, grad_low) = ((t[:, : len(b)], t[:, len(b) :]) for t in (both, grad))
            tensors = grad_h.contiguous(), grad_down.contiguous(), grad_y
            kernel = lora_kernels.swiglu_gradient_kernel
            grad_low.copy_(lora_kernels.launch(kernel, y, low, b, a, tensors, ctx.scale, len(b[0])))
            return grad, lora.gradient(b, grad_y, low, ctx.scale), None, lora.gradient(a, grad_down, h)

    class AddSplitAndTurn(torch.autograd.Function):
        """rope.SplitAndTurn of mixed and low in one tensor (t, n + rank), after low's part is added."""

        @staticmethod
        def forward(ctx, both, b, scale, cos, sin, sizes):
            both, n = both.detach(), len(b)
            mixed, low = both[:, :n], both[:, n:].contiguous()
            torch.addmm(mixed, low, b.t(), alpha=scale, out=mixed)
            found = [both.new_empty(*sizes[:2], heads, sizes[4]) for heads in (sizes[2], sizes[3], sizes[3])]
            rope.launch(mixed, *found, cos, sin, back=False)
            ctx.save_for_backward(low, b, cos, sin)
            ctx.scale = scale
            return tuple(found)

        @staticmethod
        def backward(ctx, *grads):
            low, b, cos, sin = ctx.saved_tensors
            n = len(b)
            grad = low.new_empty(len(low), n + low.shape[1])
            mixed = grad[:, :n]
            rope.launch(mixed, *(part.contiguous() for part in grads), cos, sin, back=True)
            grad_low, grad_b = lora.up_gradients(mixed, low, b, ctx.scale)
            grad[:, n:] = grad_low
            return grad, grad_b, None, None, None, None

    def product(layer, x):
        base, (a, b, scale) = layer.to_wrap, lora.low_rank(layer)
        if not hasattr(layer, "joined"):
            layer.__dict__["joined"] = torch.cat((base.weight.detach(), a.detach()))
            base.weight.data = layer.joined[: len(base.weight)]
        layer.joined.data[-len(a) :] = a.detach()
        if hasattr(base, "layer_norm_weight"):
            x = F.rms_norm(x, x.shape[-1:], base.layer_norm_weight, base.config.layernorm_epsilon)
        return Joined.apply(x, layer.joined, a), b, scale

    def mlp(self, hidden_states, *args, **kwargs):
        fc2 = self.linear_fc2
        a2, b2, scale2 = lora.low_rank(fc2)
        h, low = SwiGLU.apply(*product(self.linear_fc1, hidden_states), a2)
        out = F.linear(h, fc2.to_wrap.weight).view(hidden_states.shape)
        return out, lora_kernels.NotAdded(low, b2, scale2)

    def split_and_turned(self, hidden_states, key_value_states=None, split_qkv=True):
        s, b, _ = hidden_states.shape
        heads, groups = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        sizes = s, b, heads, groups, self.hidden_size_per_attention_head
        both = product(self.linear_qkv, hidden_states)
        return AddSplitAndTurn.apply(*both, *rope.angles(*self.__dict__.pop("positions"), s), sizes)

    lora_kernels.mlp, rope.split_and_turned = mlp, split_and_turned

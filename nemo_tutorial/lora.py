"""NeMo's LoRA layer with what the adapter adds, to the output and to the gradient, added inside its own products.

NeMo's own (nemo/collections/llm/peft/lora.py) writes the adapter's output, then reads it and the layer's to add them.
benchmarks/README.md has what that costs.
"""

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state
from nemo.collections.llm.peft import lora


class LowRank(torch.autograd.Function):
    """out + scale * (x A^T) B^T, written into `out`, which nothing else may have kept for its backward pass.

    out (..., n), x (..., k), a (rank, k), b (n, rank); returns a tensor of out's shape, in its memory.
    """

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
        grad_low, grad_a, grad_b = _gradients(flat, rows, low, b, ctx.scale)
        grad_x = grad_low.mm(a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grad, grad_x, grad_a, grad_b, None


class FrozenLowRank(torch.autograd.Function):
    """x W^T + scale * (x A^T) B^T, where W gets no gradient: so that of x is one sum as well.

    x (..., k), w (n, k), a (rank, k), b (n, rank); returns (..., n).
    """

    @staticmethod
    def forward(ctx, x, w, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])
        low = rows.mm(a.t())
        ctx.save_for_backward(rows, low, w, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return rows.mm(w.t()).addmm_(low, b.t(), alpha=scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        rows, low, w, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_low, grad_a, grad_b = _gradients(flat, rows, low, b, ctx.scale)
        grad_x = flat.mm(w).addmm_(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_a, grad_b, None


def _gradients(grad, rows, low, b, scale):
    """Of `low` (..., rank), A and B, from that of the output."""
    grad_low = grad.mm(b).mul_(scale)
    return grad_low, grad_low.t().mm(rows), grad.t().mm(low).mul_(scale)


STOCK = lora.LoRALinear.forward


def forward(self, x, *args, **kwargs):
    """LoRALinear's, by the products above where they compute the same: no dropout, no expert, no tensor parallelism."""
    adapter, base = self.adapter, self.to_wrap
    if (
        adapter.dropout is not None
        or adapter.is_expert
        or not isinstance(adapter.activation, torch.nn.Identity)
        or parallel_state.get_tensor_model_parallel_world_size() > 1
    ):
        return STOCK(self, x, *args, **kwargs)
    low_rank = adapter.linear_in.weight, adapter.linear_out.weight, adapter.alpha / adapter.dim
    if _is_one_product(base) and base.weight.dtype == x.dtype:
        return FrozenLowRank.apply(x, base.weight, *low_rank), None
    out, bias, normed = self.base_linear_forward(x, *args, **kwargs)
    return LowRank.apply(out, normed, *low_rank), bias


def _is_one_product(base):
    """Whether a layer is x W^T and no more: its weight frozen, no bias, no norm of its input inside it, no FP8."""
    plain = getattr(base, "bias", None) is None or not base.bias.numel()  # Transformer Engine's stands there empty
    normed = hasattr(base, "layer_norm_weight")
    return plain and not normed and not base.weight.requires_grad and not base.config.fp8


class AddedInProduct(Callback):
    """Have all LoRA layers of the process compute that way."""

    def setup(self, trainer, pl_module, stage):
        lora.LoRALinear.forward = forward

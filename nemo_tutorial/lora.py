"""NeMo's LoRA layer with what the adapter adds, to the output and to the gradients, added inside its own products.

NeMo's own (nemo/collections/llm/peft/lora.py) writes the adapter's output, then reads it and the layer's to add them.
benchmarks/README.md has what that costs. t is a sample's tokens times the samples.
"""

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state
from megatron.core.fusions import fused_bias_dropout
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import mlp
from nemo.collections.llm.peft import lora

from nemo_tutorial import kernels


class Down(torch.autograd.Function):
    """x A^T; x (..., k), a (rank, k), returns (t, rank)."""

    @staticmethod
    def forward(ctx, x, a):
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, a)
        ctx.shape = x.shape
        return rows.mm(a.t())

    @staticmethod
    def backward(ctx, grad):
        rows, a = ctx.saved_tensors
        grad_x = grad.mm(a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, gradient(a, grad, rows)


class FrozenAndDown(torch.autograd.Function):
    """x W^T, where W gets no gradient, and x A^T: so that the gradient of x is one sum.

    x (..., k), w (n, k), a (rank, k); returns (..., n) and (t, rank).
    """

    @staticmethod
    def forward(ctx, x, w, a):
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, w, a)
        ctx.shape = x.shape
        return rows.mm(w.t()).view(*x.shape[:-1], -1), rows.mm(a.t())

    @staticmethod
    def backward(ctx, grad, grad_low):
        rows, w, a = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = flat.mm(w).addmm_(grad_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, gradient(a, grad_low, rows)


class Up(torch.autograd.Function):
    """out + scale * low B^T, written into `out`, which nothing else may have kept for its backward pass.

    out (..., n), low (t, rank), b (n, rank); returns a tensor of out's shape, in its memory.
    """

    @staticmethod
    def forward(ctx, out, low, b, scale):
        ctx.save_for_backward(low, b)
        ctx.scale = scale
        flat = out.detach().view(-1, out.shape[-1])
        torch.addmm(flat, low, b.t(), alpha=scale, out=flat)
        return flat.view(out.shape)

    @staticmethod
    def backward(ctx, grad):
        low, b = ctx.saved_tensors
        return grad, *up_gradients(grad, low, b, ctx.scale), None


def up_gradients(grad, low, b, scale):
    """Those of `low` and B from that of scale * low B^T (..., n)."""
    flat = grad.reshape(-1, grad.shape[-1])
    grad_low = torch.addmm(flat.new_empty(()), flat, b, beta=0, alpha=scale)  # the product alone, multiplied inside
    return grad_low, gradient(b, flat, low, scale)


def gradient(weight, grad, x, scale=1.0):
    """scale * grad^T x, that of `weight` (n, k), from grad (t, n) and x (t, k).

    Where Megatron keeps a sum of the micro batches' gradients, it is added to that inside the product, and what is
    returned is what Megatron expects then: a tensor that nobody reads.
    """
    total = getattr(weight, "main_grad", None)
    if total is None:
        return grad.t().mm(x).mul_(scale)
    kernels.add_gradient(x, grad, total, scale)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


STOCK = lora.LoRALinear.forward


def forward(self, x, *args, **kwargs):
    """LoRALinear's, by the products above where they compute the same."""
    base = self.to_wrap
    if not is_plain(self.adapter):
        return STOCK(self, x, *args, **kwargs)
    a, b, scale = low_rank(self)
    if is_one_product(base) and base.weight.dtype == x.dtype:
        (out, low), bias = FrozenAndDown.apply(x, base.weight, a), None
    else:
        out, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        low = Down.apply(normed, a)
    return Up.apply(out, low, b, scale), bias


STOCK_BASE = getattr(lora.LoRALinear, "base_linear_forward", None)


def base_linear_forward(self, x, *args, **kwargs):
    """LoRALinear's; a layer's norm gives the adapter this GPU's part of the sequence, and the adapter gathers the rest.

    NeMo has Transformer Engine return what that has gathered for the layer. But what the adapters of linear_qkv and
    linear_fc1 then add to the gradient of their input, Transformer Engine since 2.4 (2.18 is the last looked at) drops
    without a word: `LayerNormLinear`'s backward pass reads grad_outputs[1] only of what is not gathered.
    """
    if getattr(self.to_wrap, "return_layernorm_output_gathered", False):
        self.to_wrap.return_layernorm_output_gathered = False
        self.adapter.disable_sequence_parallel_comm = False
    return STOCK_BASE(self, x, *args, **kwargs)


def split_forward(self, x, *args, **kwargs):
    """LoRALinear's, where the layer's input or output is split by sequence, and so is what the adapter reads or writes.

    By NeMo's way the input of linear_qkv's and linear_fc1's adapters, (s, b, h), is gathered and kept for the backward
    pass, and the output of linear_proj's and linear_fc2's is gathered of parts of h, to take a part of s of it. Here
    each GPU makes what its tokens need, and what goes between GPUs is `rank` wide.
    """
    if not (is_two_products(self.adapter) and is_split_by_sequence(self.to_wrap)):
        return STOCK(self, x, *args, **kwargs)
    out, bias, normed = self.base_linear_forward(x, *args, **kwargs)
    a, b, scale = low_rank(self)
    if self.adapter.input_is_parallel:
        # a (rank, k / tp), b (n / tp, rank), normed (s, b, k / tp), out (s / tp, b, n)
        low = mappings.reduce_scatter_to_sequence_parallel_region(Down.apply(normed, a))
        b = mappings.gather_from_sequence_parallel_region(b)
    else:
        # a (rank / tp, k), b (n / tp, rank), normed (s / tp, b, k), out (s, b, n / tp)
        low = Down.apply(normed, mappings.gather_from_sequence_parallel_region(a))
        low = mappings.gather_from_sequence_parallel_region(low)
    return Up.apply(out, low, b, scale), bias


def is_plain(adapter):
    """Whether an adapter is two products and no more, and all of them on this GPU."""
    return is_two_products(adapter) and parallel_state.get_tensor_model_parallel_world_size() == 1


def is_two_products(adapter):
    """Whether an adapter has no dropout, no activation, and is no expert's."""
    return adapter.dropout is None and not adapter.is_expert and isinstance(adapter.activation, torch.nn.Identity)


def is_split_by_sequence(base):
    """Whether a layer gathers its input, or scatters its output, along the sequence, between several GPUs."""
    return (
        parallel_state.get_tensor_model_parallel_world_size() > 1
        and getattr(base, "sequence_parallel", False)
        and getattr(base, "parallel_mode", "") is not None  # a shared expert's of Transformer Engine does not
        and not getattr(base, "explicit_expert_comm", False)
    )


def is_one_product(base):
    """Whether a layer is x W^T and no more: its weight frozen, no bias, no norm of its input inside it, no FP8."""
    plain = getattr(base, "bias", None) is None or not base.bias.numel()  # Transformer Engine's stands there empty
    normed = hasattr(base, "layer_norm_weight")
    return plain and not normed and not base.weight.requires_grad and not base.config.fp8


def low_rank(layer):
    """A (rank, k), B (n, rank) and the scale of a LoRALinear."""
    adapter = layer.adapter
    return adapter.linear_in.weight, adapter.linear_out.weight, adapter.alpha / adapter.dim


class AddedInProduct(Callback):
    """Have all LoRA layers of the process compute that way."""

    def setup(self, trainer, pl_module, stage):
        lora.LoRALinear.forward = forward


class GradientsOfInputs(Callback):
    """No gradient of an adapter's input is lost, where the sequence is split: see base_linear_forward."""

    def setup(self, trainer, pl_module, stage):
        if STOCK_BASE:  # with an older NeMo there is an older Transformer Engine, which drops nothing
            lora.LoRALinear.base_linear_forward = base_linear_forward


class SplitBySequence(Callback):
    """Have all LoRA layers of the process compute as split_forward does; together with GradientsOfInputs."""

    def setup(self, trainer, pl_module, stage):
        lora.LoRALinear.forward = split_forward


class AddedByKernels(Callback):
    """Have SwiGLU's kernels, and that of the sum with the residual, add what LoRA adds: see lora_kernels.py."""

    def setup(self, trainer, pl_module, stage):
        if kernels.is_llama(pl_module.config):
            from nemo_tutorial import lora_kernels  # Triton comes with PyTorch for CUDA

            lora.LoRALinear.forward = lora_kernels.linear
            mlp.MLP.forward = lora_kernels.mlp
            for name in ("bias_dropout_add_fused_train", "bias_dropout_add_fused_inference"):
                setattr(fused_bias_dropout, name, lora_kernels.residual_sum_or(getattr(fused_bias_dropout, name)))

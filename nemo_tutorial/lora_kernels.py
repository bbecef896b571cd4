"""What LoRA adds to the widest tensors of a layer and to a block's output, added by kernels that read those anyway.

Kernels of our own, in Triton: SwiGLU's, which also makes the narrow products of the adapters around it, and the sum
with the residual. In passes of its own (lora.py) that takes 5 % of a step, and what is small against a layer's output
is lost, which is rounded before the adapter's part is added, as NeMo does: benchmarks/README.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.mlp import MLP
from nemo.collections.llm.peft.lora import LoRALinear
from triton.language.extra import libdevice

from nemo_tutorial import lora

STOCK = MLP.forward
HALF = (torch.bfloat16, torch.float16)
RANK = 64  # at most: with more, SwiGLU's tiles do not fit into a multiprocessor
ROWS, COLUMNS = 64, 64  # of a program's tile
PARTS = 8  # programs of SwiGLU that share a row
OPTIONS = {"num_warps": 4, "num_stages": 3}


class NotAdded(NamedTuple):
    """scale * low B^T, which is to be added to a block's output; it stands where Megatron has a bias."""

    low: torch.Tensor
    b: torch.Tensor
    scale: float


def linear(self, x, *args, **kwargs):
    """LoRALinear's forward; the last layer of a block leaves its adapter's part to the sum with the residual."""
    base = self.to_wrap
    last = isinstance(base, RowParallelLinear) or getattr(base, "parallel_mode", None) == "row"
    if not (last and is_ours(self, x) and lora.is_one_product(base)):
        return lora.forward(self, x, *args, **kwargs)
    a, b, scale = lora.low_rank(self)
    return finished(*lora.FrozenAndDown.apply(x, base.weight, a), b, scale, base.config)


def mlp(self, hidden_states, *args, **kwargs):
    """MLP's forward, by the kernels below where they compute the same: SwiGLU between two of LoRA's layers."""
    fc1, fc2, config = self.linear_fc1, self.linear_fc2, self.config
    if (
        any(value is not None for value in (*args, *kwargs.values()))  # what an expert's tokens are scaled by
        or not is_ours(fc1, hidden_states)
        or not is_ours(fc2, hidden_states)
        or not lora.is_one_product(fc2.to_wrap)
        or config.add_bias_linear
        or not config.gated_linear_unit
        or config.activation_func is not torch.nn.functional.silu
        or config.cpu_offloading
    ):
        return STOCK(self, hidden_states, *args, **kwargs)
    y, _, x = fc1.base_linear_forward(hidden_states)  # x: behind the norm
    (a1, b1, scale1), (a2, b2, scale2) = lora.low_rank(fc1), lora.low_rank(fc2)
    h, low = SwiGLU.apply(y, lora.Down.apply(x, a1), b1, scale1, a2)
    return finished(torch.nn.functional.linear(h, fc2.to_wrap.weight), low, b2, scale2, config)


def finished(out, low, b, scale, config):
    """A block's output and, where Megatron has a bias, what the sum with the residual is to add."""
    if residual_waits(config):
        return out, NotAdded(low, b, scale)
    return lora.Up.apply(out, low, b, scale), None


def is_ours(layer, x):
    """Whether it is NeMo's LoRA layer with a plain adapter of few ranks, and all is in 16 bits."""
    plain = type(layer) is LoRALinear and lora.is_plain(layer.adapter) and layer.adapter.dim <= RANK
    return plain and x.dtype == layer.to_wrap.weight.dtype in HALF


def residual_waits(config):
    """Whether a block's output goes from its last layer to the sum with the residual, and nowhere else."""
    selective = config.recompute_granularity == "selective"
    parts = getattr(config, "recompute_modules", None) if selective else None  # an older Megatron knows one part only
    return config.bias_dropout_fusion and not config.hidden_dropout and set(parts or ()) <= {"core_attn"}


def residual_sum_or(stock):
    """Megatron's bias_dropout_add, `stock` but for what is not added yet."""

    def bias_dropout_add(x_with_bias, residual, prob):
        x, bias = x_with_bias
        return ResidualSum.apply(x, *bias, residual) if isinstance(bias, NotAdded) else stock((x, bias), residual, prob)

    return bias_dropout_add


class ResidualSum(torch.autograd.Function):
    """out + scale * low B^T + residual, written into `out`, which nothing else may have kept for its backward pass.

    out and residual (..., n), low (t, rank), b (n, rank); returns a tensor of out's shape, in its memory.
    """

    @staticmethod
    def forward(ctx, out, low, b, scale, residual):
        ctx.save_for_backward(low, b)
        ctx.scale = scale
        flat = out.detach().view(-1, out.shape[-1])
        (tokens, width), rank = flat.shape, low.shape[1]
        tensors = flat, low.contiguous(), b.contiguous(), residual.to(out.dtype).contiguous()
        grid = triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS)
        residual_kernel[grid](*tensors, tokens, scale, width, rank, _tile(rank), ROWS, COLUMNS, num_warps=4)
        return flat.view(out.shape)

    @staticmethod
    def backward(ctx, grad):
        low, b = ctx.saved_tensors
        return grad, *lora.up_gradients(grad, low, b, ctx.scale), None, grad


class SwiGLU(torch.autograd.Function):
    """h = SwiGLU(y + scale * low B^T) and h A^T.

    y (..., 2 k), low (t, rank of b), b (2 k, rank), a (rank, k); returns (..., k) and (t, rank of a).
    """

    @staticmethod
    def forward(ctx, y, low, b, scale, a):
        ctx.scale, shape = scale, y.shape
        y = y.reshape(-1, shape[-1]).contiguous()
        h = y.new_empty(len(y), shape[-1] // 2)
        down = _launch(swiglu_kernel, y, low, b, a, (h,), scale, len(a))
        h = h.view(*shape[:-1], -1)
        ctx.save_for_backward(y, low, b, a, h)
        return h, down

    @staticmethod
    def backward(ctx, grad_h, grad_down):
        y, low, b, a, h = ctx.saved_tensors
        grad_y = torch.empty_like(y)
        grad_low = _launch(swiglu_gradient_kernel, y, low, b, a, (grad_h, grad_down, grad_y), ctx.scale, len(b[0]))
        grad_b, grad_a = lora.gradient(b, grad_y, low, ctx.scale), lora.gradient(a, grad_down, h.flatten(0, -2))
        return grad_y.view(*h.shape[:-1], -1), grad_low, grad_b, None, grad_a


def _launch(kernel, y, low, b, a, tensors, scale, rank):
    """Run a kernel of SwiGLU over all of y (t, 2 k); the sum (t, rank) of what its programs return, in y's dtype."""
    tokens, width = len(y), y.shape[1] // 2
    sums = torch.empty(PARTS, tokens, rank, dtype=torch.float32, device=y.device)
    ranks = low.shape[1], len(a)
    steps = triton.cdiv(triton.cdiv(width, COLUMNS), PARTS)
    tensors = [tensor.contiguous() for tensor in (y, low, b, a, *tensors)]
    sizes = width, *ranks, *map(_tile, ranks), ROWS, COLUMNS, steps
    kernel[triton.cdiv(tokens, ROWS), PARTS](*tensors, sums, tokens, scale, *sizes, **OPTIONS)
    return sums.sum(0).to(y.dtype)


def _tile(rank):
    """The power of two that holds a rank, at least what a product of Triton's takes."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def narrow(pointer, row, tokens, r, rank):
    """Rows of a tensor (tokens, rank); past its ends 0."""
    r = r[None, :]
    return tl.load(pointer + row * rank + r, (row < tokens) & (r < rank), 0.0)


@triton.jit
def with_adapter(y, left, b, scale, at, inside, column, width, r, rank):
    """Tiles of y + scale low b^T in float32, of the gate and of what it is multiplied by, and those of b^T."""
    r = r[:, None]
    known = (r < rank) & (column < width)
    gate_b = tl.load(b + column * rank + r, known, 0.0)
    up_b = tl.load(b + (column + width) * rank + r, known, 0.0)
    gate = tl.load(y + at, inside, 0.0).to(tl.float32) + scale * tl.dot(left, gate_b)
    up = tl.load(y + at + width, inside, 0.0).to(tl.float32) + scale * tl.dot(left, up_b)
    return gate, up, gate_b, up_b


@triton.jit
def residual_kernel(
    out,
    low,
    b,
    residual,
    tokens,
    scale,
    width: tl.constexpr,
    rank: tl.constexpr,
    ranks: tl.constexpr,  # of a tile
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """out += scale low b^T + residual."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    column = tl.program_id(1) * columns + tl.arange(0, columns)[None, :]
    r = tl.arange(0, ranks)
    inside, at = (row < tokens) & (column < width), row * width + column
    left = narrow(low, row, tokens, r, rank)
    right = tl.load(b + column * rank + r[:, None], (r[:, None] < rank) & (column < width), 0.0)
    total = tl.load(out + at, inside, 0.0).to(tl.float32) + tl.load(residual + at, inside, 0.0).to(tl.float32)
    total += scale * tl.dot(left, right)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


@triton.jit
def swiglu_kernel(
    y,
    low,
    b,
    a,
    h,
    sums,
    tokens,
    scale,
    width: tl.constexpr,
    rank1: tl.constexpr,
    rank2: tl.constexpr,
    ranks1: tl.constexpr,  # of a tile
    ranks2: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    steps: tl.constexpr,
):
    """h = SwiGLU(y + scale low b^T), and h a^T of a program's columns."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    part = tl.program_id(1)
    r1, r2 = tl.arange(0, ranks1), tl.arange(0, ranks2)
    left = narrow(low, row, tokens, r1, rank1)
    total = tl.zeros((rows, ranks2), tl.float32)
    for step in range(steps):
        column = (part * steps + step) * columns + tl.arange(0, columns)[None, :]
        inside, at = (row < tokens) & (column < width), row * (2 * width) + column
        gate, up, _, _ = with_adapter(y, left, b, scale, at, inside, column, width, r1, rank1)
        made = (libdevice.fast_dividef(gate, 1 + libdevice.fast_expf(-gate)) * up).to(h.dtype.element_ty)
        tl.store(h + row * width + column, made, inside)
        right = tl.load(a + r2[:, None] * width + column, (r2[:, None] < rank2) & (column < width), 0.0)
        total = tl.dot(made, tl.trans(right), total)
    tl.store(sums + (part * tokens + row) * rank2 + r2[None, :], total, (row < tokens) & (r2[None, :] < rank2))


@triton.jit
def swiglu_gradient_kernel(
    y,
    low,
    b,
    a,
    grad_h,
    grad_down,
    grad_y,
    sums,
    tokens,
    scale,
    width: tl.constexpr,
    rank1: tl.constexpr,
    rank2: tl.constexpr,
    ranks1: tl.constexpr,
    ranks2: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    steps: tl.constexpr,
):
    """The gradient of y from that of h, which is grad_h + grad_down a; and scale grad_y b of its columns."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    part = tl.program_id(1)
    r1, r2 = tl.arange(0, ranks1), tl.arange(0, ranks2)
    left = narrow(low, row, tokens, r1, rank1)
    below = narrow(grad_down, row, tokens, r2, rank2)
    total = tl.zeros((rows, ranks1), tl.float32)
    for step in range(steps):
        column = (part * steps + step) * columns + tl.arange(0, columns)[None, :]
        inside, at = (row < tokens) & (column < width), row * (2 * width) + column
        gate, up, gate_b, up_b = with_adapter(y, left, b, scale, at, inside, column, width, r1, rank1)
        right = tl.load(a + r2[:, None] * width + column, (r2[:, None] < rank2) & (column < width), 0.0)
        # Not as a sum: Triton would begin the product with what is loaded, and not load that ahead.
        grad = tl.dot(below, right) - (-tl.load(grad_h + row * width + column, inside, 0.0).to(tl.float32))
        share = libdevice.fast_dividef(1.0, 1 + libdevice.fast_expf(-gate))
        silu = gate * share
        of_gate = (grad * up * (share + silu - silu * share)).to(y.dtype.element_ty)
        of_up = (grad * silu).to(y.dtype.element_ty)
        tl.store(grad_y + at, of_gate, inside)
        tl.store(grad_y + at + width, of_up, inside)
        total = tl.dot(of_up, tl.trans(up_b), tl.dot(of_gate, tl.trans(gate_b), total))
    tl.store(sums + (part * tokens + row) * rank1 + r1[None, :], scale * total, (row < tokens) & (r1[None, :] < rank1))

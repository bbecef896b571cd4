"""Megatron's mixed queries, keys and values, split and turned by their positions in one pass over memory.

A kernel of our own, in Triton: Megatron's way takes four passes; Transformer Engine's kernel for it takes three times
as long as this one, which takes little more than a copy, and knows no packs.
"""

import torch
import triton
import triton.language as tl
from megatron.core.transformer.attention import Attention, SelfAttention

STOCK_SPLIT = SelfAttention.get_query_key_value_tensors


def attention(self, *args, rotary_pos_emb=None, inference_context=None, packed_seq_params=None, **kwargs):
    """SelfAttention's forward, which turns nothing itself: split_and_turned does, which it calls."""
    if rotary_pos_emb is not None and inference_context is None:
        self.positions, rotary_pos_emb = (rotary_pos_emb, packed_seq_params), None
    kwargs |= {"inference_context": inference_context, "packed_seq_params": packed_seq_params}
    return Attention.forward(self, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)


def split_and_turned(self, hidden_states, key_value_states=None, split_qkv=True):
    """SelfAttention's get_query_key_value_tensors; returns (s, b, heads, d) of queries, keys, and values."""
    positions = self.__dict__.pop("positions", None)
    if not positions:
        return STOCK_SPLIT(self, hidden_states, key_value_states, split_qkv)
    mixed, _ = STOCK_SPLIT(self, hidden_states, key_value_states, split_qkv=False)
    return SplitAndTurn.apply(mixed, *angles(*positions, len(mixed)))


def angles(frequencies, packed, tokens):
    """Cosines and sines (s, d / 2), float32, from Megatron's frequencies (positions, 1, 1, d), whose halves are equal.

    They are kept with the object that they are made of: all layers ask for the same.
    """
    if not hasattr(frequencies, "angles"):
        half = frequencies.flatten(1).chunk(2, -1)[0].float()
        frequencies.angles = half.cos(), half.sin()
    if packed is None:
        return frequencies.angles
    if not hasattr(packed, "angles"):
        ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        place = torch.arange(tokens, device=ends.device)
        place = place - ends[torch.searchsorted(ends, place, right=True) - 1]
        place.clamp_(max=len(frequencies) - 1)  # of what may be behind the last sample
        packed.angles = tuple(table[place] for table in frequencies.angles)
    return packed.angles


class SplitAndTurn(torch.autograd.Function):
    """mixed (s, b, g, (n + 2) d), cos and sin (s, d / 2) -> q (s, b, g n, d), k and v (s, b, g, d)."""

    @staticmethod
    def forward(ctx, mixed, cos, sin):
        ctx.save_for_backward(cos, sin)
        s, b, groups, width = mixed.shape
        d = 2 * cos.shape[-1]
        n = width // d - 2
        q, k, v = (mixed.new_empty(s, b, heads, d) for heads in (groups * n, groups, groups))
        _launch(mixed.contiguous(), q, k, v, cos, sin, back=False)
        return q, k, v

    @staticmethod
    def backward(ctx, *grads):
        q, k, v = (grad.contiguous() for grad in grads)
        s, b, groups, d = k.shape
        n = q.shape[2] // groups
        mixed = q.new_empty(s, b, groups, (n + 2) * d)
        _launch(mixed, q, k, v, *ctx.saved_tensors, back=True)
        return mixed, None, None


def _launch(mixed, q, k, v, cos, sin, back):
    s, b, groups, d = k.shape
    n = q.shape[2] // groups
    pairs = groups * (n + 2) * d // 2
    block = triton.next_power_of_2(pairs)
    rotary_kernel[(s * b,)](mixed, q, k, v, cos, sin, b, pairs, n, d // 2, back, block, num_warps=8)


@triton.jit
def rotary_kernel(
    mixed,
    q,
    k,
    v,
    cos,
    sin,
    batch,
    pairs,  # of numbers that are turned together, in `mixed` of a token
    n: tl.constexpr,  # queries a group
    half: tl.constexpr,  # of a head's numbers
    back: tl.constexpr,  # from the gradients of q, k and v to that of `mixed`
    block: tl.constexpr,
):
    """A program is a token of a sample: mixed -> q, k, v, or back."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, block)
    inside = pair < pairs
    number, head = pair % half, pair // half
    group, place = head // (n + 2), head % (n + 2)  # of a group's heads: n queries, then its key, its value
    c = tl.load(cos + row // batch * half + number)
    s = tl.load(sin + row // batch * half + number)
    c, s = tl.where(place <= n, c, 1.0), tl.where(place <= n, s, 0.0)  # a value is not turned
    first = row * (pairs // half // (n + 2)) + group  # this group, counted over all tokens
    mixed += row * pairs * 2 + head * half * 2 + number
    q += (first * n + place) * half * 2 + number
    k += first * half * 2 + number
    v += first * half * 2 + number
    of_q, of_k, of_v = inside & (place < n), inside & (place == n), inside & (place == n + 1)
    if back:
        a = tl.load(q, of_q, 0.0) + tl.load(k, of_k, 0.0) + tl.load(v, of_v, 0.0)
        b = tl.load(q + half, of_q, 0.0) + tl.load(k + half, of_k, 0.0) + tl.load(v + half, of_v, 0.0)
        a, b = a.to(tl.float32), b.to(tl.float32)
        tl.store(mixed, (a * c + b * s).to(mixed.dtype.element_ty), inside)
        tl.store(mixed + half, (b * c - a * s).to(mixed.dtype.element_ty), inside)
    else:
        a = tl.load(mixed, inside, 0.0).to(tl.float32)
        b = tl.load(mixed + half, inside, 0.0).to(tl.float32)
        x, y = (a * c - b * s).to(q.dtype.element_ty), (b * c + a * s).to(q.dtype.element_ty)
        tl.store(q, x, of_q)
        tl.store(q + half, y, of_q)
        tl.store(k, x, of_k)
        tl.store(k + half, y, of_k)
        tl.store(v, x, of_v)
        tl.store(v + half, y, of_v)

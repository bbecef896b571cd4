"""Faster kernels than those that NeMo's layers call, put in their place in each rank (see performance.py).

benchmarks/README.md has what each is worth.
"""

import contextlib
import ctypes
import importlib.util
from pathlib import Path

import torch
from lightning.pytorch import Callback
from megatron.core.extensions import transformer_engine as te
from megatron.core.transformer import mlp

from nemo_tutorial import terminal


class SwiGLU(Callback):
    """Transformer Engine's SwiGLU for Megatron's, which torch.compile makes: its gradient takes 0.6 of the time."""

    def setup(self, trainer, pl_module, stage):
        with contextlib.suppress(ImportError, AttributeError):  # of an older Transformer Engine
            from transformer_engine.pytorch import ops

            mlp.bias_swiglu_impl = swiglu_by(ops.SwiGLU())


STOCK_SWIGLU = mlp.bias_swiglu_impl


def swiglu_by(op):
    """Megatron's function (..., 2 n) -> (..., n), by `op` where there is no bias and the input is kept as it is."""

    def swiglu(x, bias, fp8_input_store=False, cpu_offload_input=False):
        if bias is not None or fp8_input_store or cpu_offload_input:
            return STOCK_SWIGLU(x, bias, fp8_input_store, cpu_offload_input)
        return op(x)

    return swiglu


HEADS = (64, 128)  # whose attention is measured


class FlashAttention3(Callback):
    """FlashAttention 3 for cuDNN's attention, on a Hopper GPU where it is installed."""

    def setup(self, trainer, pl_module, stage):
        config = pl_module.config
        if (config.kv_channels or config.hidden_size // config.num_attention_heads) in HEADS and flash_attention_3():
            te.TEDotProductAttention.forward = attention
            if trainer.is_global_zero:
                print("attention: FlashAttention 3", flush=True)


def flash_attention_3():
    """Load torch.ops.flash_attn_3, of the package flash_attn_3 or of xformers 0.0.34; None where there is no such."""
    if torch.cuda.get_device_capability() != (9, 0):
        return None
    xformers = importlib.util.find_spec("xformers")
    library = Path(xformers.submodule_search_locations[0], "flash_attn_3/_C.so") if xformers else None
    try:
        if importlib.util.find_spec("flash_attn_3"):
            import flash_attn_3._C  # noqa: F401  registers the operators
        elif library and library.exists():
            load_with_runtime(library)
    except Exception as error:  # of the loader or of cuDNN, or this Transformer Engine calls for other arguments
        why = error.__cause__ or error
        terminal.warn(f"FlashAttention 3 is there but can't be loaded, so cuDNN's attention is used: {why}")
    return torch.ops.flash_attn_3 if hasattr(torch.ops.flash_attn_3, "bwd") else None


def load_with_runtime(library):
    """Load `library`, and before it the CUDA runtime that lies in its folder or below, if there is one.

    xformers' library is built for CUDA 12. With PyTorch for CUDA 13 its runtime may not be where the loader finds it by
    name: cuDNN's attention looks for both once, at its first call, and stops if there are two. So it is called before.
    """
    runtime = next(library.parent.rglob("libcudart.so.*"), None)
    if runtime:
        choose_runtime_of_cudnn()
        ctypes.CDLL(str(runtime))
    torch.ops.load_library(str(library))


def choose_runtime_of_cudnn():
    """A first call of Transformer Engine's attention by cuDNN; it draws no random number of the run's."""
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    x = torch.zeros(64, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
    ends = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    backend = fused_attn.FusedAttnBackend["F16_arbitrary_seqlen"]
    options = {"qkv_layout": "sbhd_sbhd_sbhd", "attn_mask_type": "no_mask", "rng_gen": torch.Generator("cuda")}
    fused_attn.fused_attn_fwd(False, 64, 64, ends, ends, x, x, x, x.dtype, backend, **options)


STOCK_ATTENTION = getattr(te.TEDotProductAttention, "forward", None)  # None without Transformer Engine


def attention(self, query, key, value, mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
    """TEDotProductAttention's, by FlashAttention 3 where that computes the same: causal, nothing dropped, no window.

    query (s, b, h, d), key and value (s, b, g, d), returns (s, b, h d); of packed samples (t, h, d), returns (t, h d).
    Our own and not Transformer Engine's way to FlashAttention 3, which copies all three and their gradients to have
    the batch first: 34 of 1,141 ms a step of 1B.
    """
    packed = packed_seq_params is not None
    same = (
        attn_mask_type.name in (("causal", "padding_causal") if packed else ("causal",))
        and attention_bias is None
        and query.dtype == torch.bfloat16
        and len(query) == len(key)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in HEADS
        and self.window_size in (None, (-1, -1), (-1, 0))
        and not (self.attention_dropout and self.training)
        and getattr(self, "softmax_type", "vanilla") == "vanilla"
        and not getattr(self, "return_max_logit", False)
        and self.config.context_parallel_size == 1
        and not self.config.fp8_dot_product_attention
    )
    if packed:  # without gaps between its samples
        same = same and packed_seq_params.cu_seqlens_q_padded is None and packed_seq_params.max_seqlen_q is not None
    if not same:
        return STOCK_ATTENTION(self, query, key, value, mask, attn_mask_type, attention_bias, packed_seq_params)
    options = {"softmax_scale": self.flash_attention.softmax_scale, "is_causal": True}
    if packed:
        ends, longest = packed_seq_params.cu_seqlens_q, int(packed_seq_params.max_seqlen_q)
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
    # Else v, a view, would keep all of q, k and v together in memory.
    return Attention.apply(query, key, value.contiguous(), options, self.deterministic).flatten(-2)


class Attention(torch.autograd.Function):
    """Causal attention by torch.ops.flash_attn_3, of tensors (s, b, h, d) or (t, h, d); returns q's shape.

    `deterministic`: the gradients are added up in a fixed order.
    """

    @staticmethod
    def forward(ctx, q, k, v, options, deterministic):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        views = map(_batch_first, (q, k, v))
        _, statistics, *_ = torch.ops.flash_attn_3.fwd(*views, out=_batch_first(out), num_splits=1, **options)
        ctx.save_for_backward(q, k, v, out, statistics)
        ctx.options = options | {"deterministic": deterministic}
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, statistics = ctx.saved_tensors
        grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)]
        views = map(_batch_first, (grad.contiguous(), q, k, v, out))
        torch.ops.flash_attn_3.bwd(*views, statistics, *map(_batch_first, grads), **ctx.options)
        return *grads, None, None


def _batch_first(tensor):
    """(s, b, h, d) as a view (b, s, h, d), whose strides FlashAttention takes as they are; (t, h, d) as it is."""
    return tensor.transpose(0, 1) if tensor.dim() == 4 else tensor

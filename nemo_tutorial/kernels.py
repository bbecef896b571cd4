"""Faster kernels than those that NeMo's layers call, put in their place in each rank (see performance.py).

benchmarks/README.md has what each is worth.
"""

import contextlib
import ctypes
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.common.language_module import language_module
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer import mlp
from nemo.collections import llm

from nemo_tutorial import compat, terminal

# What Transformer Engine's two kernels of the cross entropy take.
STATISTICS = "X_ptr X_stride Y_ptr Y_stride m_d_X_y_ptr m_d_X_y_stride rank n_cols BLOCK_SIZE".split()
GRADIENT = "X_ptr X_stride Y_ptr Y_stride loss_ptr loss_stride m_d_X_y_ptr m_d_X_y_stride rank world_size ignore_idx "
GRADIENT = (GRADIENT + "n_cols n_non_ignore reduce_loss label_smoothing BLOCK_SIZE").split()
IGNORED = -100  # a label without loss


class CrossEntropy(Callback):
    """Transformer Engine's cross entropy, its kernels in another order: see CrossEntropyInTwoPasses."""

    def setup(self, trainer, pl_module, stage):
        with contextlib.suppress(ImportError, AttributeError):  # of an older Transformer Engine or Megatron
            from transformer_engine.pytorch.triton import cross_entropy as theirs

            statistics, gradient = theirs.online_softmax_kernel, theirs.cross_entropy_kernel
            if [statistics.arg_names, gradient.arg_names] == [STATISTICS, GRADIENT]:
                ours = cross_entropy_by(statistics, gradient)
                compat.replace(language_module, "te_parallel_cross_entropy", ours)


def cross_entropy_by(statistics, gradient):
    """Megatron's te_parallel_cross_entropy: logits (s, b, columns of this rank), labels (s, b) -> (s, b), float32."""

    def cross_entropy(logits, labels, tp_group, is_cg_capturable=False):
        return CrossEntropyInTwoPasses.apply(logits, labels, tp_group, statistics, gradient)

    return cross_entropy


class CrossEntropyInTwoPasses(torch.autograd.Function):
    """The logits are read once for the loss, and once, in the backward pass, to write their gradient over them.

    Transformer Engine's own writes the gradient as if that of the loss were 1, and reads and writes it all again to
    multiply by what it is. Here it is known when its kernel is called, which divides by a sum: by sum / gradient.
    """

    @staticmethod
    def forward(ctx, logits, labels, group, statistics, gradient):
        logits, labels = logits.contiguous(), labels.contiguous()
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        rows, columns = labels.numel(), logits.shape[-1]
        # Of each row: its maximum, the sum of exp(logit - maximum), the label's logit (-inf: it is another rank's).
        found = torch.empty(rows, 3, dtype=torch.float32, device=logits.device)
        # Small blocks, so that several programs run at a time on a multiprocessor: this only reads.
        statistics[(rows,)](
            logits, columns, labels, 1, found, 1, rank, columns, BLOCK_SIZE=_block(columns, 8192), num_warps=8
        )
        if size > 1:
            every = found.new_empty(size * rows, 3)
            torch.distributed.all_gather_into_tensor(every, found, group=group)
            every = every.view(size, rows, 3)
            highest = every[..., 0].amax(0)
            total = (every[..., 1] * (every[..., 0] - highest).exp()).sum(0)
            found = torch.stack((highest, total, every[..., 2].amax(0)), -1)
        ctx.save_for_backward(logits.detach(), labels, found)
        ctx.rank, ctx.gradient = rank, gradient
        highest, total, right = found.unbind(-1)
        return (highest + total.log() - right).view(labels.shape).masked_fill(labels == IGNORED, 0)

    @staticmethod
    def backward(ctx, grad):
        logits, labels, found = ctx.saved_tensors
        rows, columns = labels.numel(), logits.shape[-1]
        grad = grad.reshape(-1).float()
        highest, total, right = found.unbind(-1)
        divided = torch.stack((highest, total / grad, right), -1)
        numbers = {"rank": ctx.rank, "world_size": 1, "ignore_idx": IGNORED, "n_cols": columns, "n_non_ignore": rows}
        ctx.gradient[(rows,)](
            logits,
            columns,
            labels,
            1,
            torch.empty_like(total),  # a loss, of no use with these sums
            1,
            divided,
            1,
            **numbers,
            reduce_loss=False,
            label_smoothing=0.0,
            BLOCK_SIZE=_block(columns, 32768),
            num_warps=32,
        )
        # From the label's it has taken 1, where that should be multiplied as well: this one is written again.
        place = labels.view(-1) - ctx.rank * columns
        here = (place >= 0) & (place < columns) & (labels.view(-1) != IGNORED)
        place, flat = place.clamp(0, columns - 1)[:, None], logits.view(rows, columns)
        new = (((right - highest).exp() / total - 1) * grad).to(flat.dtype)
        flat.scatter_(1, place, torch.where(here[:, None], new[:, None], flat.gather(1, place)))
        return logits, None, None, None, None


def _block(columns, most):
    """The power of two, of `most` at most, that holds `columns`."""
    return min(most, 1 << (columns - 1).bit_length())


def is_llama(config):
    """Whether a model's layers are those for which the settings below were measured: Llama 1 to 3."""
    return isinstance(config, llm.LlamaConfig) and not hasattr(config, "nope_layer_interval")  # that is Llama 4


class FusedRoPE(Callback):
    """Queries, keys and values are split and turned by their positions in one pass: see rope.py."""

    def setup(self, trainer, pl_module, stage):
        config = pl_module.config
        split = megatron_attention.SelfAttention.get_query_key_value_tensors
        if (
            is_llama(config)
            and config.rotary_percent == 1
            and not config.rotary_interleaved
            and compat.supported(split, split_qkv=False)  # not by an older Megatron
        ):
            from nemo_tutorial import rope  # Triton comes with PyTorch for CUDA

            megatron_attention.SelfAttention.forward = rope.attention
            megatron_attention.SelfAttention.get_query_key_value_tensors = rope.split_and_turned


class GradientsInProduct(Callback):
    """Weight gradients are added to their sum inside the products that make them.

    Transformer Engine's layers can. Megatron asks for Apex all the same, because of its own output layer; where there
    is no Apex, that one takes PyTorch's product.
    """

    def setup(self, trainer, pl_module, stage):
        if is_llama(pl_module.config):
            if not layers._grad_accum_fusion_available:
                functions = {"wgrad_gemm_accum_fp32": add_gradient, "wgrad_gemm_accum_fp16": add_gradient}
                layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(**functions)
                layers._grad_accum_fusion_available = True
            pl_module.config.gradient_accumulation_fusion = True


def add_gradient(x, grad, total, scale=1.0):
    """Apex's function of either name: adds scale * grad^T x to `total`; x (t, k), grad (t, n), total (n, k)."""
    if total.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # of PyTorch 2.8
        torch.addmm(total, grad.t(), x, alpha=scale, out_dtype=total.dtype, out=total)
    else:
        total.add_(grad.t().mm(x), alpha=scale)


class RowwiseCasts(Callback):
    """The optimizer's weights are cast to FP8 without transposed copies of them: see rowwise."""

    def setup(self, trainer, pl_module, stage):
        with contextlib.suppress(ImportError, AttributeError):  # of an older Transformer Engine
            from transformer_engine.pytorch.tensor import utils
            from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

            utils.cast_master_weights_to_fp8 = rowwise(utils.cast_master_weights_to_fp8, Float8Quantizer)


def rowwise(cast, quantizer):
    """Transformer Engine's cast_master_weights_to_fp8, in which no `quantizer` (its class) writes a transposed copy.

    It casts a rank's part of each weight as a single row. Its kernel for a copy and the transpose is made for tiles of
    rows, writes 55 GB/s of that on an H200, and the transpose is never read: weights get theirs before their products.
    """

    def cast_rowwise(*args, **kwargs):
        theirs = quantizer.update_quantized

        def update_quantized(self, *args, **kwargs):
            columnwise = self.columnwise_usage
            self.set_usage(columnwise=False)
            try:
                return theirs(self, *args, **kwargs)
            finally:
                self.set_usage(columnwise=columnwise)

        quantizer.update_quantized = update_quantized
        try:
            return cast(*args, **kwargs)
        finally:
            quantizer.update_quantized = theirs

    return cast_rowwise


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

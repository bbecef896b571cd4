"""The no-GPU mode: the real NeMo and Megatron-Core on a CPU, with gloo between processes.

Importing this module patches torch, Megatron-Core and NeMo in this process; where CUDA is available it does nothing
at all. It reaches the ranks because a recipe for the CPU names `pretrain` or `finetune` below, which a rank imports.
It imports NeMo before, so the folder no_gpu, in the ranks' path, hides what it must not find in the NeMo container.
It serves learning, tests, and checking a run before renting GPUs; it says nothing about speed. What a CPU run
can't show: Transformer Engine's kernels, NCCL, context parallelism, FP8.

Checkpoints written here have the names, shapes and values of those of a GPU machine with Transformer Engine.
Made for NeMo 2.7.3 and Megatron-Core 0.15.3; each patch says what breaks without it.
"""

import contextlib
import functools
import multiprocessing
import sys
import types

import torch
import torch.nn.functional as F
from torch.utils._device import _device_constructors

from nemo_tutorial import products

# Megatron's config: its checks refuse these kernels where there is neither CUDA nor Transformer Engine.
NO_FUSION = {
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "cross_entropy_loss_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "use_cpu_initialization": True,
    "attention_softmax_in_fp32": True,  # as Transformer Engine's; in bf16 gradients were seen to jump by 10
    "moe_grouped_gemm": False,  # the experts one by one, which computes and saves the same
    "moe_permute_fusion": False,
}
# Transformer Engine keeps a norm inside the linear layer that follows it; Megatron's own layers do not.
LOCAL_NAMES = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


def pretrain(*args, **kwargs):
    """`llm.pretrain` in the no-GPU mode; same arguments. A recipe that names it makes its ranks import this module."""
    from nemo.collections import llm

    return llm.pretrain(*args, **kwargs)


def finetune(*args, **kwargs):
    """`llm.finetune` in the no-GPU mode; same arguments."""
    from nemo.collections import llm

    return llm.finetune(*args, **kwargs)


def _to_cpu(device):
    """Any spelling of a CUDA device -> "cpu"; everything else unchanged."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


# A new function each time: torch._dynamo wants every torch attribute to be an object of its own.
def _identity():
    return lambda self, *args, **kwargs: self


def _nothing():
    return lambda *args, **kwargs: None


class _Stream:
    """Stands in for a CUDA stream or event: everything has already happened."""

    def __init__(self, *args, **kwargs):
        pass

    def _done(self, *args, **kwargs):
        return self  # as an event, where one is asked for

    wait_stream = wait_event = record_event = record = wait = synchronize = _done


def _no_compile(model=None, **kwargs):
    return model if model is not None else (lambda fn: fn)


def _factory(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return fn(*args, **kwargs)

    return wrapper


def _mover(move):
    @functools.wraps(move)
    def to(self, *args, **kwargs):
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if args and not isinstance(args[0], (torch.dtype, torch.Tensor)):
            args = (_to_cpu(args[0]), *args[1:])
        return move(self, *args, **kwargs)

    return to


def _patch_torch():
    # `with torch.device("meta")` knows these functions by identity: it must see them before they are replaced.
    _device_constructors()
    # Loss reduction, optimizer and schedules make tensors on "cuda": "Torch not compiled with CUDA enabled".
    names = "tensor as_tensor empty zeros ones full arange rand randn randint eye linspace"
    for name in (names + " empty_like zeros_like ones_like full_like rand_like randn_like").split():
        setattr(torch, name, _factory(getattr(torch, name)))

    # Tokens on their way to experts in other processes.
    torch.Tensor.new_empty = _factory(torch.Tensor.new_empty)

    # Batches, metrics and modules are moved with .to("cuda"), .cuda() and .pin_memory(): the same error.
    tensor, module, tensor_type = torch.Tensor, torch.nn.Module, torch.Tensor.type
    tensor.to, module.to = _mover(tensor.to), _mover(module.to)
    tensor.cuda, tensor.pin_memory, module.cuda = _identity(), _identity(), _identity()

    def type_(self, dtype=None, *args, **kwargs):
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.")
        return tensor_type(self, dtype, *args, **kwargs)

    # The optimizers compare param.type() with "torch.cuda.FloatTensor" and refuse everything else.
    tensor.type = type_
    # Megatron's jit_fuser compiles at import: needs a C++ compiler, and minutes.
    torch.compile = _no_compile

    cuda = torch.cuda
    # The SFT data module makes a torch.cuda.LongTensor; x.type(y.type()) needs the other names.
    for name in "Float Half BFloat16 Int Long".split():
        setattr(cuda, name + "Tensor", getattr(torch, name + "Tensor"))
    # Asked for at every step, to say where a tensor shall go.
    cuda.current_device = lambda: 0
    # Megatron keeps the states of its dropout generators on the device: here the CPU's generator has them.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # DDP is set up on a side stream, and checkpoints are saved after a synchronize.
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    for name in "set_device synchronize empty_cache reset_peak_memory_stats".split():
        setattr(cuda, name, _nothing())


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's AdamW in plain torch: the step count sits in the parameter group, not with each tensor.

    Ours, because with torch.optim.AdamW Megatron's distributed optimizer can't save its own checkpoint.
    """

    def __init__(self, params, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            step = group["step"] = group.get("step", 0) + 1
            lr, decay, eps = group["lr"], group["weight_decay"], group["eps"]
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state, grad = self.state[param], param.grad.to(param.dtype)
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
                if self.adam_w_mode:
                    param.mul_(1 - lr * decay)
                else:
                    grad = grad.add(param, alpha=decay)
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(grad, 1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                scale = (square / (1 - beta2**step)).sqrt_().add_(eps)
                param.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))


class ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """Transformer Engine's RMSNorm with zero-centred weights: computed in float32, multiplied by 1 + weight."""

    def reset_parameters(self):
        torch.nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).type_as(x)


class ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """The same of LayerNorm."""

    def reset_parameters(self):
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x):
        weight, bias = 1 + self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class ExtraState:
    """The empty extra state of a norm of Transformer Engine's: on a GPU, a checkpoint without it can't be loaded."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        pass


# By Megatron's name and whether weights are zero-centred.
NORMS = {
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("RMSNorm", True): ZeroCentredRMSNorm,
    ("LayerNorm", True): ZeroCentredLayerNorm,
}
WITH_EXTRA_STATE = {name: type(kind.__name__, (ExtraState, kind), {}) for name, kind in NORMS.items()}


def _patch_megatron():
    from megatron.core import optimizer
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer

    # The tracker of Megatron's generators asks CUDA's for its state.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    post_init = TransformerConfig.__post_init__

    def no_fusion(self):
        for name, value in NO_FUSION.items():
            if hasattr(self, name):
                setattr(self, name, value)
        post_init(self)

    # "apply_rope_fusion is not available": importers build their config themselves, so it can't be passed in.
    TransformerConfig.__post_init__ = no_fusion

    def norm(cls, config, hidden_size, eps=1e-5, **kwargs):
        kind = config.normalization, bool(config.layernorm_zero_centered_gamma)
        module = WITH_EXTRA_STATE[kind](hidden_size, eps=eps, dtype=config.params_dtype)
        for param in module.parameters():
            param.sequence_parallel = config.sequence_parallel
        return module

    # The stock one is float32 always ("dtype mismatch" on import) and refuses sequence parallelism, and the norms of
    # Gemma and Nemotron ("zero_centered_gamma not supported by torch LayerNorm").
    WrappedTorchNorm.__new__ = norm

    layer_init = TransformerLayer.__init__

    def init(self, *args, **kwargs):
        layer_init(self, *args, **kwargs)
        for prefix in self.submodules_config.sharded_state_dict_keys_map:
            module = getattr(self, prefix.rstrip("."), None)
            if isinstance(module, ExtraState):  # in Transformer Engine a part of a linear layer, which has the state
                module.__class__ = type(module).__bases__[1]

    TransformerLayer.__init__ = init

    attention = DotProductAttention.forward

    def packed_attention(self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs):
        if packed_seq_params is None:
            return attention(self, query, key, value, attention_mask, *args, **kwargs)
        # [tokens, heads, channels]: the packs' samples one after the other, each attending to itself alone.
        place = torch.arange(query.shape[0])
        sample = torch.searchsorted(packed_seq_params.cu_seqlens_q, place, right=True)
        mask = (sample[:, None] != sample) | (place[:, None] < place)
        softmax, window = self.scale_mask_softmax, self.scale_mask_softmax.window_size
        if window is not None:
            mask |= place[:, None] - place > window[0]
        softmax.window_size = None  # Megatron would put a mask of its own in the place of ours
        try:
            args = (query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), mask[None, None], *args)
            return attention(self, *args, **kwargs)
        finally:
            softmax.window_size = window

    # "Packed sequence is not supported by DotProductAttention": the mask says what cu_seqlens would.
    DotProductAttention.forward = packed_attention

    @functools.cache
    def results_queue():
        return multiprocessing.get_context("fork").Manager().Queue()

    # The first save starts a fresh Python that imports NeMo-Run, ten seconds; forking is unsafe only with CUDA.
    filesystem_async._get_write_results_queue = results_queue

    # With torch.optim.AdamW the distributed optimizer fails to save ("AssertionError: (torch.Size([]), 0, ...").
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def _patch_experts():
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # The router asks whether it is None: "name 'te_general_gemm' is not defined".
    moe_utils.te_general_gemm = None

    # Numbers of tokens become numpy's where they leave a GPU: else, "all_to_all_single(): incompatible arguments".
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )

    local_spec = gpt_layer_specs.get_gpt_layer_local_spec

    def spec(num_experts=None, **kwargs):
        layer = local_spec(num_experts=num_experts, **kwargs)
        if num_experts:
            # Transformer Engine's experts have their norm before them, not in them: saved under its own name.
            del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        return layer

    gpt_layer_specs.get_gpt_layer_local_spec = spec


def _patch_gemma2():
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from nemo.collections.llm.gpt.model import gemma2

    class RowParallelLinearLayerNorm(RowParallelLinear):
        """The row parallel layer with a norm of its output."""

        def __init__(self, input_size, output_size, *, config, **kwargs):
            super().__init__(input_size, output_size, config=config, **kwargs)
            self.post_layernorm = WrappedTorchNorm(config, output_size, config.layernorm_epsilon)

        def forward(self, x):
            output, bias = super().forward(x)
            return self.post_layernorm(output), bias

    # NeMo has one spec for the layers of Gemma 2, of Transformer Engine's modules, which are not there.
    gemma2.TELayerNormColumnParallelLinear = ColumnParallelLinear
    gemma2.TERowParallelLinearLayerNorm = RowParallelLinearLayerNorm
    gemma2.TransformerLayerSubmodules = functools.partial(
        gemma2.TransformerLayerSubmodules,
        input_layernorm=WrappedTorchNorm,
        pre_mlp_layernorm=WrappedTorchNorm,
        sharded_state_dict_keys_map={local[1:]: te[1:] for te, local in LOCAL_NAMES.items()},
    )


def _patch_nemo():
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as peft_utils
    from nemo.lightning import io, megatron_init
    from nemo.lightning.io import pl

    class NoTransformerEngine:
        """A class that no module is an instance of."""

    # Megatron's TE classes import as None here, and LoRA asks isinstance(module, None).
    peft_utils.HAVE_TE = False
    lora.te = types.SimpleNamespace(Linear=NoTransformerEngine, LayerNormLinear=NoTransformerEngine)
    # Asserts that CUDA is initialised; it only moves tensors between GPUs.
    pl._fix_tensors_device = lambda ckpt: ckpt

    set_seed = megatron_init._set_random_seed

    def set_random_seed(seed):
        set_seed(seed)
        model_parallel_cuda_manual_seed(seed + 100 * megatron_init.get_pipeline_model_parallel_rank())

    # The generators of tensor parallel regions are seeded only where there is a GPU: "cuda rng state is not added".
    megatron_init._set_random_seed = set_random_seed

    apply_transforms = io.apply_transforms

    def local_key(key):
        for te, local in LOCAL_NAMES.items():
            key = key.replace(te, local)
        return key

    def apply_local_transforms(source, target, mapping, *args, **kwargs):
        mapping = {local_key(source): local_key(target) for source, target in mapping.items()}
        return apply_transforms(source, target, mapping, *args, **kwargs)

    # The converters know only Transformer Engine's names of the norms: on import they would stay 1, silently.
    io.apply_transforms = apply_local_transforms


if not torch.cuda.is_available():
    # In the NeMo container, on a machine without a GPU, Megatron would take these layers: they run on GPUs only.
    for name in ("transformer_engine", "apex"):
        sys.modules.setdefault(name, None)
    _patch_torch()
    if products.are_slow():  # they were nine tenths of the tiny model's step
        products.compute_in_float32()
    _patch_megatron()
    _patch_experts()
    _patch_nemo()
    _patch_gemma2()

"""What a GPU will hold: weights, gradients, optimizer state and activations, counted before there is a GPU.

Parameters and states are counted as Megatron-LM's theoretical memory report counts them, activations as Korthikanti et
al. 2022 (arXiv:2205.05198), for the layers that NeMo builds: Transformer Engine's, with fused attention, which keeps no
scores, and without dropout. Counted is what PyTorch has allocated at the peak of a step (GiB: 2^30 bytes); what lies
outside of that is in RESERVE. benchmarks/README.md holds the numbers against measured ones.
"""

from dataclasses import dataclass

from nemo_tutorial import models, performance

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
# Bytes a logit beyond the logits themselves, while the loss is computed.
# te: the gradient is written over the logits. native: Megatron's fused one, a copy in float32 and its exponentials;
# unfused: the copy in float32. (One H100, Llama-3.2-1B, native against te: 7.9; Llama-3.1-8B, unfused against te: 4.0.)
LOSS = {"te": 0, "native": 8, "unfused": 4}
# What PyTorch does not count. CUDA's context with cuBLAS, cuDNN and Transformer Engine; NCCL's buffers where GPUs
# talk; and what the allocator holds without use, of the activations (seen: 1 to 25 %, of which it gives back most).
RESERVE = {"context": 0.7 * GIB, "communication": 0.5 * GIB, "fragmentation": 0.04}
STATISTICS = 4  # bytes a token and head that fused attention keeps for its backward pass (the log of the sum)
FP32_SCORES = 8  # bytes a score: attention in fp32 is not fused, and keeps its scores and probabilities
ATTENTION = ("linear_qkv", "linear_proj")  # of a layer's linear layers, those that experts do not have
STEPPED = 2**28  # parameters whose optimizer state is in float32 at a time, if it is kept in less (adam.in_parts)
MODULES = ("core_attn", "mlp", "moe", "moe_act")  # Megatron's, of those that our models have


@dataclass(frozen=True)
class Estimate:
    """Bytes on the fullest GPU."""

    stage: int  # its pipeline stage, from 0
    parameters: int  # on it
    trained: int  # of those
    weights: float
    gradients: float
    optimizer: float
    activations: float  # at the peak, with what the loss and the last layer's backward pass need
    step: float  # while the optimizer steps and activations are gone: float32 copies of what it keeps in less
    reserve: float

    @property
    def allocated(self):
        """What PyTorch will have allocated at the peak."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.step)

    @property
    def total(self):
        """What the GPU must have."""
        return self.allocated + self.reserve


def estimate(model, args):
    """The Estimate of the fullest pipeline stage, for a models.Model and the flags of a training script."""
    stages = [_stage(model, args, stage) for stage in range(args.pipeline_model_parallel_size)]
    return max(stages, key=lambda stage: stage.total)


def adapter_targets(args, model):
    """The layers that --peft adapts: those named, else all that the family's adapters can be merged from."""
    if not args.peft:
        return ()
    inside = models.NORM_INSIDE.get(model.family.architecture, ())
    return tuple(args.lora_target_modules or (name for name in models.LINEAR if name not in inside))


def recomputed_modules(args, model):
    """The modules that --recompute selective runs again: those named, else the MLP, which keeps the most."""
    if args.recompute != "selective":
        return ()
    return tuple(args.recompute_modules or (["moe"] if model.num_experts else ["mlp"]))


def _linears(model):
    """(inputs, outputs) of a layer's linear layers, by Megatron's names; with experts, of one expert."""
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    inner = model.moe_intermediate_size or model.intermediate_size
    return {
        "linear_qkv": (model.hidden_size, queries + 2 * keys),
        "linear_proj": (queries, model.hidden_size),
        "linear_fc1": (model.hidden_size, (2 if model.family.gated else 1) * inner),
        "linear_fc2": (inner, model.hidden_size),
    }


def _expert_tensor_size(args):
    """The GPUs that share one expert."""
    return args.expert_tensor_parallel_size or (
        1 if args.expert_model_parallel_size > 1 else args.tensor_model_parallel_size
    )


def _layer_parameters(model, args):
    """Parameters of a layer on a GPU: (those in linear layers of attention and MLP, those of experts, the others)."""
    tp, linears = args.tensor_model_parallel_size, _linears(model)
    norms = model.hidden_size * (4 if model.family.alternating else 2)
    dense = sum(a * b for name, (a, b) in linears.items() if name in ATTENTION or not model.num_experts) / tp
    if not model.num_experts:
        return dense, 0, norms
    shared = args.expert_model_parallel_size * _expert_tensor_size(args)
    experts = 3 * model.num_experts * model.hidden_size * model.moe_intermediate_size / shared
    return dense, experts, norms + model.hidden_size * model.num_experts


def _adapter_parameters(model, args):
    """Trained parameters of a layer's adapters on a GPU; experts in grouped products share one."""
    linears, rank = _linears(model), args.lora_rank or 8
    count = sum(rank * sum(linears[name]) for name in adapter_targets(args, model))
    if args.peft == "dora":
        count += sum(linears[name][1] for name in adapter_targets(args, model))
    return count / args.tensor_model_parallel_size


def state_bytes(args):
    """Bytes a trained parameter: (gradient, optimizer state, whether the state is spread over the replicas)."""
    if args.precision == "fp32":
        return 4, 8, not args.peft  # the parameters are their own float32 copy
    if not args.use_precision_aware_optimizer:
        return 4, 12, not args.peft
    # Of a float32 copy only the 16 bits that the bf16 weight lacks are kept.
    copy = (
        2 if (args.main_params_dtype or "fp32") == "fp32" and not args.fp8 else BYTES[args.main_params_dtype or "fp32"]
    )
    moments = BYTES[args.exp_avg_dtype or "fp32"] + BYTES[args.exp_avg_sq_dtype or "fp32"]
    return BYTES[args.main_grads_dtype or "fp32"], copy + moments, not args.peft


def step_bytes(args):
    """Bytes a parameter that Transformer Engine's Adam takes while that is stepped: it computes in float32."""
    if args.precision == "fp32" or not args.use_precision_aware_optimizer:
        return 0
    return 4 * sum(
        (getattr(args, name) or "fp32") != "fp32" for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    )


def weight_bytes(args):
    """Bytes a weight of a layer: FP8 keeps each twice, one of them transposed; block scaling, the bf16 one as well."""
    if args.precision == "fp32":
        return 4
    return 4 if args.fp8 and args.fp8_recipe == "subchannel_scaling" else 2


def sample_length(args):
    """Tokens of a sample: of a pack, where rows are packed; before they are, the most that a pack may have."""
    packs = getattr(args, "packs", None)
    return packs[0] if packs else getattr(args, "longest_pack", None) or args.seq_length


def _stage(model, args, stage):
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    world = args.num_nodes * args.num_gpus
    replicas = max(1, world // (tp * pp * cp))
    first, last = stage == 0, stage == pp - 1
    layers = model.num_hidden_layers / pp
    dense, experts, others = (layers * count for count in _layer_parameters(model, args))
    table = model.vocab_size * model.hidden_size / tp
    embeddings = table * (first + last - (first and last and model.tie_word_embeddings))
    others += embeddings + (model.hidden_size if last else 0)
    element = BYTES[args.precision]
    weights = weight_bytes(args) * (dense + experts) + element * others
    gradient, state, spread = state_bytes(args)
    if args.peft:
        trained = stepped = layers * _adapter_parameters(model, args)
        weights += element * trained
    else:
        trained = dense + experts + others
        over = replicas * cp if spread else 1
        over_experts = max(1, world // (pp * args.expert_model_parallel_size * _expert_tensor_size(args)))
        stepped = (dense + others) / over + experts / (over_experts if spread else 1)
    activations = _activations(model, args, stage, replicas)
    reserve = RESERVE["context"] + RESERVE["fragmentation"] * activations
    return Estimate(
        stage=stage,
        parameters=round(dense + experts + others + (trained if args.peft else 0)),
        trained=round(trained),
        weights=weights,
        gradients=gradient * trained,
        optimizer=state * stepped,
        activations=activations + placeholders(model, args, last),
        step=step_bytes(args) * min(stepped, max(STEPPED, table)),
        reserve=reserve + (RESERVE["communication"] if world > 1 else 0),
    )


def _layer(model, args, recomputed=()):
    """Bytes a token that one layer keeps from its forward pass for its backward pass."""
    tp, e = args.tensor_model_parallel_size, BYTES[args.precision]
    split = tp if args.sequence_parallel else 1
    linears = _linears(model)
    adapted, frozen = adapter_targets(args, model), bool(args.peft)
    hidden = e * model.hidden_size / split
    queries, qkv, up = linears["linear_proj"][0], linears["linear_qkv"][1], linears["linear_fc1"][1]
    # What a linear layer keeps of its input, for the gradient of its weight: nothing if that is frozen and has no
    # adapter; FP8 keeps 1 byte a value, but an adapter wants its input in bf16.
    kept = {
        name: e * (not frozen or name in adapted) * (0.5 if args.fp8 and not frozen else 1) for name in models.LINEAR
    }
    if args.fp8 and frozen:  # Transformer Engine keeps what an adapter's norm gives in bf16 once more in FP8
        kept |= {name: kept[name] + 1 for name in ("linear_qkv", "linear_fc1") if name in adapted}
    gathered = gathered_inputs(model, args)
    attention = hidden + kept["linear_qkv"] * model.hidden_size / split  # the norm's input and its output
    attention += gathered.get("linear_qkv", 0)
    attention += e * (qkv + queries) / tp  # queries, keys, values; the output, which is linear_proj's input
    attention += queries / tp if args.fp8 and not frozen else 0  # ... and once more in FP8
    if "core_attn" not in recomputed:
        scores = FP32_SCORES * sample_length(args) / args.context_parallel_size
        attention += (scores if args.precision == "fp32" else STATISTICS) * model.num_attention_heads / tp
    drop = bool(args.peft and args.lora_dropout)
    for name in adapted:  # between the two parts of an adapter; with dropout, its input once more and the mask
        inputs = linears[name][0] / (tp if name in ("linear_proj", "linear_fc2") else split)
        attention += e * (args.lora_rank or 8) + ((e + 1) * inputs if drop else 0)
    if model.num_experts:
        return attention + hidden + _experts(model, args, recomputed)
    mlp = kept["linear_fc1"] * model.hidden_size / split + gathered.get("linear_fc1", 0)
    mlp += e * up / tp + kept["linear_fc2"] * model.intermediate_size / tp
    return attention + hidden + (0 if "mlp" in recomputed else mlp)


def gathered_inputs(model, args):
    """Of all tokens' inputs that NeMo's adapters behind a norm keep beside this GPU's part: {layer: bytes a token}.

    Nothing by our own way of LoRA (lora.split_forward).
    """
    split = any(setting.name == "adapter split" for setting in performance.settings(args))
    if not args.sequence_parallel or split:
        return {}
    behind = {"linear_qkv", "linear_fc1"} & set(adapter_targets(args, model))
    return dict.fromkeys(behind, BYTES[args.precision] * model.hidden_size)


def _experts(model, args, recomputed):
    """Bytes a token of a layer's experts, if the router spreads the tokens evenly."""
    tp, e, etp = args.tensor_model_parallel_size, BYTES[args.precision], _expert_tensor_size(args)
    split = tp if args.sequence_parallel else 1
    norm = e * model.hidden_size / split  # the norm's output stays: the router and the experts read it
    if "moe" in recomputed:
        return norm
    router = 3 * 4 * model.num_experts / split  # logits, probabilities and the map, in float32
    rows = model.num_experts_per_tok / split * etp
    inner = model.moe_intermediate_size / etp
    row = e * 2 * inner + (0 if "moe_act" in recomputed else e * inner)  # before and behind the activation
    row += e * model.hidden_size * 2  # permuted input, and output before it is weighed and put back
    return norm + router + rows * row


def _activations(model, args, stage, replicas):
    """Bytes at the peak of a step."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    e, split = BYTES[args.precision], args.tensor_model_parallel_size if args.sequence_parallel else 1
    tokens = args.micro_batch_size * sample_length(args) / cp
    layers, whole = model.num_hidden_layers // pp, _layer(model, args)
    entry = e * model.hidden_size / split
    unit, chunk = 0, args.virtual_pipeline_model_parallel_size or 1
    if args.recompute == "full":
        size = args.recompute_num_layers or 1
        if (args.recompute_method or "uniform") == "uniform":
            size = min(size, layers // chunk)
            kept, unit = entry * -(-layers // size), whole * size
        else:
            size = min(size * chunk, layers)  # Megatron counts them in each virtual stage
            kept, unit = entry * size + whole * (layers - size), whole
    else:
        modules = recomputed_modules(args, model)
        kept = layers * _layer(model, args, modules)
        unit = whole - _layer(model, args, modules)
    micro_batches = max(1, args.global_batch_size // (args.micro_batch_size * replicas))
    if chunk > 1:  # Megatron's interleaved schedule: chunks of a micro batch that are under way
        under_way = min((pp - stage - 1) * 2 + (chunk - 1) * pp + 1, micro_batches * chunk) / chunk
    else:
        under_way = min(micro_batches, pp - stage)
    held = under_way * kept * tokens
    # The backward pass of the last layer: what is recomputed for it, gradients of its inner values, of one weight.
    widest = max(a * b for name, (a, b) in _linears(model).items() if name in ATTENTION or not model.num_experts)
    inner = model.intermediate_size * (3 if model.family.gated else 2) if not model.num_experts else 0
    weight = 0 if args.peft else e * widest / tp
    peaks = [held + (unit + e * inner / tp + entry) * tokens + weight]
    if stage == pp - 1:
        logits = model.vocab_size / tp
        head = held + (2 * entry + e * logits) * tokens  # the last norm's input and output, the logits
        table = 0 if args.peft else e * logits * model.hidden_size  # the output layer's gradient, before it is added
        peaks += [head + LOSS[_loss(args)] * logits * tokens, head + table]
    return max(peaks)


def placeholders(model, args, last):
    """Bytes of what Transformer Engine returns in place of gradients that it has added to their sum: one a shape.

    `last`: of the pipeline stage with the output layer.
    """
    summed = any(setting.name == "gradients" for setting in performance.settings(args))
    if not summed or model.family.architecture != "LlamaForCausalLM":  # see kernels.is_llama
        return 0
    shapes = {*_linears(model).values(), *([(model.hidden_size, model.vocab_size)] if last else [])}
    return 2 * sum(a * b for a, b in shapes) / args.tensor_model_parallel_size


def _loss(args):
    """Which cross entropy the recipe will have: see performance.SETTINGS and NeMo's own."""
    if args.performance != "off" and args.precision != "fp32":
        return "te"
    return "unfused" if args.peft else "native"


def checkpoint_bytes(model, args):
    """Bytes of a checkpoint: weights and, of what is trained, a float32 copy and two moments."""
    element = BYTES[args.precision]
    if not args.peft:
        return model.parameters * (element + 12)
    whole = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1}
    alone = type(args)(**vars(args) | whole)
    return model.num_hidden_layers * _adapter_parameters(model, alone) * (element + 12)

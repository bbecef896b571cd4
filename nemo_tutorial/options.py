"""The flags of the schedule, of memory and of adapters that the training scripts share, and which go together.

A flag that would change nothing is refused, with what it needs.
"""

from nemo_tutorial import arguments, memory, models, preflight, schedule

OPTIMIZER_DTYPES = {  # Megatron's names and what Transformer Engine's Adam takes
    "exp_avg_dtype": ("fp32", "bf16", "fp16", "fp8"),
    "exp_avg_sq_dtype": ("fp32", "bf16", "fp16", "fp8"),
    "main_params_dtype": ("fp32", "fp16"),
    "main_grads_dtype": ("fp32", "bf16"),
}


def fraction(text):
    """An argparse type: a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def add_schedule(parser):
    """How the learning rate falls; when checkpoints are written and the run ends early."""
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "--lr_decay",
        choices=schedule.DECAYS,
        default="cosine",
        help="after the warm-up; wsd: constant, then linear at the end [cosine]",
    )
    group.add_argument(
        "--lr_wsd_decay_steps",
        type=arguments.positive,
        metavar="STEPS",
        help="--lr_decay wsd: steps of the fall at the end [a fifth of the run]",
    )
    group.add_argument(
        "--save_interval",
        type=arguments.positive,
        metavar="STEPS",
        help="steps between checkpoints, a multiple of --val_check_interval [every validation]",
    )
    group.add_argument(
        "--early_stopping_patience",
        type=arguments.positive,
        metavar="VALIDATIONS",
        help="stop after so many validations in a row without a lower loss [never]",
    )


def add_memory(parser):
    """What is recomputed, and in which precision the optimizer keeps its state."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--gpu_memory",
        type=float,
        metavar="GIB",
        help="what a GPU has, for the estimate [that of the GPU found, else 80]",
    )
    group.add_argument(
        "--recompute",
        choices=("none", "selective", "full"),
        default="none",
        help="activations that are computed again instead of kept: none, some modules', whole layers' [none]",
    )
    group.add_argument(
        "--recompute_modules",
        nargs="+",
        choices=memory.MODULES,
        metavar="MODULE",
        help=f"--recompute selective: of {', '.join(memory.MODULES)} [mlp; with experts: moe]",
    )
    group.add_argument(
        "--recompute_method",
        choices=("uniform", "block"),
        help="--recompute full: all layers, in units; or only the first ones [uniform]",
    )
    group.add_argument(
        "--recompute_num_layers",
        type=arguments.positive,
        metavar="LAYERS",
        help="--recompute full: layers of a unit (uniform), or how many (block) [1]",
    )
    group.add_argument(
        "--use_precision_aware_optimizer",
        action="store_true",
        help="Transformer Engine's Adam with the four precisions below, without a whole float32 copy of the weights",
    )
    for name, choices in OPTIMIZER_DTYPES.items():
        group.add_argument(f"--{name}", choices=choices, help="needs --use_precision_aware_optimizer [fp32]")


def add_adapters(parser):
    """The shape of a LoRA or DoRA adapter."""
    group = parser.add_argument_group("adapters (--peft)")
    group.add_argument("--lora_rank", type=arguments.positive, help="[8]")
    group.add_argument("--lora_alpha", type=arguments.positive, help="the adapter counts alpha / rank [twice the rank]")
    group.add_argument("--lora_dropout", type=fraction, help="share of its inputs that is dropped in training [0]")
    group.add_argument(
        "--lora_target_modules",
        nargs="+",
        choices=models.LINEAR,
        metavar="LAYER",
        help=f"of {', '.join(models.LINEAR)} [all that can be merged]",
    )


def problems(args, model):
    """Which of these flags do not go together, with the model (None: not known) or with the hardware."""
    found = _schedule(args) + _recomputation(args, model) + _optimizer(args) + _layout(args, model)
    return found + (_adapters(args, model) if hasattr(args, "lora_rank") else [])


def _schedule(args):
    found = []
    if args.lr_wsd_decay_steps and args.lr_decay != "wsd":
        found.append(f"--lr_wsd_decay_steps {args.lr_wsd_decay_steps} has no effect without --lr_decay wsd; add it")
    if args.lr_decay == "constant" and args.min_lr is not None:
        found.append(f"--min_lr {args.min_lr} has no effect with --lr_decay constant; leave one out")
    if args.seed < 1:
        found.append(f"--seed {args.seed} is not above 0, as NeMo's seeds must be")
    if args.gpu_memory is not None and not args.gpu_memory > 0:
        found.append(f"--gpu_memory {args.gpu_memory} is not a number of GiB above 0")
    return found


def _recomputation(args, model):
    found = []
    for flag, granularity in (
        ("recompute_modules", "selective"),
        ("recompute_method", "full"),
        ("recompute_num_layers", "full"),
    ):
        value = getattr(args, flag)
        if value and args.recompute != granularity:
            value = " ".join(value) if isinstance(value, list) else value
            found.append(f"--{flag} {value} has no effect without --recompute {granularity}; add it")
    if model is None or found:
        return found
    modules = args.recompute_modules or ()
    for module in modules:
        if (module == "mlp") == bool(model.num_experts) and module != "core_attn":
            other = "moe" if model.num_experts else "mlp"
            has = "experts" if model.num_experts else "no experts"
            found.append(f"--recompute_modules {module}: the model has {has}; use {other}")
    if "moe" in modules and "moe_act" in modules:
        found.append("--recompute_modules moe_act has no effect beside moe, which holds it; leave it out")
    if "moe_act" in modules and args.accelerator == "cpu":
        found.append("--recompute_modules moe_act needs a GPU (grouped matrix products); use moe")
    stage = model.num_hidden_layers // args.pipeline_model_parallel_size
    stage //= args.virtual_pipeline_model_parallel_size or 1
    if (args.recompute_num_layers or 0) > max(1, stage):
        found.append(
            f"--recompute_num_layers {args.recompute_num_layers} is above the {stage} layers of a pipeline stage; "
            f"use {stage} or fewer"
        )
    return found


def _optimizer(args):
    found = []
    if not args.use_precision_aware_optimizer:
        for name in OPTIMIZER_DTYPES:
            if getattr(args, name):
                value = getattr(args, name)
                found.append(f"--{name} {value} has no effect without --use_precision_aware_optimizer; add it")
        return found
    flag = "--use_precision_aware_optimizer"
    if args.accelerator == "cpu":
        found.append(f"{flag} needs Transformer Engine, so a GPU: not in the no-GPU mode; leave it out")
    if args.precision == "fp32":
        found.append(f"{flag} and --precision fp32 exclude one another; leave one out")
    if args.peft:
        found.append(f"{flag}: an adapter's optimizer is not the distributed one, which that needs; leave it out")
    return found


def _layout(args, model):
    found = []
    pp, vp = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    flag = f"--virtual_pipeline_model_parallel_size {vp}"
    if vp and pp == 1:
        found.append(f"{flag} has no effect without --pipeline_model_parallel_size above 1; leave it out")
    elif vp == 1:
        found.append(f"{flag} has no effect: a stage is one part without it; use 2 or more, or leave it out")
    elif vp:
        layers = model.num_hidden_layers if model else 0
        if layers and layers % (pp * vp):
            sizes = [size for size in range(2, layers + 1) if layers % (pp * size) == 0]
            fit = f"use one of {', '.join(map(str, sizes))}" if sizes else "leave it out"
            found.append(f"{flag} x --pipeline_model_parallel_size {pp} does not divide the {layers} layers; {fit}")
        dp = preflight.data_parallel_size(args)
        micro_batches = args.global_batch_size // (args.micro_batch_size * dp)
        if micro_batches % pp:
            found.append(
                f"{flag}: Megatron then wants the micro batches of a step, {micro_batches}, to be a multiple of "
                f"--pipeline_model_parallel_size {pp}; use --global_batch_size "
                f"{preflight.below(args.global_batch_size, args.micro_batch_size * dp * pp)}"
            )
    etp = args.expert_tensor_parallel_size
    if etp:
        flag = f"--expert_tensor_parallel_size {etp}"
        gpus = args.num_nodes * args.num_gpus // pp
        free = gpus // args.expert_model_parallel_size or 1
        if model and not model.num_experts:
            found.append(f"{flag}: the model has no experts; leave the flag out")
        elif gpus % (etp * args.expert_model_parallel_size):
            found.append(
                f"{flag} x --expert_model_parallel_size {args.expert_model_parallel_size} does not divide the {gpus} "
                f"GPUs of a pipeline stage; use one of {preflight.divisors(free)}"
            )
        elif model and model.moe_intermediate_size % etp:
            found.append(
                f"{flag} does not divide the {model.moe_intermediate_size} inner values of an expert; "
                f"use one of {preflight.divisors(model.moe_intermediate_size, gpus)}"
            )
    return found


def _adapters(args, model):
    found = []
    if not args.peft:
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"):
            value = getattr(args, name)
            if value is not None:
                value = " ".join(value) if isinstance(value, list) else value
                found.append(f"--{name} {value} has no effect without --peft lora or dora; add it")
        return found
    for name in args.lora_target_modules or () if model else ():
        if name in models.NORM_INSIDE.get(model.family.architecture, ()):
            found.append(
                f"--lora_target_modules {name}: NeMo's {model.family.nemo_model} has a norm behind that layer, so the "
                "adapter could not be merged; use linear_qkv linear_fc1"
            )
    if args.lora_rank and args.lora_rank % args.tensor_model_parallel_size:
        found.append(
            f"--lora_rank {args.lora_rank} is not a multiple of --tensor_model_parallel_size "
            f"{args.tensor_model_parallel_size}; use {preflight.below(args.lora_rank, args.tensor_model_parallel_size)}"
        )
    return found

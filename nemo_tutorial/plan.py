"""What a run will need, said before it starts: memory of a GPU and what would make it fit, disk for its checkpoints."""

import argparse
import functools
import itertools
import math
import shutil
import subprocess
from pathlib import Path

from nemo_tutorial import checkpoints, memory, options, preflight, schedule, terminal

DEFAULT_MEMORY = 80  # GiB
# GiB, at most a tenth of it, that sizes which nobody asked for leave free: the estimate is off by up to 4 %, and the
# allocator keeps some. 8B in two replicas ran with 11 of 140 to spare (benchmarks/README.md).
SPARE = 8
TOKENS = 32_768  # a GPU at a time: from half of that on, hardly anything gets faster (benchmarks/README.md)


def choose_sizes(args, model):
    """Fill in TP, PP, CP and the micro batch size, so that `model` (or None) fits into the GPUs."""
    chosen = _choose_layout(args, model) + _choose_micro_batch_size(args, model)
    if chosen:
        print(f"not given, so chosen for {gpu_memory(args)[0]:.3g} GiB: {' '.join(chosen)}")


def _choose_layout(args, model):
    """TP, PP and CP: 1 where another is given, else the first layout that fits. Returns what was chosen, as words.

    First those that leave the most replicas: each split costs communication in every layer, where a replica costs it
    once a step. Among equals TP, within a node, before CP and PP. If none fits, 1 x 1 x 1.
    """
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    given = any(getattr(args, name) for name in names)
    for name in names:
        setattr(args, name, getattr(args, name) or 1)
    if given or model is None:
        return []
    world = args.num_nodes * args.num_gpus
    layouts = itertools.product(
        [size for size in (1, 2, 4, 8) if size <= args.num_gpus],
        [size for size in range(1, model.num_hidden_layers + 1) if model.num_hidden_layers % size == 0],
        # Rows are packed as long as nobody asks for CP.
        [1] if getattr(args, "packing", False) is not False else [1, 2, 4, 8],
    )
    for layout in sorted(layouts, key=lambda sizes: (math.prod(sizes), *sizes[1:])):
        change = dict(zip(names, layout))
        if world % math.prod(layout) == 0 and _fits(args, model, change):
            for name, size in change.items():
                setattr(args, name, size)
            return [] if layout == (1, 1, 1) else ["-T {} -P {} -C {}".format(*layout)]
    return []


def _choose_micro_batch_size(args, model):
    """The micro batch size: 1, in pretraining on GPUs doubled for as long as it fits. Returns the choice, as words.

    Not of instruction rows: a pack is a micro batch of one (see `longest_pack`), and rows that are not packed are
    padded to the longest beside them, the more the more there are.
    """
    given, args.micro_batch_size = args.micro_batch_size, args.micro_batch_size or 1
    if given or model is None or not _may_grow(args, model) or hasattr(args, "packing"):
        return []
    replicas, size = preflight.data_parallel_size(args), 2
    while (
        size * args.seq_length <= TOKENS * args.context_parallel_size
        and args.global_batch_size % (size * replicas) == 0
        and args.global_batch_size // (size * replicas) >= preflight.least_micro_batches(args)
        and _fits(args, model, {"micro_batch_size": size})
    ):
        args.micro_batch_size, size = size, 2 * size
    return [f"-m {args.micro_batch_size}"] if args.micro_batch_size > 1 else []


def longest_pack(args, model):
    """Tokens that a pack of instruction rows may have: --seq_length, on GPUs doubled for as long as it fits."""
    if args.packed_sequence_size:
        return args.packed_sequence_size
    size = args.seq_length
    while _may_grow(args, model) and 2 * size <= TOKENS and _fits(args, model, {"longest_pack": 2 * size}):
        size *= 2
    return size


def _may_grow(args, model):
    """Whether more tokens at a time make anything faster, and what they take is known: a CPU's caches are small, and
    what experts take depends on how evenly the router spreads the tokens.
    """
    return args.accelerator == "gpu" and not model.num_experts


def _fits(args, model, change):
    """Whether flags with `change`, which nobody asked for, pass the rules and fit into a GPU with some to spare."""
    changed = argparse.Namespace(**vars(args) | change)
    changed.micro_batch_size = changed.micro_batch_size or 1
    if changed.sequence_parallel is None:
        changed.sequence_parallel = changed.tensor_model_parallel_size > 1
    if any(_rules(changed, model)):
        return False
    limit = gpu_memory(args)[0]
    return memory.estimate(model, changed).total <= (limit - min(SPARE, limit / 10)) * memory.GIB


def gpu_memory(args):
    """GiB of a GPU, and where that number is from: --gpu_memory, the smallest GPU found here, or the default."""
    if args.gpu_memory:
        return args.gpu_memory, "--gpu_memory"
    tool = shutil.which("nvidia-smi") if args.executor == "local" else None
    found = _smallest_gpu(tool) if tool else None
    return (found, "found here") if found else (DEFAULT_MEMORY, "assumed; --gpu_memory says otherwise")


@functools.cache
def _smallest_gpu(tool):
    """GiB of the smallest GPU that this nvidia-smi lists, or None; asked once a start."""
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = [line for line in subprocess.run(query, capture_output=True, text=True).stdout.split() if line.isdigit()]
    return min(map(int, found)) / 1024 if found else None


def gib(size):
    """Bytes -> '16.1 GiB'."""
    return f"{size / memory.GIB:.1f} GiB"


def describe_memory(args, model):
    """Print what the fullest GPU will hold, against what it has, and the first change that would make it fit."""
    estimate, (limit, source) = memory.estimate(model, args), gpu_memory(args)
    fits = estimate.total <= limit * memory.GIB
    trained = (
        "" if estimate.trained == estimate.parameters else f", {terminal.number(estimate.trained)} of them trained"
    )
    stages = args.pipeline_model_parallel_size
    rows = [
        ("weights", f"{gib(estimate.weights)}, {terminal.number(estimate.parameters)} parameters{trained}"),
        ("gradients", gib(estimate.gradients)),
        (
            "optimizer",
            gib(estimate.optimizer)
            + (f", and {gib(estimate.step)} while it steps, in place of the activations" if estimate.step else ""),
        ),
        ("activations", f"{gib(estimate.activations)} at the peak, recomputed: {recomputed(args, model)}"),
        ("reserve", f"{gib(estimate.reserve)} for CUDA" + (", NCCL" if args.num_nodes * args.num_gpus > 1 else "")),
        (
            "together",
            f"{gib(estimate.total)} of {limit:.3g} GiB ({source}): "
            + ("fits" if fits else "DOES NOT FIT")
            + (f"; the fullest is pipeline stage {estimate.stage + 1} of {stages}" if stages > 1 else ""),
        ),
    ]
    if not fits:
        rows.append(
            ("would fit", fitting(args, model, limit) or "no change of the flags that was tried; use more GPUs")
        )
    where = "each GPU" if args.accelerator == "gpu" else "each GPU, if there were any"
    terminal.describe(f"memory of {where} (estimate)", rows)


def recomputed(args, model):
    """What --recompute and its flags stand for."""
    if args.recompute == "selective":
        return " ".join(memory.recomputed_modules(args, model))
    if args.recompute == "full":
        return f"layers, {args.recompute_method or 'uniform'} {args.recompute_num_layers or 1}"
    return "nothing"


def fitting(args, model, limit):
    """The first change of the flags with which the estimate is below `limit` GiB, as words to add; or None.

    Cheapest first: what costs little speed, then what shares a layer among GPUs, last what changes the numbers.
    """
    for change in _changes(args, model):
        changed = argparse.Namespace(**vars(args) | change)
        if changed.sequence_parallel is None or "tensor_model_parallel_size" in change:
            changed.sequence_parallel = changed.tensor_model_parallel_size > 1
        if _possible(changed, model):
            total = memory.estimate(model, changed).total
            if total <= limit * memory.GIB:
                return f"{_words(change)} ({gib(total)})"
    return None


def _changes(args, model):
    """Changes to try, the first first: each alone, then with smaller micro batches and all layers recomputed."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    gpus = args.num_gpus * args.num_nodes
    small = [{"micro_batch_size": size} for size in (8, 4, 2, 1) if size < args.micro_batch_size]
    selective = {"recompute": "selective", "recompute_modules": None}
    full = {
        "recompute": "full",
        "recompute_modules": None,
        "recompute_method": None,
        "recompute_num_layers": None,
    }
    again = [] if args.recompute == "full" else [full] if args.recompute == "selective" else [selective, full]
    tensor = [{"tensor_model_parallel_size": tp * times} for times in (2, 4, 8) if tp * times <= args.num_gpus]
    context = [{"context_parallel_size": cp * times} for times in (2, 4, 8)]
    pipeline = [{"pipeline_model_parallel_size": pp * times} for times in (2, 4, 8, 16)]
    lean = {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": "bf16",
        "exp_avg_dtype": "bf16",
        "exp_avg_sq_dtype": "bf16",
    }
    yield from small + again
    if gpus > tp * pp * cp:  # else there is nothing to spread over
        yield from tensor + context + pipeline
    least = (small[-1] if small else {}) | (full if again else {})
    if least:
        yield least
        yield from (least | change for change in tensor + context + pipeline if gpus > tp * pp * cp)
    yield from (least | first | second for first in tensor for second in pipeline)
    yield lean
    yield least | lean
    yield from (least | lean | first for first in tensor + pipeline)
    if hasattr(args, "lora_rank") and not args.peft:
        for change in ({}, least):
            yield change | {"peft": "lora"}


def _possible(args, model):
    """Whether flags, as they would be after a change, pass the rules of layout, model and options."""
    if args.use_precision_aware_optimizer and args.accelerator == "cpu":
        args.accelerator = "gpu"  # the plan of a GPU run, made where there is none
    if getattr(args, "packing", False) and args.context_parallel_size > 1:
        return False
    return not preflight.layout_problems(args) and not any(_rules(args, model))


def _rules(args, model):
    """The problems of a layout with the model and its options."""
    return preflight.model_problems(args, model), options.problems(args, model), preflight.sequence_problems(args)


def _words(change):
    return " ".join(
        f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items() if value is not None
    )


def disk(args, model):
    """(bytes of the checkpoints at their most, bytes free where they will lie, sentence)."""
    one = memory.checkpoint_bytes(model, args)
    kept = min(args.save_top_k + 2, -(-args.max_steps // args.save_interval))  # the last, and one that is being written
    folder = Path("results", args.experiment).absolute()
    have = sum(checkpoints.size(path) for path in (folder / "checkpoints").glob("*") if not path.is_symlink())
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    need = max(0, one * kept - have)
    words = f"{kept} x {terminal.gigabytes(one)} = {terminal.gigabytes(one * kept)} at most"
    words += f", of which {terminal.gigabytes(have)} are there" if have else ""
    return need, free, f"{words}; {terminal.gigabytes(free)} free" + ("" if need <= free else ": NOT ENOUGH")


def disk_problems(args, model):
    """Whether the checkpoints that will be kept have room; asked before a run, not of a plan."""
    need, free, words = disk(args, model)
    if need <= free or args.dry_run:
        return []
    return [f"--save_top_k {args.save_top_k}: the checkpoints need {words}; free some, or keep fewer"]


def learning_rates(args):
    """First, peak, half and last learning rate, in words."""
    steps = (0, args.warmup_steps, args.max_steps // 2, args.max_steps - 1)
    rates = [
        schedule.learning_rate(
            step, args.lr, args.min_lr, args.warmup_steps, args.max_steps, args.lr_decay, args.lr_wsd_decay_steps
        )
        for step in steps
    ]
    return "first {:.3g}, peak {:.3g}, half {:.3g}, last {:.3g}".format(*rates)

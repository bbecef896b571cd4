"""What can be found wrong before NeMo is imported: one function a rule, each returning its problems.

A problem is a sentence for the user: the flag, the value, what is wrong, the next command.
"""

import importlib.util
import json
import math
import os
import shutil
import subprocess
from pathlib import Path

from nemo_tutorial import blends, checkpoints, models, network, prompts, slurm, terminal


def report(problems):
    """Print all problems and exit 2, if there are any."""
    problems = list(dict.fromkeys(problem for problem in problems if problem))
    if problems:
        terminal.fail(problems)


def gpus_here():
    """Number of GPUs that this machine shows to a job."""
    if not shutil.which("nvidia-smi"):
        return 0
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, len([d for d in visible.split(",") if d.strip()]))


def fill_hardware(args):
    """Set args.accelerator and args.num_gpus where the user did not; return the problems."""
    if args.executor == "slurm":
        args.accelerator = args.accelerator or "gpu"
        args.num_gpus = args.num_gpus or (8 if args.accelerator == "gpu" else 1)
        return []
    found = gpus_here()
    args.accelerator = args.accelerator or ("gpu" if found else "cpu")
    if args.accelerator == "cpu":
        args.num_gpus = args.num_gpus or 1
        return []
    args.num_gpus = args.num_gpus or found or 1
    if args.num_gpus > found and args.dry_run is None:
        return [f"--num_gpus {args.num_gpus}: this machine shows {found}; use --num_gpus {max(1, found)}"]
    return []


def data_parallel_size(args):
    """Copies of the model: GPUs / (TP * PP * CP)."""
    model_parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    return max(1, args.num_nodes * args.num_gpus // model_parallel)


def least_micro_batches(args):
    """Of a GPU in a step, to aim for: a pipeline is busy only while there are some for all of its stages."""
    stages = args.pipeline_model_parallel_size
    return 4 * stages if stages > 1 else 1


def divisors(*numbers):
    """What divides all `numbers`, as text: '1, 2, 4'."""
    common = math.gcd(*numbers)
    return ", ".join(str(size) for size in range(1, min(common, 1024) + 1) if common % size == 0)


def layout_problems(args):
    """Parallel sizes against the number of GPUs, and batch sizes against the data parallel size."""
    world = args.num_nodes * args.num_gpus
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if world % (tp * pp * cp):
        return [
            f"--tensor_model_parallel_size {tp} x --pipeline_model_parallel_size {pp} x --context_parallel_size {cp} "
            f"= {tp * pp * cp} does not divide the {world} GPUs (--num_nodes {args.num_nodes} x --num_gpus "
            f"{args.num_gpus}); the product must be one of {divisors(world)}"
        ]
    dp = data_parallel_size(args)
    problems = []
    if args.global_batch_size % (args.micro_batch_size * dp):
        multiple = args.micro_batch_size * dp
        fit = max(multiple, args.global_batch_size // multiple * multiple)
        problems.append(
            f"--global_batch_size {args.global_batch_size} is not a multiple of --micro_batch_size "
            f"{args.micro_batch_size} x data parallel size {dp}; use --global_batch_size {fit}"
        )
    if args.sequence_parallel and tp == 1:
        problems.append("--sequence_parallel needs --tensor_model_parallel_size above 1")
    return problems


def model_problems(args, model):
    """Heads, KV groups, layers and vocabulary against the parallel sizes, and --model_size against the checkpoint."""
    problems = []
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    sizes = {
        "attention heads": model.num_attention_heads,
        "KV groups": model.num_key_value_heads,
        "vocabulary rows": model.vocab_size,
    }
    for name, value in sizes.items():
        if value % tp:
            problems.append(
                f"--tensor_model_parallel_size {tp} does not divide the model's {value} {name}; "
                f"use one of {divisors(*sizes.values())}"
            )
    layers = model.num_hidden_layers
    if layers % pp:
        problems.append(
            f"--pipeline_model_parallel_size {pp} does not divide the {layers} layers; use one of {divisors(layers)}"
        )
    problems += expert_problems(args, model) + window_problems(args, model)
    if args.model_size:
        try:
            asked = models.parse_size(args.model_size)
        except ValueError as error:
            return [*problems, f"--model_size: {error}"]
        # Sizes are names: Llama-3.2-1B has 1.24 B parameters, Llama-2-7B 6.74 B.
        if not 0.7 < model.parameters / asked < 1.4:
            problems.append(
                f"--model_size {args.model_size}: {model.source} has {terminal.number(model.parameters)} parameters; "
                "leave the flag out, or name another checkpoint"
            )
    return problems


def expert_problems(args, model):
    """Expert parallelism against the number of experts and of GPUs."""
    ep, tp, pp = args.expert_model_parallel_size, args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if not model.num_experts:
        return [f"--expert_model_parallel_size {ep}: the model has no experts; leave the flag out"] if ep > 1 else []
    problems = []
    if model.num_experts % ep:
        problems.append(
            f"--expert_model_parallel_size {ep} does not divide the model's {model.num_experts} experts; "
            f"use one of {divisors(model.num_experts)}"
        )
    gpus = args.num_nodes * args.num_gpus // pp
    if gpus % ep:
        problems.append(
            f"--expert_model_parallel_size {ep} does not divide the {gpus} GPUs of a pipeline stage; "
            f"use one of {divisors(gpus, model.num_experts)}"
        )
    if tp > 1 and not args.sequence_parallel:
        problems.append(
            f"--no_sequence_parallel with --tensor_model_parallel_size {tp}: Megatron trains experts only with "
            "sequence parallelism; leave the flag out"
        )
    return problems


def window_problems(args, model):
    """What NeMo's own attention of Gemma 2 can't do: longer samples than its window, context parallelism, packing."""
    if not model.family.alternating:
        return []
    problems = []
    if args.seq_length > (model.sliding_window or args.seq_length):
        # Megatron counts layers from 1, and NeMo gives the window to the even ones: transformers' odd ones.
        problems.append(
            f"--seq_length {args.seq_length} is above the model's window of {model.sliding_window} tokens, which "
            f"NeMo's {model.family.nemo_model} has in the wrong layers; use --seq_length {model.sliding_window}"
        )
    if args.context_parallel_size > 1:
        problems.append(
            f"--context_parallel_size {args.context_parallel_size}: NeMo's {model.family.nemo_model} can't do that; "
            "leave the flag out"
        )
    return problems


def below(number, multiple):
    """The largest multiple of `multiple` that is at most `number`, or `multiple` itself."""
    return max(multiple, number // multiple * multiple)


def sequence_problems(args):
    """Sequence length against context parallelism, sequence parallelism and FP8."""
    problems = []
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    if cp > 1 and args.seq_length % (2 * cp):
        problems.append(
            f"--seq_length {args.seq_length} is not a multiple of 2 x --context_parallel_size {cp}; "
            f"use {below(args.seq_length, 2 * cp)}"
        )
    if cp > 1 and args.accelerator == "cpu":
        problems.append(
            f"--context_parallel_size {cp} needs Transformer Engine, so a GPU: not in the no-GPU mode; "
            "use --context_parallel_size 1"
        )
    elif cp > 1 and args.precision == "fp32":
        problems.append(
            f"--context_parallel_size {cp} and --precision fp32 exclude one another: attention by CP "
            "is Transformer Engine's of 16 bits; leave one out"
        )
    if tp > 1 and args.seq_length // cp % tp:
        problems.append(
            f"--seq_length {args.seq_length} / CP {cp} is not a multiple of TP {tp}; "
            f"use {below(args.seq_length, 2 * cp * tp)}"
        )
    if args.fp8 and args.accelerator == "cpu":
        problems.append("--fp8 needs a GPU: not in the no-GPU mode; leave it out")
    if args.fp8 and args.precision == "fp32":
        problems.append("--fp8 and --precision fp32 exclude one another; leave one out")
    if args.fp8 and args.seq_length % 16:
        problems.append(
            f"--seq_length {args.seq_length} is not a multiple of 16, which --fp8 needs; "
            f"use {below(args.seq_length, 16)}"
        )
    if args.fp8_recipe and not args.fp8:
        problems.append(f"--fp8_recipe {args.fp8_recipe} has no effect without --fp8; add it")
    return problems


def schedule_problems(args):
    """Learning rate, warm-up and intervals against the number of steps; needs args.max_steps."""
    problems = []
    if not 0 < args.lr < math.inf:
        problems.append(f"--lr {args.lr} is not a number above 0")
    elif not 0 <= args.min_lr <= args.lr:
        problems.append(f"--min_lr {args.min_lr} is not between 0 and --lr {args.lr}")
    if not 0 <= args.warmup_steps < max(1, args.max_steps):
        problems.append(f"--warmup_steps {args.warmup_steps} is not below the {args.max_steps} steps of the run")
    if args.val_check_interval > args.max_steps:
        problems.append(
            f"--val_check_interval {args.val_check_interval} is above the {args.max_steps} steps: never reached"
        )
    if args.save_interval % args.val_check_interval:
        problems.append(
            f"--save_interval {args.save_interval} is not a multiple of --val_check_interval "
            f"{args.val_check_interval}, and checkpoints are written after validations"
        )
    if (args.lr_wsd_decay_steps or 0) > args.max_steps - args.warmup_steps:
        problems.append(
            f"--lr_wsd_decay_steps {args.lr_wsd_decay_steps} is above the {args.max_steps - args.warmup_steps} steps "
            "after the warm-up"
        )
    if args.exit_interval and args.exit_interval % args.val_check_interval:
        problems.append(
            f"--exit_interval {args.exit_interval} is not a multiple of --val_check_interval "
            f"{args.val_check_interval}, and checkpoints are written after validations"
        )
    return problems


def execution_problems(args):
    """What --executor needs, and flags that it would ignore."""
    problems = []
    if not args.experiment or "/" in args.experiment or args.experiment.startswith("."):
        problems.append(f"--experiment {args.experiment!r} is not a plain name")
    if args.check_network is None:
        args.check_network = args.num_nodes > 1
    if args.executor == "slurm":
        found = slurm.problems(args)
        if not found and args.dry_run is None and not shutil.which("sbatch"):
            found = ["--executor slurm: there is no sbatch here; run this on the cluster's login node"]
        problems += found or (slurm.refused(args, args.experiment) if args.dry_run is None else [])
    if args.executor == "local":
        for flag in slurm.OPTIONS:
            if getattr(args, flag) and flag in ("account", "partition", "container_image"):  # the tutorial's own
                terminal.warn(f"--{flag} {getattr(args, flag)} has no effect with --executor local")
            elif getattr(args, flag) not in (None, False) or (flag == "exclusive" and args.exclusive is False):
                problems.append(f"--{flag} has no effect with --executor local; leave it out, or use --executor slurm")
        if args.num_nodes > 1 and args.dry_run is None:
            problems += network.environment_problems(args.num_nodes)
    if not args.wandb:
        for flag in ("wandb_project", "wandb_name"):
            if getattr(args, flag):
                terminal.warn(f"--{flag} {getattr(args, flag)} has no effect without --wandb")
    return problems + logger_problems(args)


def logger_problems(args):
    """What --wandb and --mlflow need on this machine; on Slurm the container has it or not."""
    problems = []
    for flag, package, asked in (("wandb", "wandb", args.wandb), ("mlflow", "mlflow", args.mlflow is not None)):
        if asked and args.executor == "local" and args.dry_run is None and not importlib.util.find_spec(package):
            install = "mlflow-skinny" if package == "mlflow" else package
            problems.append(f"--{flag}: the package {package} is not there; pip install {install}, or leave it out")
    if "@" in (args.mlflow or ""):
        problems.append(
            "--mlflow: a name or password in the address would be kept in the run's files; export "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and leave it out of --mlflow"
        )
    return problems


def fault_problems(args):
    """Flags of faults against where the run is."""
    problems = []
    if args.max_restarts and (args.executor != "local" or args.num_nodes > 1):
        problems.append(
            f"--max_restarts {args.max_restarts}: only with --executor local on one node; leave it out"
            + ("; a Slurm job that is started again goes on by itself" if args.executor == "slurm" else "")
        )
    if args.max_loss_spike is not None and not 1 < args.max_loss_spike < math.inf:
        problems.append(f"--max_loss_spike {args.max_loss_spike} is not a factor above 1")
    return problems


def checkpoint_problems(flag, path):
    """Whether `path` is a complete NeMo 2 checkpoint that can be trained on or exported."""
    problem = checkpoints.problem(path)
    if problem and models.is_hub_id(str(path)):
        problem += "; import it first: python convert_ckpt/convert_from_hf_to_nemo.py"
    return [f"{flag}: {problem}"] if problem else []


def output_problems(args, inputs=()):
    """--output_path must not exist (or --overwrite), nor hold or lie in an input."""
    output = Path(args.output_path)
    problems = []
    if output.exists() and not args.overwrite:
        problems.append(f"--output_path {output} exists; choose another, or replace it with --overwrite")
    if output.exists() and args.overwrite and not output.is_dir():
        problems.append(f"--output_path {output} is a file, not a folder; choose another")
    here, resolved = Path.cwd(), output.resolve()
    if resolved == here or resolved in here.parents:
        problems.append(f"--output_path {output} is, or holds, the current folder; choose a new folder")
    for path in inputs:
        source = Path(path).resolve()
        if resolved == source or resolved in source.parents or source in resolved.parents:
            problems.append(f"--output_path {output} and the source {path} lie in one another; choose a new folder")
    if not problems and output.is_dir() and not _made_by_us(output):
        problems.append(f"--overwrite: {output} is no checkpoint, model or data that we write; choose another")
    return problems


def _made_by_us(folder):
    """Whether a folder is a NeMo checkpoint, a Hugging Face model, instruction data, or empty."""
    signs = ("weights", "context", "config.json", "adapter_config.json", "training.jsonl")
    return any((folder / sign).exists() for sign in signs) or not any(folder.iterdir())


def disk_problems(folder, needed, what):
    """Whether the disk that will hold `folder` has `needed` bytes free."""
    folder = Path(folder).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        return [f"{what} needs {terminal.gigabytes(needed)}, the disk of {folder} has {terminal.gigabytes(free)} free"]
    return []


def pretraining_data(args):
    """Read the datasets of --dataset_path: (blend or None, problems)."""
    try:
        blend = blends.read(args.dataset_path, args.split)
    except ValueError as error:
        return None, error.args[0]
    return blend, blends.split_problems(blend, args.seq_length)


def finetuning_data(folder):
    """Read training.jsonl and validation.jsonl: ({name: rows}, problems). Every line is checked."""
    rows, problems = {}, []
    folder = Path(folder)
    if not folder.is_dir():
        hint = "run python finetuning/download_split_data.py first"
        return rows, [f"--dataset_path {folder} is not a folder; {hint}"]
    for name in ("training", "validation"):
        file = folder / f"{name}.jsonl"
        if not file.is_file():
            problems.append(f"--dataset_path: {file} is missing; run python finetuning/download_split_data.py first")
            continue
        count, problem = count_rows(file, prompts.row_problem)
        rows[name] = count
        if problem:
            problems.append(f"--dataset_path: {problem}")
    return rows, problems


def count_rows(file, row_problem):
    """Count the rows of a JSONL file: (rows, first problem or None), the latter as `row_problem`(row) finds it."""
    count = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                problem = row_problem(json.loads(line))
            except ValueError as error:
                return count, f"{file}:{number} is not JSON ({error}); mend or remove the line"
            if problem:
                return count, f"{file}:{number} {problem}"
            count += 1
    return count, None if count else f"{file} is empty"

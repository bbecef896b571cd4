"""Tune a NeMo checkpoint on instructions: all weights (SFT), or a LoRA or DoRA adapter.

From the repository root, on one node with 8 GPUs:

    python finetuning/finetune.py --num_gpus 8 --tensor_model_parallel_size 2 \\
        --nemo_model nemo_ckpt/Llama-3.1-8B-Instruct --dataset_path data/alpaca \\
        --max_steps 100 --global_batch_size 128 --peft lora

--dataset_path holds training.jsonl and validation.jsonl, a row a line: {"input": ..., "output": ...}.
The run lies in results/<experiment>. The same command again goes on where it stopped.
"""

import sys
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, preflight, prompts, runs, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    arguments.add_execution(parser, experiment="llama31_finetuning")
    arguments.add_model(parser)
    arguments.add_training(parser, global_batch_size=128)
    arguments.add_parallelism(parser)
    parser.add_argument("-D", "--dataset_path", required=True, help="folder of training.jsonl and validation.jsonl")
    parser.add_argument(
        "--prompt_template", help="text with {input} and, last, {output} [the tokenizer's chat template]"
    )
    parser.add_argument(
        "--packed_sequence_size",
        type=arguments.positive,
        metavar="TOKENS",
        help="pack rows into samples of this length [not packed]",
    )
    parser.add_argument("--peft", type=str.lower, choices=("lora", "dora"), help="train an adapter [all weights]")
    arguments.add_logging(parser)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 1e-4 if args.peft else 5e-6  # NeMo's own for adapters; the tutorial's for all weights
    return args


def derive_data(args):
    """Steps an epoch and validation batches from the rows: (rows, steps an epoch, problems)."""
    rows, problems = preflight.finetuning_data(args.dataset_path, prompts.KEYS)
    problems += prompts.template_problems(args.prompt_template)
    if args.packed_sequence_size:
        problems += packing_problems(args)
    training, validation = rows.get("training", 0), rows.get("validation", 0)
    if not problems and validation < args.global_batch_size:
        # NeMo drops an unfilled validation batch: nothing would be validated, without a word.
        problems.append(
            f"--global_batch_size {args.global_batch_size} is above the {validation} rows of "
            f"{args.dataset_path}/validation.jsonl, which would never fill a batch; use a smaller one"
        )
    epoch = training // args.global_batch_size
    if not problems and args.max_steps is None and epoch == 0:
        problems.append(
            f"--global_batch_size {args.global_batch_size} is above the {training} training rows; "
            "set --max_steps, or use a smaller batch"
        )
    if not problems:
        args.max_steps = args.max_steps or epoch
    batches = max(1, validation // args.global_batch_size)
    args.limit_val_batches = min(args.limit_val_batches or 32, batches)
    return rows, epoch, problems


def peft_problems(args):
    """What NeMo trains wrongly."""
    if args.peft == "dora" and args.tensor_model_parallel_size > 1:
        return [
            f"--peft dora with --tensor_model_parallel_size {args.tensor_model_parallel_size}: NeMo takes the norms of "
            "each rank's part of a weight for those of the whole; use --tensor_model_parallel_size 1, or --peft lora"
        ]
    return []


def packing_problems(args):
    """What NeMo's packing needs; where it can't be, it is refused rather than dropped."""
    problems = []
    if args.accelerator == "cpu":
        problems.append("--packed_sequence_size needs Transformer Engine, so a GPU: not in the no-GPU mode")
    if args.micro_batch_size > 1:
        problems.append(
            f"--packed_sequence_size needs --micro_batch_size 1, not {args.micro_batch_size}: "
            "a packed sample is a batch already"
        )
    if args.context_parallel_size > 1:
        problems.append("--packed_sequence_size with --context_parallel_size above 1 is wrong in every NeMo 2")
    return problems


def build_recipe(args, model, source):
    """NeMo's recipe for the nearest size, with what the flags and the task change."""
    import nemo_run as run
    from nemo.collections import llm
    from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs

    from nemo_tutorial import adapters, recipes

    recipe = recipes.start(model.recipe, "finetune_recipe", args)
    inside = adapters.NORM_INSIDE.get(model.family.architecture)
    if args.peft and inside:  # else the adapter could be neither merged nor exported
        recipe.peft.target_modules = [name for name in adapters.LINEAR if name not in inside]
    recipes.set_model(recipe, args, *source.config_and_tokenizer())
    template = prompts.template(args.prompt_template, recipe.model.tokenizer)
    prompts.remove_stale_indexes(args.dataset_path)
    prompts.show_sample(args, template, recipe.model.tokenizer)
    packing = {}
    if args.packed_sequence_size:
        # Named after all that decides the packing: NeMo's own name would find last week's with another template.
        name = prompts.fingerprint(args, template)
        packing["packed_sequence_specs"] = run.Config(
            PackedSequenceSpecs, packed_sequence_size=args.packed_sequence_size, tokenizer_model_name=name
        )
    recipe.data = run.Config(
        llm.FineTuningDataModule,
        dataset_root=str(Path(args.dataset_path).absolute()),
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        tokenizer=recipe.model.tokenizer,
        seed=args.seed,
        num_workers=args.num_workers,
        dataset_kwargs=prompts.dataset_kwargs(template),
        **packing,
    )
    recipe.tokenizer = "data"
    recipes.set_parallelism(recipe, args)
    recipes.set_training(recipe, args)
    recipes.set_precision(recipe, args)
    recipes.set_checkpointing(recipe, args, source.resume_from, source.restore_from)
    recipes.set_wandb(recipe, args)
    return recipe


def main(argv=None):
    args = parse_args(argv)
    problems = runs.hardware_problems(args)
    source, model, found = runs.weights(args, fallback="newest")
    problems += found + runs.model_problems(args, model) + peft_problems(args)
    rows, epoch, found = derive_data(args)
    problems += found
    if args.max_steps:
        problems += runs.schedule_problems(args)
    preflight.report(problems)

    runs.describe(args, model, source)
    terminal.describe(
        "data",
        [
            ("rows", f"{rows['training']:,} training, {rows['validation']:,} validation"),
            ("steps an epoch", epoch if not args.packed_sequence_size else "fewer than the rows: they are packed"),
            ("prompt", args.prompt_template or "the tokenizer's chat template"),
            ("validation", f"{args.limit_val_batches} batches every {args.val_check_interval} steps"),
        ],
    )
    runs.start(args, "finetuning", source, lambda: build_recipe(args, model, source))


if __name__ == "__main__":
    main()

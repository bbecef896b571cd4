"""Tune a NeMo checkpoint on instructions: all weights (SFT), or a LoRA or DoRA adapter.

From the repository root, on one node with 8 GPUs:

    python finetuning/finetune.py --num_gpus 8 --tensor_model_parallel_size 2 \\
        --nemo_model nemo_ckpt/Llama-3.1-8B-Instruct --dataset_path data/alpaca \\
        --max_steps 100 --global_batch_size 128 --peft lora

--dataset_path holds training.jsonl and validation.jsonl, a row a line: {"input": ..., "output": ...}, or
{"messages": [{"role": ..., "content": ...}, ...]}; the tokenizer's chat template writes them.
The run lies in results/<experiment>. The same command again goes on where it stopped.
"""

import argparse
import math
import sys
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, instructions, options, packing, plan, preflight, prompts, runs, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    arguments.add_execution(parser, experiment="llama31_finetuning")
    arguments.add_model(parser)
    arguments.add_training(parser, global_batch_size=128)
    options.add_schedule(parser)
    options.add_memory(parser)
    arguments.add_faults(parser)
    arguments.add_parallelism(parser)
    parser.add_argument("-D", "--dataset_path", required=True, help="folder of training.jsonl and validation.jsonl")
    parser.add_argument(
        "--prompt_template",
        type=prompts.unescaped,
        help="text with {input} and, last, {output}; {system} too [the tokenizer's chat template]",
    )
    parser.add_argument(
        "--system_prompt", type=prompts.unescaped, help="system message of the rows that have none of their own [none]"
    )
    parser.add_argument(
        "--packing", action="store_true", default=None, help="several rows in a sample, each for itself [on]"
    )
    parser.add_argument("--no_packing", action="store_false", dest="packing", default=None, help="one row a sample")
    parser.add_argument(
        "--packed_sequence_size",
        type=arguments.positive,
        metavar="TOKENS",
        help="length of a pack [the most that fit, from --seq_length to 32,768, or so much shorter that a step has "
        "--global_batch_size rows]",
    )
    parser.add_argument(
        "--overlong",
        choices=("drop", "truncate", "error"),
        default="drop",
        help="rows of more than --seq_length tokens are left out, cut, or stop the command [drop]",
    )
    parser.add_argument(
        "--show_samples",
        type=arguments.positive,
        metavar="ROWS",
        help="print the first rows as the model gets them, the part with loss marked [1]",
    )
    parser.add_argument("--peft", type=str.lower, choices=("lora", "dora"), help="train an adapter [all weights]")
    options.add_adapters(parser)
    arguments.add_logging(parser)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 1e-4 if args.peft else 5e-6  # NeMo's own for adapters; the tutorial's for all weights
    return args


def packing_problems(args, model):
    """Decide on packing: where it can't be, it is off with a word, but refused if it was asked for by name."""
    flag = "--packed_sequence_size" if args.packed_sequence_size else "--packing"
    asked = args.packing or args.packed_sequence_size
    if args.packed_sequence_size and args.packing is False:
        return ["--no_packing and --packed_sequence_size exclude one another; leave one out"]
    reason, cure = None, "leave one out"
    if model and model.family.alternating:
        reason, cure = f"NeMo's {model.family.nemo_model}, whose attention takes no packs", "leave it out"
    elif args.context_parallel_size > 1:
        reason = "--context_parallel_size above 1: every NeMo 2 cuts a pack wrongly there"
    elif args.precision == "fp32" and args.accelerator == "gpu":
        reason = "--precision fp32 on a GPU: Transformer Engine's attention there takes no packs of NeMo's"
    elif args.micro_batch_size > 1:
        reason = f"--micro_batch_size {args.micro_batch_size}: a pack is a micro batch already, of one"
    if reason and asked:
        return [f"{flag} does not go with {reason}; {cure}"]
    multiple = math.lcm(packing.MULTIPLE, args.tensor_model_parallel_size)
    if args.packed_sequence_size and args.packed_sequence_size % multiple:
        return [
            f"--packed_sequence_size {args.packed_sequence_size} is not a multiple of {multiple}; "
            f"use {preflight.below(args.packed_sequence_size, multiple)}"
        ]
    if reason and args.packing is None:
        print(f"packing is off, because of {reason}")
    args.packing = args.packing is not False and not reason
    args.longest_pack = plan.longest_pack(args, model) if args.packing and model else None
    return []


def schedule_problems(args, rows_or_samples, batch):
    """Fill in the steps from what an epoch has, and what follows from them; check them."""
    epoch = rows_or_samples // batch
    if args.max_steps is None and epoch == 0:
        return [
            f"--global_batch_size {args.global_batch_size} is above what one epoch of training.jsonl has; "
            "set --max_steps, or use a smaller batch"
        ]
    args.max_steps = args.max_steps or epoch
    return runs.schedule_problems(args)


def prepare(args, source):
    """The prepared rows, with what was derived from them filled in."""
    args.show_samples = args.show_samples or 1
    # A run that goes on keeps its packs, whatever it goes on with: else it would see rows twice, and others never.
    began = runs.record(runs.folder(args)).get("starts", [{}])[-1].get("flags", {}) if source.resume_from else {}
    same = all(
        began.get(name) == getattr(args, name) for name in ("seq_length", "global_batch_size", "packed_sequence_size")
    )
    try:
        data = instructions.prepare(args, source.tokenizer_folder(), began.get("packs") if same else None)
    except ValueError as error:
        terminal.fail([str(error)])
    preflight.report(schedule_problems(args, data.facts["training"]["samples"], data.batch))
    args.limit_val_batches = min(args.limit_val_batches or 32, data.validation_batches)
    runs.stop_if_finished(args)
    files = [Path(args.dataset_path) / f"{name}.jsonl" for name in ("training", "validation")]
    preflight.report(runs.change_problems(args, source, files))
    args.packs = [data.pack_size, data.batch] if args.packing else None  # kept in the run's record
    return data


def estimate(args, rows):
    """What can be said before the rows are prepared: (arguments with the schedule filled in, problems)."""
    args = argparse.Namespace(**vars(args))
    training, validation = rows["training"], rows["validation"]
    problems = schedule_problems(args, training, args.global_batch_size)
    if not args.packing and validation < args.global_batch_size:
        # NeMo drops an unfilled validation batch: nothing would be validated, without a word.
        problems.append(
            f"--global_batch_size {args.global_batch_size} is above the {validation} rows of "
            f"{args.dataset_path}/validation.jsonl, which would never fill a batch; use a smaller one"
        )
    args.limit_val_batches = min(args.limit_val_batches or 32, max(1, validation // args.global_batch_size))
    return args, problems


def describe(args, model, source, rows, data):
    """Print what was derived; before the rows are prepared (`data` is None) some of it is an estimate."""
    if data is None:
        size = (Path(args.dataset_path) / "training.jsonl").stat().st_size / instructions.BYTES_A_TOKEN
        tokens = size / rows["training"] * args.global_batch_size
        step = f"about {terminal.number(round(tokens))} in {args.global_batch_size} rows, before the rows are prepared"
        runs.describe(args, model, source, step)
        terminal.describe(
            "data, before the rows are prepared",
            [
                ("from", args.dataset_path),
                ("rows", f"{rows['training']:,} training, {rows['validation']:,} validation"),
                ("tokens", f"about {terminal.number(round(size))}, {instructions.BYTES_A_TOKEN} bytes each"),
                ("packing", f"on, packs of up to {args.longest_pack}" if args.packing else "off"),
                ("steps an epoch", rows["training"] // args.global_batch_size),
                ("prompt", args.prompt_template or "the tokenizer's chat template"),
                ("validation", f"{args.limit_val_batches} batches every {args.val_check_interval} steps"),
            ],
        )
        return
    training, validation = data.facts["training"], data.facts["validation"]
    tokens = training["tokens"] / training["rows"]
    dp = preflight.data_parallel_size(args)
    packs = f"{data.batch} packs of {data.pack_size}, with " if args.packing else ""
    micro_batches = data.batch // (args.micro_batch_size * dp)
    step = (
        f"about {data.rows_a_step * tokens:,.0f} = {packs}{data.rows_a_step:.4g} rows of {tokens:.4g}; "
        f"{micro_batches} micro batches a GPU"
    )
    runs.describe(args, model, source, step)
    seen = validation["rows"] if args.packing else data.validation_batches * data.batch
    terminal.describe(
        "data",
        [
            ("from", args.dataset_path),
            ("rows", f"{training['rows']:,} training, {validation['rows']:,} validation"),
            ("tokens", f"{training['tokens']:,}, {training['loss'] / training['tokens']:.1%} with loss"),
            ("longest row", f"{training['longest']} of {args.seq_length} tokens"),
            (
                "packs",
                f"{training['samples']:,} of {data.pack_size} tokens, {training['fill']:.2%} full, "
                f"{training['rows'] / training['samples']:.4g} rows each"
                if args.packing
                else "none: one row a sample",
            ),
            ("prepared in", data.folder),
            ("steps an epoch", data.steps_an_epoch),
            ("epochs", f"{args.max_steps / max(1, training['samples'] / data.batch):.2f}"),
            (
                "validation",
                f"{args.limit_val_batches} batches every {args.val_check_interval} steps; "
                f"{seen:,} rows are {data.validation_batches} batches",
            ),
        ],
    )


def peft_problems(args):
    """What NeMo trains wrongly."""
    if args.peft == "dora" and args.tensor_model_parallel_size > 1:
        return [
            f"--peft dora with --tensor_model_parallel_size {args.tensor_model_parallel_size}: NeMo takes the norms of "
            "each rank's part of a weight for those of the whole; use --tensor_model_parallel_size 1, or --peft lora"
        ]
    return []


def build_recipe(args, model, source, data):
    """NeMo's recipe for the nearest size, with what the flags and the task change."""
    import nemo_run as run
    from nemo.collections import llm
    from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs

    from nemo_tutorial import recipes, tuning_data

    recipe = recipes.start(model.recipe, "finetune_recipe", args)
    recipes.set_adapter(recipe, args, model)
    config, tokenizer = source.config_and_tokenizer()
    if data.chat_template:  # kept with every checkpoint, so that an exported model is asked in the same words
        tokenizer = prompts.write_tokenizer(tokenizer, runs.folder(args) / "nemo_tokenizer", data.chat_template)
    recipes.set_model(recipe, args, config, tokenizer)
    folder, specs, kwargs = data.folder.absolute(), {}, {}
    if args.packing:
        specs["packed_sequence_specs"] = run.Config(
            PackedSequenceSpecs,
            packed_sequence_size=data.pack_size,
            packed_train_data_path=str(folder / "training.npy"),
            packed_val_data_path=str(folder / "validation.npy"),
            packed_metadata_path=str(folder / "metadata.json"),
        )
    else:
        kwargs["return_cu_seqlen"] = False  # a causal mask instead: the samples are rows, not packs
        # What context and sequence parallelism can divide.
        kwargs["pad_seq_length_to_mult"] = math.lcm(
            16, 2 * args.context_parallel_size * args.tensor_model_parallel_size
        )
    recipe.data = run.Config(
        llm.FineTuningDataModule if args.packing else tuning_data.UnpackedRows,
        dataset_root=str(folder),
        seq_length=args.seq_length,
        global_batch_size=data.batch,
        micro_batch_size=args.micro_batch_size,
        tokenizer=recipe.model.tokenizer,
        seed=args.seed,
        num_workers=args.num_workers,
        dataset_kwargs=kwargs,
        **specs,
    )
    recipe.tokenizer = "data"
    recipes.set_parallelism(recipe, args)
    recipes.set_token_loss(recipe)
    recipes.set_logging(recipe, args, model)  # before the training's, whose callbacks may end a run after a step
    recipes.set_training(recipe, args)
    recipes.set_precision(recipe, args)
    recipes.set_memory(recipe, args, model)
    recipes.set_performance(recipe, args)
    recipes.set_checkpointing(recipe, args, source.restore_from)
    return recipe


def main(argv=None):
    args = parse_args(argv)
    source, model, found = runs.weights(args, fallback="newest")
    problems = runs.hardware_problems(args, model) + found + runs.model_problems(args, model) + peft_problems(args)
    rows, found = preflight.finetuning_data(args.dataset_path)
    problems += found + prompts.template_problems(args.prompt_template, args.system_prompt)
    problems += packing_problems(args, model)
    planned = args
    if not problems:
        planned, problems = estimate(args, rows)
    preflight.report(problems or plan.disk_problems(planned, model))
    runs.stop_if_finished(planned)

    data = None
    if args.dry_run == "plan":
        args = planned
    else:
        data = prepare(args, source)
    describe(args, model, source, rows, data)
    if args.dry_run == "plan" and args.show_samples:
        try:
            instructions.preview(args, source.tokenizer_folder(), args.show_samples)
        except ValueError as error:
            terminal.fail([str(error)])
    runs.start(args, "finetuning", source, lambda: build_recipe(args, model, source, data))


if __name__ == "__main__":
    main()

"""Continue the pretraining of a NeMo checkpoint on your own text, or start from random weights.

From the repository root, on one node with 8 GPUs:

    python pretraining/pretrain.py --num_gpus 8 --tensor_model_parallel_size 2 \\
        --nemo_model nemo_ckpt/Llama-3.1-8B-Instruct \\
        --dataset_path data/custom_dataset/preprocessed --max_steps 100 --global_batch_size 2048

The run lies in results/<experiment>. The same command again goes on where it stopped.
"""

import sys
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, blends, megatron_data, options, plan, preflight, runs, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    arguments.add_execution(parser, experiment="llama31_pretraining")
    arguments.add_model(parser)
    arguments.add_training(parser, global_batch_size=2048)
    options.add_schedule(parser)
    options.add_memory(parser)
    arguments.add_faults(parser)
    arguments.add_parallelism(parser)
    parser.add_argument(
        "-D",
        "--dataset_path",
        nargs="+",
        required=True,
        metavar="DATA",
        help="folders or prefixes of .bin and .idx files, a weight before each if wanted; or a blend file (YAML)",
    )
    parser.add_argument("--split", help="shares of each source for training, validation, test [998,1,0]")
    arguments.add_logging(parser)
    args = parser.parse_args(argv)
    args.peft = None
    args.lr = 1e-5 if args.lr is None else args.lr
    return args


def derive_data(args):
    """Steps and validation batches from the data: (blend or None, steps an epoch, problems)."""
    blend, problems = preflight.pretraining_data(args)
    if blend is None:
        return None, 0, problems
    train, validation = (sum(part.tokens for part in blend.parts[number]) for number in (0, 1))
    epoch = megatron_data.steps_per_epoch(train, args.seq_length, args.global_batch_size)
    if args.max_steps is None and epoch == 0:
        problems.append(
            f"--dataset_path: {train} training tokens are less than one step of --global_batch_size "
            f"{args.global_batch_size} x --seq_length {args.seq_length}; set --max_steps or a smaller batch"
        )
    batches = megatron_data.steps_per_epoch(validation, args.seq_length, args.global_batch_size)
    args.limit_val_batches = args.limit_val_batches or min(32, max(1, batches))
    if not problems:
        args.max_steps = args.max_steps or epoch
    return blend, epoch, problems


def build_recipe(args, model, source, blend):
    """NeMo's recipe for the nearest size, with what the flags and the task change."""
    import nemo_run as run
    from nemo.collections import llm

    from nemo_tutorial import recipes

    recipe = recipes.start(model.recipe, "pretrain_recipe", args)
    recipes.set_model(recipe, args, *source.config_and_tokenizer())
    recipe.data = run.Config(
        llm.PreTrainingDataModule,
        paths=blend.paths(),
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        tokenizer=recipe.model.tokenizer,
        split=blend.split,
        seed=args.seed,
        num_workers=args.num_workers,
        index_mapping_dir=str(blends.index_folder(blend, args).absolute()),
    )
    recipes.set_parallelism(recipe, args)
    recipes.set_logging(recipe, args, model)  # before the training's, whose callbacks may end a run after a step
    recipes.set_training(recipe, args)
    recipes.set_precision(recipe, args)
    recipes.set_memory(recipe, args, model)
    recipes.set_performance(recipe, args)
    recipes.set_checkpointing(recipe, args, source.restore_from)
    return recipe


def main(argv=None):
    args = parse_args(argv)
    source, model, found = runs.weights(args, fallback=None)
    problems = runs.hardware_problems(args, model) + found + runs.model_problems(args, model)
    blend, epoch, found = derive_data(args)
    problems += found or runs.data_tokenizer_problems(blend.prefixes(), source)
    if args.max_steps:
        problems += runs.schedule_problems(args)
    preflight.report(problems)
    runs.stop_if_finished(args)
    preflight.report(runs.change_problems(args, source, blend.files()))
    preflight.report(blends.plan(blend, args) + plan.disk_problems(args, model))

    runs.describe(args, model, source)
    train = sum(part.tokens for part in blend.parts[0])
    terminal.describe(
        "data",
        [
            ("training tokens", f"{train:,}"),
            ("steps an epoch", f"{epoch:,}"),
            ("epochs", f"{args.max_steps * args.global_batch_size * args.seq_length / train:.2f}"),
            ("validation", f"{args.limit_val_batches} batches every {args.val_check_interval} steps"),
        ],
    )
    blends.describe(blend, args)
    runs.start(args, "pretraining", source, lambda: build_recipe(args, model, source, blend), blends.build_index)


if __name__ == "__main__":
    main()

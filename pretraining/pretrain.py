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

from nemo_tutorial import arguments, megatron_data, preflight, runs, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    arguments.add_execution(parser, experiment="llama31_pretraining")
    arguments.add_model(parser)
    arguments.add_training(parser, global_batch_size=2048)
    arguments.add_parallelism(parser)
    parser.add_argument("-D", "--dataset_path", required=True, help="folder of .bin and .idx files, or one prefix")
    parser.add_argument("--split", default="998,1,0", help="shares for training, validation, test [998,1,0]")
    arguments.add_logging(parser)
    args = parser.parse_args(argv)
    args.peft = None
    args.lr = 1e-5 if args.lr is None else args.lr
    return args


def derive_data(args):
    """Steps an epoch and validation batches from the data: (training tokens, steps an epoch, problems)."""
    indices, problems = preflight.pretraining_data(args)
    if problems:
        return 0, 0, problems
    shares = [megatron_data.split_tokens(index, args.split) for index in indices]
    train, validation = sum(share[0] for share in shares), sum(share[1] for share in shares)
    epoch = megatron_data.steps_per_epoch(train, args.seq_length, args.global_batch_size)
    if min(share[0] for share in shares) <= args.seq_length:
        problems.append(
            f"--dataset_path: a training share holds {train} tokens, less than one sample of "
            f"--seq_length {args.seq_length} needs; add data, or use a shorter --seq_length"
        )
    if args.max_steps is None and epoch == 0:
        problems.append(
            f"--dataset_path: {train} training tokens are less than one step of --global_batch_size "
            f"{args.global_batch_size} x --seq_length {args.seq_length}; set --max_steps or a smaller batch"
        )
    batches = megatron_data.steps_per_epoch(validation, args.seq_length, args.global_batch_size)
    args.limit_val_batches = args.limit_val_batches or min(32, max(1, batches))
    if not problems:
        args.max_steps = args.max_steps or epoch
    return train, epoch, problems


def build_recipe(args, model, source):
    """NeMo's recipe for the nearest size, with what the flags and the task change."""
    import nemo_run as run
    from nemo.collections import llm

    from nemo_tutorial import recipes

    recipe = recipes.start(model.recipe, "pretrain_recipe", args)
    recipes.set_model(recipe, args, *source.config_and_tokenizer())
    recipe.data = run.Config(
        llm.PreTrainingDataModule,
        paths=[str(Path(prefix).absolute()) for prefix in megatron_data.prefixes(args.dataset_path)],
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        tokenizer=recipe.model.tokenizer,
        split=args.split,
        seed=args.seed,
        num_workers=args.num_workers,
        index_mapping_dir=str(Path("results", args.experiment, "index_mapping").absolute()),
    )
    recipes.set_parallelism(recipe, args)
    recipes.set_training(recipe, args)
    recipes.set_precision(recipe, args)
    recipes.set_checkpointing(recipe, args, source.resume_from, source.restore_from)
    recipes.set_wandb(recipe, args)
    return recipe


def main(argv=None):
    args = parse_args(argv)
    problems = runs.hardware_problems(args)
    source, model, found = runs.weights(args, fallback=None)
    problems += found + runs.model_problems(args, model)
    train_tokens, epoch, found = derive_data(args)
    problems += found or runs.data_tokenizer_problems(megatron_data.prefixes(args.dataset_path), source)
    if args.max_steps:
        problems += runs.schedule_problems(args)
    preflight.report(problems)

    runs.describe(args, model, source)
    terminal.describe(
        "data",
        [
            ("training tokens", f"{train_tokens:,}"),
            ("steps an epoch", f"{epoch:,}"),
            ("epochs", f"{args.max_steps / epoch:.2f}" if epoch else "less than one step an epoch"),
            ("validation", f"{args.limit_val_batches} batches every {args.val_check_interval} steps"),
        ],
    )
    runs.start(args, "pretraining", source, lambda: build_recipe(args, model, source))


if __name__ == "__main__":
    main()

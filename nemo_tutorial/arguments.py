"""The flags that the scripts share, in groups; each script's parse_args is its table of contents."""

import argparse
import difflib
import os
import re
import sys

from nemo_tutorial import config, overrides

EXECUTORS = ("local", "slurm")
FP8_RECIPES = ("delayed_scaling", "current_scaling", "subchannel_scaling", "mxfp8")


class Parser(argparse.ArgumentParser):
    """argparse with whole flag names only, `-` and `_` alike, and errors that say what to type instead."""

    def __init__(self, doc, **kwargs):
        super().__init__(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs
        )

    def parse_args(self, argv=None):
        from_command_line = argv is None
        argv = list(sys.argv[1:] if argv is None else argv)
        changes, recipe = [], None
        if "--config" in self._option_string_actions:
            try:
                argv, changes, recipe = self._configured(argv)
            except ValueError as error:
                self.error(str(error))
        argv = [_underscored(arg) for arg in argv]
        # Before argparse: it would say that a required flag is missing, not that it is misspelt.
        names = [arg.split("=")[0] for arg in argv if arg.startswith("--")]
        unknown = [name for name in names if " " not in name and name not in self._option_string_actions]
        if not unknown:
            args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error("; ".join(self._suggest(arg) for arg in unknown))
        if from_command_line:
            _hide_secrets(args)
        if "--config" in self._option_string_actions:
            args.overrides, args.recipe = changes, recipe
            args.written = config.flags(args, self)  # before anything is filled in
        return args

    def _configured(self, argv):
        """A command with --config FILE's flags before its own: (words, overrides of the recipe, FILE's recipe or None).

        Raises ValueError with all that is wrong in the file and in the overrides.
        """

        def takes_value(word):
            action = self._option_string_actions.get(_underscored(word))
            return action is not None and action.nargs not in (0, "?")

        argv, changes = overrides.split(argv, takes_value)
        path = None
        for number, word in enumerate(argv):
            name, equals, value = _underscored(word).partition("=")
            if name == "--config":
                path = value if equals else (argv[number + 1 : number + 2] or [None])[0]
        words, file_changes, recipe = config.read(path, self) if path else ([], [], None)
        known = [action.dest for action in self._actions]
        first, others, problems = overrides.as_flags(file_changes, known)
        last, more, wrong = overrides.as_flags(changes, known)
        if recipe is not None:
            problems += self._not_in_recipe([*first, *argv, *last], path)
        if problems + wrong:
            raise ValueError("\n".join(problems + wrong))
        return [*words, *first, *argv, *last], others + more, recipe

    def _not_in_recipe(self, argv, path):
        """The flags of a command that would not change the recipe of --config FILE."""
        actions = [(word, self._option_string_actions.get(_underscored(word).split("=")[0])) for word in argv]
        return [
            f"{word}: {path} holds a whole recipe, which that flag does not change; remove `recipe:` from the file, or "
            "change the recipe at the end of the command: KEY=VALUE"
            for word, action in actions
            if action is not None and word.startswith("-") and action.dest not in config.STARTED
        ]

    def _suggest(self, arg):
        if not arg.startswith("-"):
            return f"{arg!r} is not understood: it belongs to no flag"
        near = difflib.get_close_matches(arg.split("=")[0], self._option_string_actions, n=1)
        return f"{arg} is not a flag of {self.prog}" + (f"; did you mean {near[0]}?" if near else "")

    def error(self, message):
        print(f"error: {message}\nall flags: python {sys.argv[0]} --help", file=sys.stderr)
        sys.exit(2)


def _underscored(arg):
    """--max-steps=5 -> --max_steps=5; values and short flags stay as they are."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _hide_secrets(args):
    """Move a token given as a flag into the environment, and start over without it, so that `ps` shows none."""
    secrets = {"--hf_token": "HF_TOKEN", "--wandb_token": "WANDB_API_KEY"}
    kept, words = [], iter(sys.argv[1:])
    for word in words:
        flag, equals, value = _underscored(word).partition("=")
        if flag not in secrets:
            kept.append(word)
            continue
        value = value if equals else next(words, "")
        if value and not value.startswith("<"):  # <HF_TOKEN> is the README's placeholder
            os.environ[secrets[flag]] = value
        print(
            f"warning: {flag} shows the token to everyone on this machine; export {secrets[flag]}=... instead",
            file=sys.stderr,
        )
    if len(kept) < len(sys.argv) - 1:
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, sys.argv[0], *kept])


def positive(text):
    """An argparse type: a whole number above 0."""
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text):
    """An argparse type: a whole number, 0 or above."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def file_size(text):
    """An argparse type: a size of files as Hugging Face writes it, such as 5GB."""
    if not re.fullmatch(r"[1-9]\d*(K|M|G|T)B", text.strip().upper()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of files; write it like 5GB or 500MB")
    return text.strip().upper()


def add_dry_run(parser):
    """--dry_run: say what was derived, and stop."""
    parser.add_argument(
        "--dry_run",
        nargs="?",
        const="plan",
        choices=("plan", "full"),
        help="print what was derived and stop; 'full' also imports NeMo and prints the recipe and the launch text",
    )


def add_output(parser, what):
    """--output_path and --overwrite, for a script that writes one folder."""
    parser.add_argument("--output_path", required=True, help=f"where to write {what}; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace --output_path once the new one is complete")


def add_verify(parser):
    """--verify: how a conversion is checked before its output appears."""
    parser.add_argument(
        "--verify",
        choices=("tensors", "logits", "none"),
        default="tensors",
        help="compare every tensor, bit by bit, as read back from disk; 'logits' also runs both models [tensors]",
    )


def add_trust(parser):
    """--trust_checkpoint: for a script that loads a NeMo checkpoint."""
    parser.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help="load a NeMo checkpoint even if it would run more than NeMo's do; whoever made it can run anything here",
    )


def add_execution(parser, experiment):
    """Where the job runs: this machine (torchrun) or Slurm; and --config, with what may end the command."""
    parser.epilog = (
        "At the end, KEY=VALUE changes the recipe in NeMo-Run's syntax: trainer.log_every_n_steps=5 "
        "optim.config.weight_decay=0.01"
    )
    group = parser.add_argument_group("execution")
    group.add_argument(
        "--config", metavar="FILE", help="YAML of these flags, and perhaps a whole recipe; flags given here come first"
    )
    group.add_argument("--executor", choices=EXECUTORS, default="local", help="local (torchrun) or slurm [local]")
    group.add_argument("-E", "--experiment", default=experiment, help=f"name; the run is results/NAME [{experiment}]")
    group.add_argument("-N", "--num_nodes", type=positive, default=1, help="nodes [1]")
    group.add_argument(
        "-G", "--num_gpus", type=positive, help="GPUs a node, or processes without GPUs [those found; slurm: 8]"
    )
    group.add_argument(
        "--accelerator", choices=("gpu", "cpu"), help="cpu is the no-GPU mode [gpu if there is one; slurm: gpu]"
    )
    # Not BooleanOptionalAction, as for --sequence_parallel below.
    group.add_argument(
        "--check_network",
        action="store_true",
        default=None,
        help="the nodes find one another, and add right, before weights are loaded [on with more than one node]",
    )
    group.add_argument("--no_check_network", action="store_false", dest="check_network", default=None)
    add_slurm(parser)
    add_dry_run(parser)


def add_slurm(parser):
    """The job that --executor slurm submits; absent flags are filled in by slurm.fill."""
    group = parser.add_argument_group("slurm")
    group.add_argument("-a", "--account", help="[SLURM_ACCOUNT, or the cluster's default]")
    group.add_argument("-p", "--partition", help="[SLURM_PARTITION, or the cluster's default]")
    group.add_argument("--qos", help="[the cluster's default]")
    group.add_argument("--time", help="time limit of one job [1-00:00:00]")
    group.add_argument("--gres", help="none where the cluster has no GRES [gpu:NUM_GPUS; without GPUs none]")
    group.add_argument("--mem", help="memory a node [all with --exclusive, else the cluster's default]")
    group.add_argument(
        "--exclusive", action="store_true", default=None, help="whole nodes [on with several nodes, or 8 GPUs]"
    )
    group.add_argument("--no_exclusive", action="store_false", dest="exclusive", default=None)
    group.add_argument("--constraint", help="features that the nodes must have")
    group.add_argument("--nodelist", help="nodes that must be among them")
    group.add_argument("-i", "--container_image", help="NeMo container image [CONTAINER_IMAGE]")
    group.add_argument(
        "--container", choices=("pyxis", "apptainer", "none"), help="[pyxis with --container_image, else none]"
    )
    group.add_argument(
        "--mount", action="append", metavar="SRC[:DST]", help="also in the container; again for each [the folder, ours]"
    )
    group.add_argument(
        "--setup", action="append", metavar="LINE", help="shell code before the ranks, like 'source env/bin/activate'"
    )
    group.add_argument("--env", action="append", metavar="NAME", help="variable that the job must have; its name only")
    group.add_argument("--srun_arg", action="append", metavar="OPTION", help="as --srun_arg=--cpu-bind=cores")
    group.add_argument("--sbatch_arg", action="append", metavar="KEY=VALUE", help="as --sbatch_arg mail-type=END")
    group.add_argument("--wait", action="store_true", help="follow the log; exit with the job's code")
    group.add_argument(
        "--chain", type=positive, metavar="JOBS", help="submit so many, one after another, instead of requeueing [1]"
    )
    group.add_argument(
        "--save_before",
        type=positive,
        metavar="SECONDS",
        help="before the time limit: save, requeue, go on [600, at most a sixth of --time, at least 60]",
    )


def add_model(parser):
    """Which model, and from which weights."""
    group = parser.add_argument_group("model")
    group.add_argument("-M", "--model_size", help="checked against the checkpoint, like 8B [read from it]")
    group.add_argument("--hf_model_id", help="Hugging Face id or folder: the shape and tokenizer to start from scratch")
    group.add_argument("--hf_token", help="better: export HF_TOKEN, or log in with `hf auth login`")
    group.add_argument(
        "-n", "--nemo_model", nargs="?", const="", help="NeMo checkpoint; bare: the newest pretraining checkpoint"
    )
    group.add_argument("-s", "--seq_length", type=positive, help="tokens a sample [8192, or the model's if shorter]")
    add_trust(group)


def add_training(parser, global_batch_size):
    """Steps, batch and learning rate."""
    group = parser.add_argument_group("training")
    group.add_argument("--max_steps", type=positive, help="optimizer steps of the whole run [one epoch]")
    group.add_argument(
        "--exit_interval",
        type=positive,
        metavar="STEPS",
        help="save and stop at every multiple of this; the same command goes on [never]",
    )
    group.add_argument(
        "-g",
        "--global_batch_size",
        type=positive,
        default=global_batch_size,
        help=f"samples a step, over all GPUs [{global_batch_size}]",
    )
    group.add_argument(
        "-m",
        "--micro_batch_size",
        type=positive,
        help="samples a GPU at a time [1; pretraining on GPUs, without experts: as many as fit, up to 32,768 tokens]",
    )
    group.add_argument("--lr", type=float, help="peak learning rate")
    group.add_argument("--min_lr", type=float, help="learning rate at the end [a tenth of --lr]")
    group.add_argument("--warmup_steps", type=int, help="steps of linear warm-up [a tenth of the run, at most 2000]")
    group.add_argument(
        "--val_check_interval",
        type=positive,
        metavar="STEPS",
        help="steps between validations; each ends with a checkpoint [a fifth of the run]",
    )
    group.add_argument("--limit_val_batches", type=positive, help="batches a validation [32, or all if fewer]")
    group.add_argument("--save_top_k", type=positive, default=2, help="checkpoints kept, by validation loss [2]")
    group.add_argument(
        "--keep_optimizer",
        choices=("all", "last"),
        default="all",
        help="last: older checkpoints lose their optimizer state, most of their size [all]",
    )
    group.add_argument("--seed", type=int, default=1234, help="seed of the data order and of new weights [1234]")
    group.add_argument("--num_workers", type=int, default=2, help="data loader processes a GPU [2]")
    group.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="[bf16]")
    group.add_argument("--fp8", action="store_true", help="FP8 matrix products (needs an H100 or newer)")
    group.add_argument("--fp8_recipe", choices=FP8_RECIPES, help="how FP8 values are scaled [delayed_scaling]")
    group.add_argument(
        "--performance", choices=("auto", "off"), default="auto", help="off: NeMo's own settings of speed [auto]"
    )


def add_faults(parser):
    """What a run may not do when it goes on, and what happens when it fails."""
    group = parser.add_argument_group("going on and faults")
    group.add_argument("--fresh", action="store_true", help="refuse to go on: the run must not exist yet")
    group.add_argument(
        "--allow_change", action="store_true", help="go on although data, tokenizer, model or schedule have changed"
    )
    group.add_argument(
        "--hang_timeout",
        type=positive,
        default=90,
        metavar="SECONDS",
        help="without a micro batch's end a rank hangs, and all are ended [90]",
    )
    group.add_argument(
        "--max_restarts", type=natural, default=0, metavar="N", help="local: starts again after a failure [0]"
    )
    group.add_argument(
        "--max_loss_spike",
        type=float,
        metavar="FACTOR",
        help="stop when a loss is this many times the mean of the 20 steps before [never]",
    )


def add_parallelism(parser):
    """How the model is laid over the GPUs."""
    group = parser.add_argument_group(
        "parallelism",
        "chosen: where none of -T, -P and -C is given, the first layout that fits into the GPUs' memory; else 1",
    )
    group.add_argument("-T", "--tensor_model_parallel_size", type=positive, help="GPUs that share each layer [chosen]")
    group.add_argument(
        "-P", "--pipeline_model_parallel_size", type=positive, help="GPUs that share the layers out [chosen]"
    )
    group.add_argument("-C", "--context_parallel_size", type=positive, help="GPUs that share each sample [chosen]")
    group.add_argument(
        "--virtual_pipeline_model_parallel_size",
        type=positive,
        metavar="PARTS",
        help="parts of each pipeline stage, worked on in turn, so that GPUs wait less [one]",
    )
    group.add_argument(
        "--expert_model_parallel_size", type=positive, default=1, help="mixtures of experts: GPUs that share them [1]"
    )
    group.add_argument(
        "--expert_tensor_parallel_size",
        type=positive,
        help="mixtures of experts: GPUs that share each one [1 where GPUs share them; else as all layers]",
    )
    # Not BooleanOptionalAction: its --no-sequence_parallel would be out of reach, because `-` becomes `_`.
    group.add_argument(
        "--sequence_parallel",
        action="store_true",
        default=None,
        help="split the norms' activations too [on with TP above 1]",
    )
    group.add_argument("--no_sequence_parallel", action="store_false", dest="sequence_parallel", default=None)


def add_logging(parser):
    """The log's interval, what the model says, Weights & Biases, MLflow; TensorBoard is always written."""
    group = parser.add_argument_group("logging")
    group.add_argument(
        "--log_interval",
        type=positive,
        metavar="STEPS",
        help="steps between lines of the log and values of the loggers [10, in short runs a hundredth of the steps]",
    )
    group.add_argument(
        "--generate_prompts",
        metavar="FILE",
        help="write what the model says to these prompts at each validation: rows as for training, or a text a line",
    )
    group.add_argument(
        "--generate_tokens", type=positive, help="longest answer to each of --generate_prompts, in tokens [32]"
    )
    group.add_argument("--wandb", action="store_true", help="log to Weights & Biases as well")
    group.add_argument("--wandb_project", help="[the experiment's name]")
    group.add_argument("--wandb_name", help="[the experiment's name]")
    group.add_argument("--wandb_token", help="better: export WANDB_API_KEY, or `wandb login`")
    group.add_argument(
        "--mlflow",
        nargs="?",
        const="",
        metavar="URI",
        help="log to MLflow as well; bare: to $MLFLOW_TRACKING_URI, else to the run's folder mlruns",
    )

"""A training run in results/<experiment>: where its weights come from, its defaults, its start and its end.

Used by pretrain.py and finetune.py alike. Nothing here imports NeMo before `start` is past the dry run.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from nemo_tutorial import (
    checkpoints,
    compat,
    config,
    faults,
    hub,
    megatron_data,
    metrics,
    models,
    network,
    options,
    performance,
    plan,
    preflight,
    questions,
    report,
    schedule,
    slurm,
    terminal,
    tokenization,
    trust,
)

PREPARING = 6 * 3600  # seconds that the other nodes wait for the first one's preparation of the data


@dataclass
class Source:
    """Where a run's weights come from; exactly one of the three is used, in this order."""

    resume_from: Path | None = None  # this run's own newest checkpoint: weights, optimizer, step, data order
    restore_from: Path | None = None  # another NeMo checkpoint: weights only
    hf_folder: Path | None = None  # shape and tokenizer only: random weights
    run: Path | None = None

    def __str__(self):
        if self.resume_from:
            return f"goes on from step {checkpoints.step(self.resume_from)} of {self.resume_from}"
        return str(self.restore_from) if self.restore_from else f"random, shape of {self.hf_folder}"

    def tokenizer_folder(self):
        """The folder of the tokenizer that these weights came with."""
        checkpoint = self.resume_from or self.restore_from
        return models.tokenizer_folder(checkpoint) if checkpoint else self.hf_folder

    def checkpoints(self):
        """The checkpoints that NeMo will read: the one above, and the base model if that is an adapter."""
        found = [path for path in (self.resume_from or self.restore_from,) if path]
        if found and checkpoints.is_adapter(found[0]):
            found.append(Path(checkpoints.adapter_base(found[0])))
        return found

    def config_and_tokenizer(self):
        """The model's NeMo config, and the folder of its tokenizer."""
        from nemo_tutorial import recipes

        if self.restore_from and not self.resume_from:
            return recipes.checkpoint_config(self.restore_from), self.tokenizer_folder()
        # Copied, because NeMo takes the tokenizer's whole folder into each checkpoint, and leaves it out without a word
        # if it is gone: a Hugging Face folder has the weights in it, and a run's older checkpoint is removed some time.
        folder = self.run / "nemo_tokenizer"
        checkpoints.copy_assets(self.tokenizer_folder(), folder)
        config = recipes.checkpoint_config(self.resume_from) if self.resume_from else recipes.hf_config(self.hf_folder)
        return config, folder


def folder(args):
    """The folder of a run."""
    return Path("results", args.experiment)


def record(run):
    """What `start` wrote about a run when it began, or {}."""
    # In a folder of its own: NeMo moves the files beside checkpoints/ away when a run goes on.
    return faults.read(run, "run.json") or {}


def stages(checkpoint):
    """How a checkpoint was made, as far as it is written down: (base model or None, training stages, first first).

    A stage is {"stage", "data", "steps", ...}, for people to read; a value that is not known is None.
    """
    found, seen = [], set()
    while checkpoint is not None and Path(checkpoint).resolve() not in seen:
        checkpoint = Path(checkpoint).resolve()
        seen.add(checkpoint)
        manifest = checkpoints.manifest(checkpoint)
        if manifest.get("adapter"):  # merged: made as the adapter was
            checkpoint = manifest["adapter"]
            continue
        history = record(checkpoint.parent.parent) if checkpoint.parent.name == "checkpoints" else {}
        if not history:
            source = manifest.get("source")
            return (source if manifest.get("commit") or not source else Path(source).name), found[::-1]
        found.append(_stage(checkpoint, history))
        checkpoint = history.get("restored_from")
    return None, found[::-1]


def _stage(checkpoint, history):
    run, step = checkpoint.parent.parent, checkpoints.step(checkpoint)
    flags = history["starts"][-1]["flags"] if history.get("starts") else {}
    data, peft = flags.get("dataset_path"), flags.get("peft")
    data = data if isinstance(data, list) else [data] if data else []
    values = {}
    for lines in metrics.steps(metrics.read(run)):
        for line in lines:
            values |= line if line["step"] == step else {}
    scratch = not history.get("restored_from") and flags.get("hf_model_id")
    return {
        "stage": history.get("stage", "training") + (f" ({peft})" if peft else ""),
        "weights before": f"random, with the shape and tokenizer of `{_public(scratch)}`" if scratch else None,
        "data": f"`{' '.join(map(_public, data))}`" if data else None,
        "steps": step or None,
        "samples a step": flags.get("global_batch_size"),
        "tokens a sample": flags.get("seq_length"),
        "training loss at the last step": f"{values['loss']:.4g}" if "loss" in values else None,
        "validation loss": f"{values['val_loss']:.4g}" if "val_loss" in values else None,
    }


def _public(path):
    """A path as it may be published: an absolute one tells about the machine that it is on."""
    return Path(path).name if Path(path).is_absolute() else str(path).rstrip("/")


def hardware_problems(args, model):
    """Fill in the accelerator, GPUs, sequence length and how `model` (or None) lies over the GPUs.

    Check that, and how the job is started.
    """
    problems = preflight.fill_hardware(args)
    if args.seq_length is None:
        limits = (model.max_position_embeddings, model.sliding_window) if model else ()
        args.seq_length = min([8192, *(limit for limit in limits if limit)])
    plan.choose_sizes(args, model)
    problems += preflight.layout_problems(args) + preflight.execution_problems(args) + preflight.fault_problems(args)
    problems += questions.problems(args)
    if args.sequence_parallel is None:
        args.sequence_parallel = args.tensor_model_parallel_size > 1
    return problems


def weights(args, fallback):
    """Where the weights come from: (Source, Model or None, problems).

    `fallback` is what no --nemo_model at all means: "newest" pretraining checkpoint, or None for random weights.
    """
    run, problems, source = folder(args), [], Source(run=folder(args))
    source.resume_from = checkpoints.latest(run)
    if source.resume_from is None and any((run / "checkpoints").glob("*")):
        problems.append(
            f"--experiment {args.experiment}: {run}/checkpoints holds no complete checkpoint to go on "
            "from; remove that folder, or choose another name"
        )
    if args.executor == "local" and faults.busy(run):
        problems.append(
            f"--experiment {args.experiment}: another process trains in {run} (of a script that was killed, perhaps: "
            "pgrep -f fdl_runner); end it, or choose another name"
        )
    if source.resume_from and (source.resume_from / checkpoints.NO_OPTIMIZER).exists():
        problems.append(
            f"--experiment {args.experiment}: the optimizer state of {source.resume_from} was dropped "
            f"(--keep_optimizer last), so the run can't go on from it; start another from its weights: "
            f"--experiment NEW --nemo_model {source.resume_from}"
        )
    if args.fresh and (source.resume_from or record(run)):
        done = checkpoints.step(source.resume_from) if source.resume_from else 0
        problems.append(
            f"--fresh: {run} holds a run of {done} steps; remove it (rm -r {run}), choose another --experiment, "
            "or leave the flag out to go on"
        )
    newest = args.nemo_model == "" or (args.nemo_model is None and fallback == "newest")
    if newest and not source.resume_from:
        source.restore_from = checkpoints.newest_pretraining("results")
        if source.restore_from is None:
            problems.append(
                "--nemo_model: results/ holds no complete pretraining checkpoint; run "
                "pretraining/pretrain.py first, or name one: --nemo_model nemo_ckpt/NAME"
            )
        elif args.nemo_model is None or args.nemo_model == "":
            print(f"--nemo_model not given: newest pretraining checkpoint is {source.restore_from}")
    elif args.nemo_model:
        source.restore_from = Path(args.nemo_model)
        problems += preflight.checkpoint_problems("--nemo_model", source.restore_from)
        if checkpoints.is_adapter(source.restore_from):
            problems.append(
                f"--nemo_model {source.restore_from} is a LoRA adapter; merge it first: python finetuning/merge_lora.py"
            )
        if source.resume_from:
            began = record(run).get("restored_from")
            if began and Path(began).resolve() != source.restore_from.resolve():
                problems.append(
                    f"--experiment {args.experiment} began from {began}, not from --nemo_model "
                    f"{args.nemo_model}; choose another --experiment for another start"
                )
    elif not newest and not source.resume_from:
        problems += _from_scratch(args, source)
    if problems:
        return source, None, problems
    try:
        checkpoint = source.resume_from or source.restore_from
        if checkpoint is None and source.hf_folder is None:
            return source, None, []
        for base in source.checkpoints()[1:]:
            problems += preflight.checkpoint_problems(f"the base model of {checkpoint}", base)
        model = models.from_nemo(checkpoint) if checkpoint else models.from_hf(source.hf_folder)
    except ValueError as error:
        return source, None, [str(error)]
    flag = "--experiment" if source.resume_from else "--nemo_model"
    for path in source.checkpoints():
        problems += trust.refusals(f"{flag}:", path, args.trust_checkpoint)
    return source, model, problems + _tokenizer_problems(args, source)


def _from_scratch(args, source):
    """Fill in the Hugging Face folder that gives a new model its shape and tokenizer; return the problems."""
    if not args.hf_model_id:
        return ["nothing says which model: give --nemo_model CHECKPOINT, or --hf_model_id FOLDER to start from scratch"]
    source.hf_folder = models.hf_folder(args.hf_model_id)
    if source.hf_folder is None and models.is_hub_id(args.hf_model_id) and args.dry_run is None:
        try:
            source.hf_folder = hub.download_papers(args.hf_model_id)
        except ValueError as error:
            return [f"--hf_model_id: {error}"]
    if source.hf_folder is None:
        return [
            f"--hf_model_id {args.hf_model_id} is not a folder, nor in the Hub's cache here; "
            f"hf download {args.hf_model_id} --local-dir FOLDER, and name the folder"
        ]
    return []


def _tokenizer_problems(args, source):
    """--hf_model_id beside a checkpoint: its tokenizer must be the checkpoint's, which is the one used."""
    checkpoint = source.resume_from or source.restore_from
    named = models.hf_folder(args.hf_model_id) if args.hf_model_id and checkpoint else None
    if named is None:
        return []
    own, other = models.tokenizer_folder(checkpoint) / "tokenizer.json", named / "tokenizer.json"
    if own.is_file() and other.is_file() and json.loads(own.read_bytes()) != json.loads(other.read_bytes()):
        return [f"--hf_model_id {args.hf_model_id} has another tokenizer than {checkpoint}; leave the flag out"]
    return []


def data_tokenizer_problems(prefixes, source):
    """Datasets that were made with another tokenizer than the model's, as far as their records say."""
    checkpoint = source.resume_from or source.restore_from
    if not any(megatron_data.record(prefix) for prefix in prefixes) or not (checkpoint or source.hf_folder):
        return []
    folder = models.tokenizer_folder(checkpoint) if checkpoint else source.hf_folder
    own, problems = tokenization.folder_fingerprint(folder), []
    for prefix in prefixes:
        made = megatron_data.record(prefix)
        if own and made and made["tokenizer"]["fingerprint"] != own:
            inputs = " ".join(one["path"] for one in made["inputs"][:3]) + " ..." * (len(made["inputs"]) > 3)
            problems.append(
                f"--dataset_path: {prefix} holds the tokens of {made['tokenizer']['name']}, and {checkpoint or folder} "
                f"has another tokenizer: every word would be another one. Preprocess again: python "
                f"data/preprocess_data_for_megatron.py --tokenizer_type {folder} --input {inputs} --output_prefix ..."
            )
    return problems


def model_problems(args, model):
    """What depends on the model's shape."""
    if model is None:
        return preflight.sequence_problems(args) + options.problems(args, None)
    if args.seq_length > model.max_position_embeddings:
        terminal.warn(f"--seq_length {args.seq_length} is above the model's {model.max_position_embeddings} positions")
    return preflight.model_problems(args, model) + preflight.sequence_problems(args) + options.problems(args, model)


def schedule_problems(args):
    """Fill in what follows from --lr and --max_steps: floor, warm-up, validation interval; and check them."""
    if args.min_lr is None:
        args.min_lr = args.lr if args.lr_decay == "constant" else args.lr / 10
    if args.warmup_steps is None:
        args.warmup_steps = schedule.warmup_steps(args.max_steps)
    if args.val_check_interval is None:
        args.val_check_interval = args.save_interval or args.exit_interval or max(1, args.max_steps // 5)
    args.save_interval = args.save_interval or args.val_check_interval
    if args.lr_decay == "wsd":
        args.lr_wsd_decay_steps = args.lr_wsd_decay_steps or schedule.wsd_decay_steps(args.max_steps)
    if args.log_interval is None:
        args.log_interval = max(1, min(10, args.max_steps // 100))
    return preflight.schedule_problems(args)


def stop_if_finished(args):
    """Exit 0 if the run in this folder has all its steps; needs args.max_steps."""
    last = checkpoints.latest(folder(args))
    if last is None or checkpoints.step(last) < args.max_steps:
        return
    done = checkpoints.step(last)
    terminal.describe(
        f"{folder(args)} is finished",
        [
            ("steps", f"{done} of {args.max_steps}; nothing to train"),
            ("last checkpoint", last),
            ("to train further", f"the same command with --max_steps above {done}"),
        ],
    )
    raise SystemExit(0)


def change_problems(args, source, files):
    """What a run that goes on has changed since its last start: data (`files`), tokenizer, model, schedule."""
    args.data_files = faults.identity(files)
    starts = record(folder(args)).get("starts")
    if not source.resume_from or not starts:
        return []
    found = faults.changes(args, starts[-1], args.data_files)
    before = starts[-1]["flags"].get("max_steps")
    if before and args.max_steps > before and not found:
        done = checkpoints.step(source.resume_from)
        print(
            f"--max_steps {before} -> {args.max_steps}: from step {done} on, the schedule is that of {args.max_steps}"
        )
    if not found:
        return []
    lines = [f"{what}: {_short(old)} -> {_short(new)}" for what, old, new in found]
    if args.allow_change:
        terminal.warn("going on with changes: " + "; ".join(lines))
        return []
    return [
        f"--experiment {args.experiment} goes on from {source.resume_from}, but since its last start has changed:\n"
        + "\n".join(lines)
        + "\nput it back, choose another --experiment, or go on all the same with --allow_change"
    ]


def _short(value, length=200):
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= length else text[:length] + "..."


def describe(args, model, source, tokens_a_step=None):
    """Print what was derived for a training run; `tokens_a_step` is words where samples are not all --seq_length."""
    dp = preflight.data_parallel_size(args)
    consumed = checkpoints.consumed(source.resume_from) if source.resume_from else None
    terminal.describe(
        "model",
        [
            ("weights", source),
            ("tokenizer", source.tokenizer_folder()),
            ("consumed", f"{consumed:,} samples" if consumed else None),
            (
                "shape",
                f"{model.family.architecture}, {terminal.number(model.parameters)} parameters, "
                + (f"{terminal.number(model.active_parameters)} of them active, " if model.num_experts else "")
                + f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}",
            ),
            ("recipe", model.recipe + (f", {args.peft}" if args.peft else "")),
            ("advisories", trust.advisories()),
        ],
    )
    terminal.describe(
        "layout",
        [
            (
                "where",
                f"{args.executor}, {args.num_nodes} x {args.num_gpus} "
                + ("GPUs" if args.accelerator == "gpu" else "processes without a GPU (no-GPU mode)")
                + (f", {_job(args)}" if args.executor == "slurm" else ""),
            ),
            (
                "parallel",
                f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size} x "
                f"CP {args.context_parallel_size} x DP {dp}"
                + (f", experts over {args.expert_model_parallel_size}" if args.expert_model_parallel_size > 1 else "")
                + (f", {vp} parts a stage" if (vp := args.virtual_pipeline_model_parallel_size) else "")
                + (", sequence parallel" if args.sequence_parallel else ""),
            ),
            ("precision", f"FP8 {args.fp8_recipe or 'delayed_scaling'}" if args.fp8 else args.precision),
            ("performance", ", ".join(setting.name for setting in performance.settings(args)) or "NeMo's own settings"),
        ],
    )
    accumulation = args.global_batch_size // (args.micro_batch_size * dp)
    terminal.describe(
        "steps",
        [
            (
                "tokens a step",
                tokens_a_step
                or f"{args.global_batch_size * args.seq_length:,} = {args.global_batch_size} samples x "
                f"{args.seq_length}; {accumulation} micro batches a GPU",
            ),
            ("steps", f"{args.max_steps}" + (f", stop at every {args.exit_interval}" if args.exit_interval else "")),
            ("learning rate", plan.learning_rates(args)),
            (
                "checkpoints",
                f"{folder(args)}/checkpoints, every {args.save_interval} steps; kept: the best {args.save_top_k}, "
                "and the last",
            ),
            ("disk", plan.disk(args, model)[2]),
        ],
    )
    plan.describe_memory(args, model)


def _job(args):
    """What a Slurm job is submitted with."""
    named = {"account": args.account, "partition": args.partition, "container": args.container_image}
    return ", ".join([*(f"{name} {value}" for name, value in named.items() if value), f"at most {args.time}"])


def start(args, stage, source, build_recipe, prepare=None):
    """Stop here for a dry run; else build the recipe, launch it, check what it left, and exit with its code.

    `prepare` takes the recipe and does what must be done once, before there are ranks.
    """
    if args.dry_run == "plan":
        if args.executor == "slurm":
            from nemo_tutorial import executors

            path = slurm.write(args, stage, executors.environment(args))
            terminal.describe("slurm", [("script", path), ("complete", "--dry_run full writes the recipe beside it")])
        return
    if args.executor == "local" and args.num_nodes > 1 and args.check_network:
        _meet(args, network.SECONDS)
    began = time.monotonic()
    from nemo_tutorial import executors, recipes

    try:
        recipe = recipes.resolved(build_recipe(), args)
    except ValueError as error:
        terminal.fail(str(error).split("\n"))
    written = config.text(args.written, recipes.as_text(recipe))
    if args.dry_run == "full":
        print(f"\n{config.HEAD}flags and recipe, for --config\n{written}{config.TAIL}")
        executors.launch_text(recipe, args, stage)
        return
    for checkpoint in source.checkpoints():
        _check_content(checkpoint)
    # What is done once, before the ranks and after, the first launcher does; two that write one file, or rewrite one
    # checkpoint, come in each other's way. The others wait for it.
    first = network.is_first(args)
    if prepare and first:
        try:
            prepare(recipe)
        except OSError as error:
            terminal.fail([f"before the launch: {error}"], code=1)
    if args.executor == "local" and args.num_nodes > 1:
        _meet(args, PREPARING)
    run, asked = folder(args), None
    if args.generate_prompts:
        try:
            asked = questions.asked(args, stage, source.tokenizer_folder())
        except ValueError as error:
            terminal.fail([str(error)])
    if first:
        _keep_record(args, stage, source, written, asked)
        code, lines = _until_done(recipe, args, stage, source)
    else:
        code, lines = executors.launch(recipe, args, stage)
    last = checkpoints.latest(run)
    words = {0: "done", 2: "nothing was started", 130: "interrupted", 143: "stopped by a signal"}
    rows = [("result", words.get(code, "failed"))]
    rows += [("", line) for line in lines]
    if args.executor == "local" and first:
        rows.append(("report", report.write_if_possible(run, rows[0][1])))
    rows += [("last checkpoint", last or "none complete"), ("seconds", f"{time.monotonic() - began:.0f}")]
    terminal.describe(f"{stage} in {run}", rows)
    # Not sys.exit: threads of NeMo-Run and of the loggers may still wait for a job that is gone.
    os._exit(code)


def _keep_record(args, stage, source, written, asked):
    """Write what the run's record says of this start, and the prompts that its ranks answer."""
    run = folder(args)
    (run / "record").mkdir(parents=True, exist_ok=True)
    if asked:
        checkpoints.write_whole(run / "record" / "prompts.json", asked)
    (run / "record" / "config.yaml").write_text(written, encoding="utf-8")
    history = record(run)
    hidden = ("recipe", "written")  # these are in config.yaml
    kept = {name: value for name, value in vars(args).items() if not name.endswith("_token") and name not in hidden}
    data = kept.pop("data_files", None)
    history = {
        "stage": stage,
        "restored_from": history.get("restored_from", str(source.restore_from) if source.restore_from else None),
        "starts": [
            *history.get("starts", []),
            {
                "flags": kept,
                "versions": compat.versions(),
                "data": data,
                "command": report.command(),
                "began": time.time(),
            },
        ],
    }
    report.keep_lineage(run, history)
    checkpoints.write_whole(run / "record" / "run.json", json.dumps(history, indent=1, ensure_ascii=False))


def _meet(args, seconds):
    """Wait for the launchers on the other nodes; exit 2 with the mistake if they do not come, or are others."""
    try:
        hosts = network.meet(network.facts(args), args.num_nodes, seconds)
    except ValueError as error:
        terminal.fail(str(error).splitlines())
    terminal.describe("network", [("nodes", ", ".join(f"{node} {host}" for node, host in enumerate(hosts)))])


def _until_done(recipe, args, stage, source):
    """Launch, and again after a failure as often as --max_restarts says: (exit code, lines to show)."""
    from nemo_tutorial import executors

    run, failures = folder(args), []
    while True:
        faults.clear(run)
        code, lines = executors.launch(recipe, args, stage)
        last = checkpoints.latest(run)
        if code == 0 and (args.executor == "local" or args.wait):
            code, lines = _check_end(args, source, last)
            if code == 0 and args.keep_optimizer == "last":
                _drop_optimizers(run)
        if code == 0 or args.executor == "slurm":
            return code, lines
        lines += [f"removed, as it was not complete: {name}" for name in faults.remove_unfinished(run)]
        if code != 1:
            return code, lines
        failure, step = faults.read(run, faults.FAILURE), checkpoints.step(last) if last else 0
        if failure:
            at = f"step {failure['step']}, rank {failure['rank']}"
            if failure["samples"]:
                at += ", samples {} to {}".format(*failure["samples"])
            lines.insert(0, f"{failure['kind']} at {at}: {failure['message']}")
        again, why = faults.restart(step, failures, args.max_restarts)
        if failure and failure["kind"] in faults.FINAL and again:
            again, why = False, "not started again: it would be the same"
        if not again:
            return code, [*lines, why] if why else lines
        failures.append(step)
        terminal.describe(f"{stage} failed", [("", line) for line in [*lines, why]])


def _drop_optimizers(run):
    """Take the optimizer state out of all but the last checkpoint."""
    from nemo_tutorial import retention

    for checkpoint in retention.older(run):
        try:
            retention.drop_optimizer(checkpoint)
        except (OSError, ValueError) as error:
            terminal.warn(f"{checkpoint} keeps its optimizer state: {error}")


def _check_content(checkpoint):
    """Read all of a checkpoint's weights, and exit 2 if one is damaged: NeMo's ranks would train on it."""
    from nemo_tutorial import weights

    began = time.monotonic()
    problem = weights.problem(checkpoint)
    if problem:
        hint = "import or copy it again, or name another" if checkpoints.manifest(checkpoint) else "go on from another"
        terminal.fail([f"{problem}; {hint}"])
    size, seconds = checkpoints.size(checkpoint / "weights"), time.monotonic() - began
    terminal.describe("checked", [("checkpoint", f"{terminal.gigabytes(size)} as written, in {seconds:.0f} s")])


def _check_end(args, source, last):
    """The job says it succeeded: is the checkpoint of the step it had to reach there, and whole?"""
    begun = checkpoints.step(source.resume_from) if source.resume_from else 0
    target = args.max_steps
    if args.exit_interval:
        target = min(target, (begun // args.exit_interval + 1) * args.exit_interval)
    reached = checkpoints.step(last) if last else 0
    stopped = faults.read(folder(args), faults.EARLY_STOP)
    if stopped and reached >= stopped["step"]:
        words = f"validation loss {stopped['last']:.4g}, best {stopped['best']:.4g}"
        return 0, [f"stopped early at step {stopped['step']}: --early_stopping_patience, {words}"]
    if reached < target:
        return 1, [f"the job ended without an error, but the last complete checkpoint has {reached} of {target} steps"]
    from nemo_tutorial import weights

    problem = weights.problem(last)
    return (1, [f"the last checkpoint can't be read again: {problem}"]) if problem else (0, [])

"""What a run did, on one page: results/RUN/summary.json and report.html; and runs compared.

From the repository root:

    python -m nemo_tutorial.report results/llama31_pretraining
    python -m nemo_tutorial.report results/first results/second --output_path comparison.html

A run writes both files when it ends. With one run named, they are written anew from its record; with several, they
are compared in a table, and on one page if --output_path names it.
"""

import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

from nemo_tutorial import arguments, checkpoints, megatron_data, metrics, terminal

ROOT = Path(__file__).resolve().parents[1]
TOKENS = ("--hf_token", "--wandb_token")


def parse_args(argv=None):
    parser = arguments.Parser(__doc__, prog="python -m nemo_tutorial.report")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, such as results/NAME")
    parser.add_argument("--output_path", metavar="FILE", help="write the comparison as a page as well")
    parser.add_argument("--overwrite", action="store_true", help="replace an --output_path that exists")
    return parser.parse_args(argv)


def command(argv=None):
    """This process's own command, as it can be shown: without tokens."""
    argv, shown = list(sys.argv if argv is None else argv), []
    while argv:
        word = argv.pop(0)
        flag, equals, _ = word.partition("=")
        if flag.replace("-", "_").replace("__", "--", 1) in TOKENS:
            if not equals and argv:
                argv.pop(0)
            continue
        shown.append(word)
    script = Path(shown[0]).resolve()
    if script.is_relative_to(ROOT):
        shown[0] = str(script.relative_to(ROOT))
    return shlex.join(["python", *shown])


def commit():
    """The commit of this repository, with "+changes" if its files differ, or None outside of git."""
    try:
        git = ["git", "-C", str(ROOT)]
        number = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return number.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def read(file, default=None):
    """A JSON file of a run, or `default`."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def samples(run):
    """[(step, replies), ...] of --generate_prompts, in order; of a step that was done again, the last."""
    found = {}
    try:
        lines = (Path(run) / "record" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            line = json.loads(line)
            found[line["step"]] = line["replies"]
        except (ValueError, KeyError):
            continue
    return sorted(found.items())


def data(flags):
    """What is known of a run's data: a row (name, value) a source."""
    paths = flags.get("dataset_path") or []
    rows = []
    for path in paths if isinstance(paths, list) else [paths]:
        path = str(path)
        prefixes = [str(p)[: -len(".idx")] for p in sorted(Path(path).glob("*.idx"))] if Path(path).is_dir() else [path]
        made = {prefix: megatron_data.record(prefix) for prefix in prefixes}
        rows += [
            (prefix, f"{found.get('tokens', '?'):,} tokens by {found['tokenizer']['name']}, of " + inputs(found))
            for prefix, found in made.items()
            if found and isinstance(found.get("tokens"), int)
        ] or [(path, None)]
    return rows


def inputs(made):
    """The files that a dataset was made from, by name."""
    names = [Path(one["path"]).name for one in made.get("inputs", [])]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def lineage(run, history):
    """How this run's weights came about: [{"title", "rows": [(name, value), ...]}, ...], first things first.

    Found once, when the run starts, and kept in record/lineage.json: later, what it came from may be gone.
    """
    from nemo_tutorial import runs

    kept = Path(run) / "record" / "lineage.json"
    if kept.is_file():
        return read(kept, [])
    flags = (history.get("starts") or [{}])[-1].get("flags", {})
    before, chain = history.get("restored_from"), []
    if before:
        base, stages = runs.stages(before)
        found = Path(before).resolve()
        seen = set()
        while found not in seen:  # back to the import
            seen.add(found)
            manifest = checkpoints.manifest(found)
            after = runs.record(found.parent.parent) if found.parent.name == "checkpoints" else {}
            found = Path(manifest.get("adapter") or after.get("restored_from") or found).resolve()
        manifest = checkpoints.manifest(found)
        if base:
            chain.append({"title": "Hugging Face model", "rows": [("model", base), ("commit", manifest.get("commit"))]})
        if not stages or found != Path(before).resolve():
            chain.append({"title": "import", "rows": [("checkpoint", found.name)]})
        for stage in stages:
            rows = [(name, value and str(value).replace("`", "")) for name, value in stage.items() if name != "stage"]
            chain.append({"title": stage["stage"], "rows": rows})
    elif flags.get("hf_model_id"):
        chain.append({"title": "random weights", "rows": [("shape and tokenizer", flags["hf_model_id"])]})
    peft = f" ({flags['peft']})" if flags.get("peft") else ""
    rows = [("run", Path(run).name), *(("data", name + (f": {value}" if value else "")) for name, value in data(flags))]
    chain.append({"title": history.get("stage", "training") + peft, "rows": rows})
    return chain


def keep_lineage(run, history):
    """Write record/lineage.json, when a run starts for the first time."""
    if not (run / "record" / "lineage.json").is_file():
        checkpoints.write_whole(
            run / "record" / "lineage.json", json.dumps(lineage(run, history), ensure_ascii=False, indent=1)
        )


def summary(run, result=None):
    """What a run's record says, as one dictionary; `result` in words, if the caller knows it."""
    run = Path(run)
    history = read(run / "record" / "run.json", {})
    starts = history.get("starts") or [{}]
    flags = starts[-1].get("flags", {})
    machine = read(run / "record" / "machine.json", {})
    training, validation = metrics.steps(metrics.read(run))
    step, total = training[-1]["step"] if training else 0, flags.get("max_steps")
    old = read(run / "summary.json", {})
    if result is None and old.get("steps") == step:
        result = old.get("result")
    if result is None:
        result = "done" if total and step >= total else f"at step {step}" + (f" of {total}" if total else "")
    found = {
        "run": run.name,
        "stage": history.get("stage"),
        "result": result,
        "steps": step,
        "max_steps": total,
        "loss_first": training[0]["loss"] if training else None,
        "loss_last": training[-1]["loss"] if training else None,
    }
    for name, line in (("start", validation[:1]), ("end", validation[-1:])):
        # The start is that of the first step: a run whose record begins later has none.
        known = line and (name == "end" or line[0]["step"] == 0)
        found[f"validation_loss_{name}"] = line[0]["val_loss"] if known else None
        found[f"perplexity_{name}"] = round(metrics.perplexity(line[0]["val_loss"]), 4) if known else None
    best = min(validation, key=lambda line: line["val_loss"], default=None)
    found["validation_best"] = {"step": best["step"], "loss": best["val_loss"]} if best else None
    found["validation_at"] = validation[-1]["step"] if validation else None
    found["tokens"] = sum(line.get("tokens", 0) for line in training) or None
    for name in ("tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "seconds"):
        value = metrics.median(training, name)
        found["seconds_per_step" if name == "seconds" else name] = value if value is None else float(f"{value:.5g}")
    memory = [line["memory_gb"] for line in [*training, *validation] if "memory_gb" in line]
    found["memory_gb_peak"] = max(memory, default=None)
    found["training_seconds"] = round(sum(line.get("seconds", 0) for line in training), 1)
    found["gpus"] = machine.get("ranks")
    found["device"] = machine.get("device")
    found["starts"] = len(history.get("starts", []))
    found["began"] = starts[0].get("began")
    found["ended"] = old.get("ended") if old.get("steps") == step and old.get("result") == result else time.time()
    found["commands"] = list(dict.fromkeys(start["command"] for start in starts if start.get("command")))
    found["versions"] = starts[-1].get("versions", {})
    found["flags"] = flags
    last = checkpoints.latest(run)
    found["lineage"] = lineage(run, history)
    found["last_checkpoint"] = last.name if last else None
    return found


def write(run, result=None):
    """Write summary.json and report.html of a run, each whole or not at all; return the summary."""
    run = Path(run)
    found = summary(run, result)
    # JSON knows no NaN: a reader in another language would stop at it.
    text = json.dumps(_finite(found), indent=1, ensure_ascii=False, allow_nan=False)
    checkpoints.write_whole(run / "summary.json", text)
    try:
        recipe = (run / "record" / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        recipe = None
    from nemo_tutorial import page  # not needed by a run's start

    training, validation = metrics.steps(metrics.read(run))
    checkpoints.write_whole(run / "report.html", page.run(found, training, validation, samples(run), recipe))
    return found


def write_if_possible(run, result=None):
    """`write` for the end of a run, whose outcome must not depend on it: the page's path, or None with a warning."""
    try:
        write(run, result)
        return Path(run) / "report.html"
    except Exception as error:  # a full disk, or a record that we did not foresee
        terminal.warn(f"{run}: no report could be written ({error!r}); later: python -m nemo_tutorial.report {run}")
        return None


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Name in the table, the summary's field, how it is written.
COLUMNS = (
    ("result", "result", "{}"),
    ("steps", "steps", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("loss", "loss_last", "{:.4f}"),
    ("validation", "validation_loss_end", "{:.4f}"),
    ("perplexity", "perplexity_end", "{:.4g}"),
    ("at the start", "perplexity_start", "{:.4g}"),
    ("tok/s/GPU", "tokens_per_second_per_gpu", "{:,.0f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("GB", "memory_gb_peak", "{:.1f}"),
    ("s/step", "seconds_per_step", "{:.3g}"),
)


def differences(summaries):
    """Flags whose values differ between runs: [(name, [value, ...]), ...]; the runs' names and --mlflow's apart."""
    names = dict.fromkeys(name for one in summaries for name in one["flags"])
    rows = [(name, [one["flags"].get(name) for one in summaries]) for name in names if name != "experiment"]
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def main(argv=None):
    args = parse_args(argv)
    problems = [
        f"{run} is not a run: it has no record/metrics.jsonl; name a folder under results/"
        for run in args.runs
        if not metrics.path(run).is_file()
    ]
    if args.output_path and Path(args.output_path).exists() and not args.overwrite:
        problems.append(f"--output_path {args.output_path} exists; choose another, or replace it with --overwrite")
    if args.output_path and not Path(args.output_path).absolute().parent.is_dir():
        problems.append(
            f"--output_path {args.output_path}: there is no folder {Path(args.output_path).parent}; make it"
        )
    if args.output_path and len(args.runs) == 1:
        problems.append("--output_path is of a comparison, and there is one run; its page is report.html in its folder")
    if problems:
        terminal.fail(problems)
    if len(args.runs) == 1:
        found = [write(args.runs[0])]
    else:
        found = [summary(run) for run in args.runs]
    rows = [
        [one["run"], *(form.format(one[field]) if one[field] is not None else "–" for _, field, form in COLUMNS)]
        for one in found
    ]
    terminal.table(["run", *(name for name, _, _ in COLUMNS)], rows)
    different = differences(found)
    if different:
        print("\nflags that differ")
        terminal.table(["flag", *(one["run"] for one in found)], [[f"--{n}", *map(str, v)] for n, v in different])
    if len(args.runs) == 1:
        print(f"\nwritten: {Path(args.runs[0]) / 'report.html'}, summary.json")
    elif args.output_path:
        from nemo_tutorial import page

        curves = [metrics.steps(metrics.read(run)) for run in args.runs]
        table = (["run", *(name for name, _, _ in COLUMNS)], rows)
        checkpoints.write_whole(Path(args.output_path), page.comparison(found, curves, table, different))
        print(f"\nwritten: {args.output_path}")


if __name__ == "__main__":
    main()

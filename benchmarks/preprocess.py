"""Preprocessing against NeMo's and Megatron-LM's scripts: seconds, peak memory, and whether the bytes are equal.

    python benchmarks/preprocess.py --megatron_lm Megatron-LM \\
        --nemo_script NeMo/scripts/nlp_language_modeling/preprocess_data_for_megatron.py

runs the tools in turn on the same files (benchmarks/texts.py: 200 MB of English and code, 100 MB of Traditional
Chinese, a tokenizer of 128,000 entries), then ours on 2 GB of both, with one worker and with two. What has been
measured is kept in --folder, so that --corpora and --contestants can do it in parts; the table shows all of it. Memory
is the largest sum of the processes' PSS (pages that they share are counted once), looked at up to ten times a second.

The peers are run as they are, from checkouts of theirs, with the same special tokens as ours. What this environment
lacks for them is put beside them at run time (MEGATRON_LM_SHIM and NEMO_RUNNER below). nltk and ftfy (NeMo's script),
triton, gigatoken and awkward (Megatron-LM's) must be importable; PYTHONPATH may name a folder with them.
"""

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import texts

from nemo_tutorial import terminal

ROOT = Path(__file__).resolve().parents[1]
CONTESTANTS = ("ours", "ours, 1 worker", "megatron-lm fast", "megatron-lm, 2 workers", "nemo, 1 worker")
# Megatron-LM asks for a newer nvidia-resiliency-ext than NeMo 2.7 has, and can do without any; and for Python 3.12.
MEGATRON_LM_SHIM = {
    "nvidia_resiliency_ext/__init__.py": 'raise ModuleNotFoundError("older than what Megatron-LM asks for")\n',
    "sitecustomize.py": "import typing\nimport typing_extensions\ntyping.override = typing_extensions.override\n",
}
# The collection that NeMo's script imports two modules of needs much that is not installed: the __init__ files of the
# packages on the way to them are passed over.
NEMO_RUNNER = """
import runpy, sys, types
from pathlib import Path
script = Path(sys.argv[1]).resolve()
root = script.parents[2]
sys.path.insert(0, str(root))
import nemo.collections
for name in ("nlp", "nlp/data", "nlp/data/language_modeling", "nlp/data/language_modeling/megatron", "nlp/modules",
             "nlp/modules/common"):
    module = types.ModuleType("nemo.collections." + name.replace("/", "."))
    module.__path__ = [str(root / "nemo/collections" / name)]
    sys.modules[module.__name__] = module
sys.argv = sys.argv[1:]
runpy.run_path(str(script), run_name="__main__")
"""


def ours(args, tokenizer, files, prefix, workers):
    """(command line, environment) of this project's script."""
    command = [ROOT / "data/preprocess_data_for_megatron.py", "--input", *files, "--tokenizer_type", tokenizer]
    return [*command, "--output_prefix", prefix, "--append_eod", "--overwrite", "--workers", workers], {}


def megatron_lm(args, tokenizer, files, prefix, workers=None):
    """The same of Megatron-LM's script with `workers`, or of its fast one; the tokenizer's own tokens left out."""
    for name, text in MEGATRON_LM_SHIM.items():
        (args.folder / "shim" / name).parent.mkdir(parents=True, exist_ok=True)
        (args.folder / "shim" / name).write_text(text)
    root = args.megatron_lm.absolute()
    script = "preprocess_data.py" if workers else "preprocess_data_fast.py"
    command = [root / "tools" / script, "--input", *files, "--tokenizer-type", "HuggingFaceTokenizer"]
    command += ["--tokenizer-model", tokenizer, "--output-prefix", prefix, "--append-eod"]
    command += ["--tokenizer-hf-no-include-special-tokens"]
    command += ["--workers", workers] if workers else ["--use-gigatoken"]
    return command, {"PYTHONPATH": f"{root}:{args.folder.absolute() / 'shim'}:{os.environ.get('PYTHONPATH', '')}"}


def nemo(args, tokenizer, files, prefix):
    """The same of NeMo's script, with its default of one worker."""
    command = ["-c", NEMO_RUNNER, args.nemo_script.absolute(), "--input", *files, "--json-keys=text"]
    command += ["--dataset-impl", "mmap", "--tokenizer-library=huggingface", "--tokenizer-type", tokenizer]
    return [*command, "--output-prefix", prefix, "--append-eod"], {}


def command_of(contestant, args, *task):
    """(command line, environment), or None if the contestant's checkout was not named."""
    if contestant.startswith("ours"):
        return ours(args, *task, workers=1 if contestant.endswith("1 worker") else os.cpu_count())
    if contestant.startswith("megatron"):
        return args.megatron_lm and megatron_lm(args, *task, workers=None if contestant.endswith("fast") else 2)
    return args.nemo_script and nemo(args, *task)


def memory(process):
    """Bytes of the process and its children, those that they share counted once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{one.pid}/smaps_rollup").read_text(), re.M)
            total += int(found[1]) * 1024
        except (OSError, TypeError):
            pass  # it has just ended
    return total


def measure(command, environment, log):
    """Run it: {"seconds", "peak" bytes, "own" seconds by its own clock, if it has one}, or None if it failed."""
    began, peak = time.perf_counter(), 0
    with open(log, "w") as file:
        process = psutil.Popen(
            [sys.executable, "-W", "ignore", *map(str, command)],
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            looked = time.perf_counter()
            try:
                peak = max(peak, memory(process))
            except psutil.NoSuchProcess:
                break
            # The kernel stops the process while it counts its pages: for a twentieth of the time at most.
            time.sleep(max(0.1, 19 * (time.perf_counter() - looked)))
        process.wait()
    seconds = time.perf_counter() - began
    own = re.search(r"(?:Elapsed time: |^  seconds +)([\d.]+)", log.read_text(), re.M)
    if process.returncode:
        return None
    return {"seconds": seconds, "peak": peak, "own": float(own[1]) if own else None}


def same_bytes(one, other):
    """Whether two datasets are equal, byte for byte."""
    pairs = [(f"{one}_text_document{suffix}", f"{other}_text_document{suffix}") for suffix in (".bin", ".idx")]
    return all(subprocess.run(["cmp", "-s", *pair]).returncode == 0 for pair in pairs)


def corpora(folder):
    """{name: files}, tokenizer: made if they are not there, and read once so that the disk's speed plays no part."""
    english, chinese, tokenizer = texts.make(folder)
    both = folder / "both.jsonl"
    if not both.exists():
        with open(folder / "both.partial", "wb") as file:
            for number in range(100):
                file.write((english, chinese)[number % 2].read_bytes())
                if file.tell() >= 2_000_000_000:
                    break
        (folder / "both.partial").rename(both)
    return {"english": english, "chinese": chinese, "both": both}, tokenizer


def commit_of(path):
    """The commit of a checkout, or its folder's name if it is none."""
    folder = path if path.is_dir() else path.parent
    done = subprocess.run(["git", "-C", folder, "log", "-1", "--format=%h of %cs"], capture_output=True, text=True)
    return done.stdout.strip() or f"no git checkout ({path.absolute()})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron_lm", type=Path, metavar="DIR", help="a checkout of Megatron-LM")
    parser.add_argument("--nemo_script", type=Path, metavar="FILE", help="NeMo's script, in a checkout of NeMo")
    parser.add_argument("--folder", type=Path, default=Path("benchmark_preprocess"), help="[benchmark_preprocess]")
    parser.add_argument("--corpora", nargs="+", choices=("english", "chinese", "both"))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turn; the median counts [1]")
    args = parser.parse_args()
    files, tokenizer = corpora(args.folder)
    kept = args.folder / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.corpora or files:
        with open(files[name], "rb") as file:
            while file.read(1 << 24):
                pass
        for _ in range(args.rounds):
            for contestant in args.contestants:
                if name == "both" and not contestant.startswith("ours"):
                    continue
                prefix = args.folder / f"{name}_{contestant.replace(' ', '_').replace(',', '')}"
                command = command_of(contestant, args, tokenizer, [files[name]], prefix)
                if not command:
                    continue
                found = measure(*command, prefix.with_suffix(".log"))
                if found is None:
                    print(f"{contestant} on {name} failed: {prefix.with_suffix('.log')}", file=sys.stderr)
                    continue
                reference = args.folder / f"{name}_ours"
                found["equal"] = same_bytes(reference, prefix) if contestant != "ours" else None
                results.setdefault(name, {}).setdefault(contestant, []).append(found)
                kept.write_text(json.dumps(results, indent=1))
    describe(args, files, results)


def describe(args, files, results):
    """Print all that has been measured."""
    packages = ("fastokens", "tokenizers", "transformers", "gigatoken", "megatron-core", "nemo-toolkit")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    terminal.describe(
        "preprocessing",
        [
            ("versions", ", ".join(versions)),
            ("Megatron-LM", commit_of(args.megatron_lm) if args.megatron_lm else "not run: --megatron_lm DIR"),
            ("NeMo's script", commit_of(args.nemo_script) if args.nemo_script else "not run: --nemo_script FILE"),
        ],
    )
    rows = []
    for name, runs in results.items():
        size = files[name].stat().st_size
        for contestant in (one for one in CONTESTANTS if one in runs):
            seconds = statistics.median(run["seconds"] for run in runs[contestant])
            own = [run["own"] for run in runs[contestant] if run["own"]]
            equal = {run["equal"] for run in runs[contestant]} - {None}
            ratio = statistics.median(run["seconds"] for run in runs["ours"]) if "ours" in runs else None
            rows.append(
                [f"{name}, {size / 1e6:.0f} MB", contestant, f"{seconds:.1f}"]
                + [f"{statistics.median(own):.1f}" if own else "-", f"{size / seconds / 1e6:.1f}"]
                + [f"{seconds / ratio:.2f}" if ratio else "-", f"{max(r['peak'] for r in runs[contestant]) / 1e6:.0f}"]
                + [("equal" if equal == {True} else "DIFFERENT") if equal else "-"]
            )
    header = ["corpus", "who", "seconds", "own clock", "MB/s", "x ours", "peak MB", "bytes"]
    terminal.table(header, rows)


if __name__ == "__main__":
    main()

"""The whole tutorial on this machine with a tiny model: import, pretrain, tune, merge, export, generate.

    ./quickstart.sh
    ./quickstart.sh --processes 2 --tensor_model_parallel_size 2

Runs the scripts by the commands it prints, in ./quickstart, and ends with a table of what each stage did.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemo_tutorial import arguments, checkpoints, megatron_data, models, preflight, terminal

ROOT = Path(__file__).resolve().parent
SEQ_LENGTH, SPLIT = 128, "90,10,0"


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--processes", type=arguments.positive, default=1, help="GPUs, or processes without them [1]")
    arguments.add_parallelism(parser)
    parser.add_argument(
        "--folder", default="quickstart", help="where everything is written; removed first [quickstart]"
    )
    return parser.parse_args(argv)


class Stages:
    """Runs commands and keeps what is worth a row in the table; rows stand in the order of the starts."""

    def __init__(self, folder):
        self.folder, self.rows = folder, []
        (folder / "logs").mkdir(parents=True)

    def run(self, stage, script, *flags):
        """Run one script of the repository; its output goes to logs/STAGE.log. Exits with its code if it fails."""
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        shown = shlex.join(["python", script, *map(str, flags)])
        print(f"[{stage}] {shown}", flush=True)
        row = [stage, "", "", ""]
        self.rows.append(row)
        log = self.folder / "logs" / f"{stage.replace(' ', '_')}.log"
        began = time.monotonic()
        with open(log, "wb") as file:
            process = subprocess.Popen(command, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            print("".join("  " + line for line in log.read_text(errors="replace").splitlines(True)[-40:]))
            terminal.fail([f"stage {stage!r} exited with {process.returncode}; whole log: {log}"], code=1)
        # The largest of the stage's processes (kilobytes on Linux).
        row[1:3] = f"{seconds:.0f}", f"{usage.ru_maxrss / 1e6:.2f}"
        return log.read_text(errors="replace")

    def result(self, stage, text):
        """What a stage achieved, for the table."""
        row = next(row for row in self.rows if row[0] == stage)
        row[3] = text
        print(f"[{stage}] {row[1]} s: {text}", flush=True)

    def together(self, *branches):
        """Run functions side by side: a stage is mostly the import of NeMo, which uses one core."""
        with ThreadPoolExecutor(len(branches)) as pool:
            for branch in [pool.submit(branch) for branch in branches]:
                branch.result()


def metrics(run):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "record" / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    """(training losses, validation losses) in the order of the steps."""
    return [x["loss"] for x in lines if "loss" in x], [x["val_loss"] for x in lines if "val_loss" in x]


def curve(lines, first_step=0):
    """'steps 1-120, loss 7.65 -> 4.40, validation 7.65 -> 5.60'."""
    lines = [line for line in lines if line["step"] > first_step or (first_step == 0 and "val_loss" in line)]
    train, validation = losses(lines)
    steps = [line["step"] for line in lines if "loss" in line]
    return (
        f"steps {steps[0]}-{steps[-1]}, loss {train[0]:.2f} -> {train[-1]:.2f}, "
        f"validation {validation[0]:.2f} -> {validation[-1]:.2f}"
    )


def unigram_entropy(index):
    """Entropy (nats a token) of the corpus' token counts: what a model that knew only word counts would reach."""
    with open(index.prefix + ".bin", "rb") as file:
        counts = Counter(memoryview(file.read()).cast("H"))
    return -sum(n / index.tokens * math.log(n / index.tokens) for n in counts.values())


def main(argv=None):
    args = parse_args(argv)
    gpus = preflight.gpus_here()
    if gpus:
        import torch

        if not torch.cuda.is_available():
            terminal.fail(
                [
                    f"nvidia-smi lists {gpus} GPU(s), but this Python's torch can't use them; use the NeMo "
                    "container, or CUDA_VISIBLE_DEVICES= ./quickstart.sh to go on without"
                ]
            )
    began, folder = time.monotonic(), Path(args.folder).absolute()
    if folder.exists() and not (folder / "logs").is_dir():
        terminal.fail([f"--folder {folder} exists and was not made by a quickstart; choose another"])
    shutil.rmtree(folder, ignore_errors=True)
    print(f"{'GPU' if gpus else 'no GPU: the no-GPU mode'}, {args.processes} process(es), in {folder}")
    sample, stages = ROOT / "data" / "sample", Stages(folder)
    layout = ["--num_gpus", args.processes]
    for name in ("tensor_model", "pipeline_model", "context"):
        if size := getattr(args, f"{name}_parallel_size"):
            layout += [f"--{name}_parallel_size", size]
    if args.sequence_parallel is not None:
        layout.append("--sequence_parallel" if args.sequence_parallel else "--no_sequence_parallel")

    def last_line(log, word):
        line = next(line for line in log.splitlines() if line.startswith(f"  {word}"))
        return line.split(maxsplit=1)[1]

    stages.run("tiny model", "data/make_tiny_model.py", "--output_path", "hf_model/tiny")
    model = models.from_hf(folder / "hf_model" / "tiny")
    stages.result("tiny model", f"{model.parameters:,} parameters, vocabulary {model.vocab_size}")

    def convert():
        log = stages.run(
            "import",
            "convert_ckpt/convert_from_hf_to_nemo.py",
            "--source",
            "hf_model/tiny",
            "--output_path",
            "nemo_ckpt/tiny",
        )
        stages.result("import", "tensors: " + last_line(log, "tensors"))

    def preprocess():
        stages.run(
            "preprocess",
            "data/preprocess_data_for_megatron.py",
            f"--input={sample / 'corpus.jsonl'}",
            "--json-keys=text",
            "--dataset-impl",
            "mmap",
            "--tokenizer-library=huggingface",
            "--tokenizer-type",
            "hf_model/tiny",
            "--output-prefix=data/custom_dataset/preprocessed/sample",
            "--append-eod",
        )
        stages.run(
            "split data",
            "finetuning/download_split_data.py",
            "--dataset",
            sample / "instructions.jsonl",
            "--ratios",
            "90,8,2",
        )

    stages.together(convert, preprocess)
    index = megatron_data.read_index(str(folder / "data/custom_dataset/preprocessed/sample_text_document"))
    entropy = unigram_entropy(index)
    stages.result("preprocess", f"{index.documents} documents, {index.tokens:,} tokens, unigram entropy {entropy:.2f}")
    with open(folder / "data/alpaca/training.jsonl", encoding="utf-8") as file:
        stages.result("split data", f"{sum(1 for _ in file)} training rows")

    pretrain = [
        "--experiment",
        "pretraining",
        "--nemo_model",
        "nemo_ckpt/tiny",
        *layout,
        "--seq_length",
        SEQ_LENGTH,
        "--dataset_path",
        "data/custom_dataset/preprocessed",
        "--split",
        SPLIT,
        "--max_steps",
        200,
        "--exit_interval",
        100,
        "--global_batch_size",
        16,
        "--micro_batch_size",
        8,
        "--lr",
        "4e-3",
        "--num_workers",
        0,
    ]
    run = folder / "results" / "pretraining"
    for stage, first_step in (("pretrain", 0), ("resume", 100)):
        stages.run(stage, "pretraining/pretrain.py", *pretrain)
        stages.result(stage, curve(metrics(run), first_step))
    train, validation = losses(metrics(run))

    tune = [
        *layout,
        "--seq_length",
        8 * SEQ_LENGTH,  # so that the 16 rows of a step fit one pack
        "--dataset_path",
        "data/alpaca",
        "--global_batch_size",
        16,
        "--num_workers",
        0,
    ]

    def newest(experiment):
        return checkpoints.latest(folder / "results" / experiment).relative_to(folder)

    def sft():
        stages.run(
            "SFT",
            "finetuning/finetune.py",
            "--experiment",
            "sft",
            "--nemo_model",
            newest("pretraining"),
            *tune,
            "--max_steps",
            240,
            "--val_check_interval",
            120,
            "--lr",
            "3e-3",
        )
        stages.result("SFT", curve(metrics(folder / "results" / "sft")))
        log = stages.run(
            "export", "convert_ckpt/convert_from_nemo_to_hf.py", "--source", newest("sft"), "--output_path", "hf_ckpt"
        )
        stages.result("export", "tensors: " + last_line(log, "tensors"))

    def lora():
        stages.run(
            "LoRA",
            "finetuning/finetune.py",
            "--experiment",
            "lora",
            "--peft",
            "lora",
            "--nemo_model",
            newest("pretraining"),
            *tune,
            "--max_steps",
            40,
            "--lr",
            "2e-3",
        )
        stages.result("LoRA", curve(metrics(folder / "results" / "lora")))
        stages.run("merge", "finetuning/merge_lora.py", "--source", newest("lora"), "--output_path", "nemo_ckpt/merged")
        log = stages.run(
            "export merged",
            "convert_ckpt/convert_from_nemo_to_hf.py",
            "--source",
            "nemo_ckpt/merged",
            "--output_path",
            "hf_merged",
        )
        size = terminal.gigabytes(checkpoints.size(folder / "nemo_ckpt/merged/weights"))
        stages.result("merge", f"a full checkpoint, {size}")
        stages.result("export merged", "tensors: " + last_line(log, "tensors"))

    stages.together(sft, lora)

    answers = folder / "answers.json"
    stages.run(
        "generate",
        "finetuning/generate.py",
        "--model",
        "hf_ckpt",
        "--questions",
        "data/alpaca/training.jsonl",
        "--limit",
        20,
        "--output_path",
        answers,
    )
    replies = json.loads(answers.read_text(encoding="utf-8"))
    exact = sum(reply["reply"] == reply["output"] for reply in replies)
    ended = sum(reply["ended"] for reply in replies)
    stages.result("generate", f"{exact} of {len(replies)} answers exact, {ended} ended by the end token")

    print()
    terminal.table(["stage", "seconds", "GB memory", "result"], stages.rows)
    terminal.describe(
        f"done in {time.monotonic() - began:.0f} s",
        [
            ("training loss", f"{train[0]:.2f} -> {train[-1]:.2f} (-{1 - train[-1] / train[0]:.0%})"),
            (
                "validation loss",
                f"{validation[0]:.2f} -> {validation[-1]:.2f} (-{1 - validation[-1] / validation[0]:.0%}), "
                f"unigram entropy {entropy:.2f}",
            ),
            ("asked", replies[0]["input"]),
            ("answered", replies[0]["reply"]),
            ("NeMo checkpoints", folder / "results"),
            ("Hugging Face model", folder / "hf_ckpt"),
            ("logs", folder / "logs"),
        ],
    )


if __name__ == "__main__":
    main()

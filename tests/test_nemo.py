"""The stages through the real NeMo on the CPU: conversion, training, layouts, resume, faults."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, on_ranks, script

from nemo_tutorial import checkpoints

pytestmark = pytest.mark.nemo
CANARY = "hf_canary9d41b2"
TRAIN = (
    "--nemo_model",
    "nemo_ckpt/tiny",
    "--dataset_path",
    "data/pre",
    "--split",
    "90,10,0",
    "--seq_length",
    128,
    "--global_batch_size",
    8,
    "--micro_batch_size",
    4,
    "--lr",
    "6e-3",
    "--num_workers",
    0,
    "--num_gpus",
    1,
)


def pretrain(folder, name, *flags, **kwargs):
    return script(folder, "pretraining/pretrain.py", "--experiment", name, *TRAIN, *flags, **kwargs)


def metrics(folder, name):
    lines = (folder / "results" / name / "record" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines) if "loss" in line}


ASK = ("--generate_prompts", "prompts.txt", "--generate_tokens", 6)


def answers(folder, name):
    """What a run said: {step: [reply, ...]}."""
    lines = (folder / "results" / name / "record" / "samples.jsonl").read_text().splitlines()
    return {line["step"]: [reply["reply"] for reply in line["replies"]] for line in map(json.loads, lines)}


@pytest.fixture(scope="session")
def one_process(stages):
    """Ten steps in fp32 on one process, without a stop, with tokens in the environment and a logger without server."""
    secrets = {"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    (stages / "prompts.txt").write_text("The river\n台灣最高的山是\n", encoding="utf-8")
    flags = ("--max_steps", 10, "--val_check_interval", 4, "--precision", "fp32", "--wandb", *ASK)
    built = {"TORCH_EXTENSIONS_DIR": str(stages / "built")}
    pretrain(stages, "one", *flags, WANDB_INIT_TIMEOUT="5", **secrets, **built)
    return metrics(stages, "one")


def test_what_is_written_about_a_run(stages, one_process):
    """The log's lines, the validations before the first step and after the last, the report, the offline logger."""
    log = next((stages / "experiments/one").rglob("combined.log")).read_text()
    lines = [line.split("]:")[1] for line in log.splitlines() if "]:step " in line]
    assert [line.split()[1] for line in lines] == [f"{step}/10" for step in range(1, 11)]
    assert lines[-1].startswith(f"step 10/10 | loss {one_process[10]['loss']:.4f} | val ")
    assert lines[-1].endswith("| left 0:00:00") and "MFU –" in lines[-1]
    assert "iteration" not in log and "it/s" not in log, "NeMo's own progress is not printed beside it"
    assert "warning: --wandb:" in log and list((stages / "results/one/wandb").glob("offline-run-*/*.wandb"))
    assert list((stages / "results/one/tensorboard").rglob("events.out.*"))
    whole = (stages / "results/one/record/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in whole if "val_loss" in line] == [0, 4, 8, 10]
    for line in one_process.values():
        assert line["tokens"] == 8 * 128
        assert line["tokens_per_second_per_gpu"] == pytest.approx(1024 / line["seconds"], rel=0.01)
    summary = json.loads((stages / "results/one/summary.json").read_text())
    assert (summary["result"], summary["steps"], summary["tokens"]) == ("done", 10, 10240)
    assert summary["perplexity_start"] > summary["perplexity_end"] > 1
    assert [one["title"] for one in summary["lineage"]] == ["Hugging Face model", "import", "pretraining"]
    page = (stages / "results/one/report.html").read_text()
    assert "data/pre/sample_text_document" in page and "--nemo_model nemo_ckpt/tiny" in page


def test_answers_are_the_models(stages, one_process):
    """Before the first step: what transformers says, greedily, with the model that was imported."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stages / "hf_model/tiny")
    model = AutoModelForCausalLM.from_pretrained(stages / "hf_model/tiny", dtype=torch.float32)
    expected = []
    for text in (stages / "prompts.txt").read_text(encoding="utf-8").splitlines():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(said, skip_special_tokens=True))
    found = answers(stages, "one")
    assert found[0] == expected and sorted(found) == [0, 4, 8, 10] and found[10] != expected


@pytest.mark.parametrize(
    "name, flags, parameters",
    [
        ("dp2", [], [918144, 918144]),
        ("tp2", ["-T", 2, "--no_sequence_parallel"], [459392, 459392]),
        ("tp2sp", ["-T", 2], [459392, 459392]),
        ("pp2", ["-P", 2], [459008, 459136]),
    ],
)
def test_layouts_agree(stages, one_process, name, flags, parameters):
    """Losses of ten steps within 1e-3 of one process, falling by a tenth; the ranks hold their parts, say the same."""
    flags = ["--max_steps", 10, "--val_check_interval", 10, "--precision", "fp32", *ASK, *flags]
    on_ranks(stages, "pretraining/pretrain.py", 2, "--experiment", name, *TRAIN, *flags)
    assert answers(stages, name)[0] == answers(stages, "one")[0]
    losses = metrics(stages, name)
    assert sorted(losses) == list(range(1, 11))
    for step, line in losses.items():
        assert abs(line["loss"] - one_process[step]["loss"]) < 1e-3, (step, line, one_process[step])
    assert losses[10]["loss"] < 0.9 * losses[1]["loss"]
    folders = (stages / "experiments" / folder for folder in (name, f"{name}_node1"))  # the second, of ranks as nodes
    logs = [log.read_text() for folder in folders for log in folder.rglob("combined.log")]
    found = dict(re.findall(r"rank (\d) holds ([\d,]+) parameters", "".join(logs)))
    assert [int(found[rank].replace(",", "")) for rank in sorted(found)] == parameters


def test_no_token_in_any_file(stages, one_process):
    """Neither as it is nor in base64: in no log, recipe, checkpoint or record of a local run."""
    import base64

    spellings = [CANARY.encode(), *(base64.b64encode(bytes(shift) + CANARY.encode())[4:-4] for shift in range(3))]
    files = [file for folder in ("results/one", "experiments/one") for file in (stages / folder).rglob("*")]
    assert any("combined.log" in file.name for file in files)
    for file in files:
        assert file.is_dir() or not any(spelling in file.read_bytes() for spelling in spellings), file


def test_nothing_is_built(stages, one_process):
    """Neither by the script nor by its rank, as they import NeMo: the folder is made first, with or without CUDA."""
    assert not (stages / "built").exists()


def test_resume_is_exact(stages, one_process):
    """Stopped at step 5 and run again: the next steps have the losses and learning rates of the unbroken run."""
    flags = ("--max_steps", 10, "--exit_interval", 5, "--precision", "fp32")
    pretrain(stages, "stopped", *flags)
    assert sorted(metrics(stages, "stopped")) == [1, 2, 3, 4, 5]
    output = pretrain(stages, "stopped", *flags).stdout
    assert "goes on from step 5" in output
    losses = metrics(stages, "stopped")
    for step in range(1, 11):
        for value in ("loss", "learning_rate"):
            assert losses[step][value] == pytest.approx(one_process[step][value], abs=1e-6), (step, value)
    kept = [path for path in (stages / "results/stopped/checkpoints").iterdir() if not path.is_symlink()]
    assert len(kept) <= 2


def test_from_scratch_and_the_real_schedule(stages):
    """Without --nemo_model: random weights (loss near ln of the vocabulary); the learning rate is as announced."""
    from nemo_tutorial import schedule

    output = script(
        stages,
        "pretraining/pretrain.py",
        "--experiment",
        "scratch",
        "--hf_model_id",
        "hf_model/tiny",
        *TRAIN[2:],
        "--max_steps",
        4,
        "--warmup_steps",
        1,
    ).stdout
    assert "random, shape of hf_model/tiny" in output
    lines = metrics(stages, "scratch")
    assert lines[1]["loss"] == pytest.approx(math.log(2048), abs=0.3)
    for step in range(1, 5):
        rate = schedule.learning_rate(step - 1, 6e-3, 6e-4, 1, 4)
        assert lines[step]["learning_rate"] == pytest.approx(rate, rel=1e-4)
    last = checkpoints.latest(stages / "results/scratch")
    names = sorted(path.name for path in (last / "context/nemo_tokenizer").iterdir())
    assert "tokenizer.json" in names and not [name for name in names if name.endswith(".safetensors")]


def test_full_disk_keeps_the_previous_checkpoint(stages):
    """No file may grow above a few kB: the checkpoint can't be written; exit 1, the one before whole, and named."""
    pretrain(stages, "full", "--max_steps", 4, "--exit_interval", 2)
    before = checkpoints.latest(stages / "results/full")
    content = {file: file.read_bytes() for file in before.rglob("*") if file.is_file()}
    command = [
        sys.executable,
        str(ROOT / "pretraining/pretrain.py"),
        "--experiment",
        "full",
        *map(str, TRAIN),
        "--max_steps",
        "4",
        "--exit_interval",
        "2",
    ]
    limited = ["bash", "-c", 'ulimit -f 1500; exec "$@"', "limited", *command]  # 1.5 MB: logs fit, weights do not
    result = subprocess.run(limited, cwd=stages, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1, result.stdout[-3000:]
    assert before.name in result.stdout
    assert checkpoints.latest(stages / "results/full").resolve() == before.resolve()
    assert {file: file.read_bytes() for file in content} == content


def _ranks(folder):
    """Process ids whose command line runs NeMo-Run's worker for a job in `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "fdl_runner" in line and str(folder) in line:
            found.append((int(entry.name), line))
    return found


def _start(stages, name):
    command = [
        sys.executable,
        str(ROOT / "pretraining/pretrain.py"),
        "--experiment",
        name,
        *map(str, TRAIN),
        "--num_gpus",
        "2",
        "--max_steps",
        "5000",
        "--val_check_interval",
        "5000",
    ]
    with open(stages / f"{name}.log", "wb") as log:
        process = subprocess.Popen(command, cwd=stages, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not (stages / f"results/{name}/record/metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, (stages / f"{name}.log").read_text()[-3000:]
        time.sleep(1)
    return process


def test_a_dying_rank_fails_the_run(stages):
    """SIGKILL to one of two ranks: exit 1, the path of the log, and no rank is left."""
    process = _start(stages, "dying")
    workers = [pid for pid, line in _ranks(stages) if "torchrun" not in line and "torch.distributed" not in line]
    assert len(workers) >= 2
    os.kill(workers[-1], signal.SIGKILL)
    assert process.wait(timeout=120) == 1
    assert _ranks(stages) == []
    output = (stages / "dying.log").read_text()
    assert "failed" in output and "combined.log" in output


def test_ctrl_c_ends_the_job(stages):
    """SIGINT to the launcher: exit 130, and no rank is left."""
    process = _start(stages, "interrupted")
    assert _ranks(stages)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    deadline = time.monotonic() + 30
    while _ranks(stages) and time.monotonic() < deadline:
        time.sleep(1)
    assert _ranks(stages) == []

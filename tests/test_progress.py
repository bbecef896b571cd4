"""The numbers of a run: how they are counted, the line of the log, the bar, the loggers, the prompts."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace as Namespace

import pytest
from conftest import LLAMA31_8B, ROOT, TINY

from nemo_tutorial import live, metrics, models, plan, questions, throughput


def model(tmp_path, **fields):
    config = {**TINY, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return models.from_config(tmp_path / "config.json")


def test_flops_of_a_known_model(tmp_path):
    """Llama-3.1-8B at 8192 tokens: 6 x 7.50 B in products, and 6 L h s for attention (12 of half the pairs)."""
    cost = throughput.cost(model(tmp_path, **LLAMA31_8B))
    products = 8030261248 - 128256 * 4096
    assert cost["token"] == 6 * products
    attention = 6 * 32 * 4096 * 8192
    assert throughput.flops(cost, [8192]) / 8192 == pytest.approx(6 * products + attention, rel=1e-4)
    # Two samples in a pack attend each to itself: half the pairs.
    packed, whole = (throughput.flops(cost, lengths) - cost["token"] * 8192 for lengths in ([4096] * 2, [8192]))
    assert packed == pytest.approx(whole / 2, rel=1e-3)
    assert throughput.cost(model(tmp_path, **LLAMA31_8B), "lora")["token"] == 4 * products


def test_pairs_are_those_of_a_mask():
    for length, window in ((1, 0), (7, 0), (7, 3), (3, 7), (9, 1)):
        seen = sum(1 for q in range(length) for k in range(q + 1) if not window or q - k < window)
        assert throughput.pairs(length, window) == seen


@pytest.mark.nemo
def test_flops_are_those_that_torch_counts(tmp_path):
    """torch's own counter over a forward and backward of transformers' model; it counts all pairs, not the causal."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    for layers, tied in ((2, False), (3, True)):
        shape = {**TINY, "num_hidden_layers": layers, "tie_word_embeddings": tied}
        config = LlamaConfig(**{k: v for k, v in shape.items() if k not in ("architectures", "model_type")})
        config._attn_implementation = "eager"
        net, ids = LlamaForCausalLM(config), torch.randint(0, 2048, (1, 64))
        with FlopCounterMode(display=False) as counter:
            net(input_ids=ids, labels=ids).loss.backward()
        cost = throughput.cost(model(tmp_path, **shape))
        norms = (2 * layers + 1) * 128  # no products
        counted = cost["token"] * 64 - 6 * norms * 64 + cost["pair"] * 64 * 64
        assert counter.get_total_flops() == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(device, peak):
    assert throughput.peak(device) == peak


@pytest.mark.nemo
def test_the_log_line_and_the_lengths():
    import torch

    from nemo_tutorial import progress

    line = {"step": 120, "loss": 2.34123, "val_loss": None, "learning_rate": 9.8e-6, "grad_norm": 1.234}
    line |= {"tokens_per_second_per_gpu": 7941.2, "memory_gb": 61.234, "seconds": 1.0321}
    assert progress.log_line(line, 1000, 906) == (
        "step 120/1000 | loss 2.3412 | val – | lr 9.8e-06 | grad 1.23 | 7,941 tok/s/GPU | – TFLOP/s | MFU – | 61.2 GB "
        "| 1.03 s/step | left 0:15:06"
    )
    assert "| 401.5 TFLOP/s | MFU 40.6% |" in progress.log_line({**line, "tflops_per_gpu": 401.5, "mfu": 0.406}, 1, 0)
    tokens = torch.zeros(2, 16)
    assert progress.sample_lengths({"tokens": tokens}) == [16, 16]
    assert progress.sample_lengths({"tokens": tokens, "token_count": [5, 16]}) == [5, 16]
    pack = {"tokens": tokens[:1], "token_count": [12], "cu_seqlens": torch.tensor([[0, 5, 12, 16, -1]])}
    assert progress.sample_lengths(pack) == [5, 7], "what follows the last sample is padding"


@pytest.mark.nemo
def test_a_step_is_written_after_the_next(tmp_path, monkeypatch, capsys):
    """So that nothing waits for a GPU that still computes it; the last one, and those before a validation, at once."""
    import torch

    from nemo_tutorial import progress

    now, asked = [100.0], []

    class Late(progress.Numbers):
        def get(self):
            asked.append(self.known["loss"])
            return super().get()

    monkeypatch.setattr(progress, "Numbers", Late)
    monkeypatch.setattr(progress, "time", Namespace(monotonic=lambda: now[0]))
    callback = progress.Progress(str(tmp_path / "record/metrics.jsonl"), 4, {"token": 6, "pair": 0, "window": 0}, False)
    monkeypatch.setattr(callback, "_counted", lambda model: {"tokens": 64, "flops": 384})
    (tmp_path / "record").mkdir()
    trainer = Namespace(max_steps=9, world_size=1, is_global_zero=True, loggers=[], should_stop=False)
    trainer.val_check_batch = trainer.sanity_checking = None
    said = {}
    for step in range(1, 10):
        trainer.global_step, trainer.callback_metrics = step, {"reduced_train_loss": torch.tensor(float(step))}
        callback.on_train_batch_start(trainer, None, None, step)
        now[0] += 3.0 if step in (2, 8) else 0.25
        callback.on_train_batch_end(trainer, None, None, None, step)
        if step == 6:
            callback.on_validation_start(trainer, None)
            now[0] += 50
        said[step] = (list(asked), capsys.readouterr().out.count("step 4/9"))
    assert [len(said[step][0]) for step in said] == [0, 0, 2, 2, 4, 6, 6, 6, 9], "after a long step, a due one, ..."
    assert [step for step in said if said[step][1]] == [5]
    lines = metrics.read(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 10)) and [line["loss"] for line in lines][-1] == 9.0
    assert [line["seconds"] for line in lines] == [1.625] * 2 + [0.25] * 4 + [round(3.5 / 3, 4)] * 3


def test_the_bar(tmp_path, monkeypatch, capsys):
    """From the start of the ranks to the end: what it draws, in the width there is, warnings above it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "70")
    run, log = tmp_path / "results/x", tmp_path / "experiments/x/1/combined.log"
    (run / "record").mkdir(parents=True)
    metrics.append(metrics.path(run), [{"step": 4, "loss": 9.0}])  # of the start before
    bar = live.Bar("x", 200, run)
    bar.look()
    assert "starting 0:00:00  importing NeMo" in capsys.readouterr().out
    log.parent.mkdir(parents=True)
    log.write_text("[default0]:warning: --wandb: no server\n[default0]:\x1b[31mGPU available: False\x1b[0m\nhalf a")
    bar.look()
    said = capsys.readouterr().out
    assert "warning: --wandb: no server\n" in said and said.endswith("GPU available: False\r")
    metrics.append(metrics.path(run), [{"step": 4, "val_loss": 2.5}])
    metrics.append(metrics.path(run), [{"step": 5, "loss": 2.25, "seconds": 2.0, "memory_gb": 61.0, "grad_norm": 1}])
    with open(metrics.path(run), "a") as file:
        file.write('{"step": 6, "lo')
    bar.look()
    bar.first = (bar.newest[0] - 20, 1)  # as if the first line had come 20 s earlier
    bar.look()
    drawn = capsys.readouterr().out.split("\x1b[K")[-1]
    assert "   2%  5/200  loss 2.2500  val 2.5000  left 0:16:15" in drawn and len(drawn) <= 70
    assert drawn.endswith("\r") and "\n" not in drawn
    bar.look(last=True)
    assert capsys.readouterr().out.endswith("\n")


PROMPTS = {
    "two.txt": "The river\n\n台灣最高的山\n",
    "rows.jsonl": '{"input": "a"}\n{"messages": [{"role": "user", "content": "b"}, '
    '{"role": "assistant", "content": "c"}]}',
    "bad.jsonl": '{"input": "a"}\n{"inptu": "b"}',
    "none.txt": "\n",
    "many.txt": "x\n" * 33,
}


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("two.txt", None),
        ("rows.jsonl", None),
        ("bad.jsonl", "bad.jsonl:2 has no text under input"),
        ("none.txt", "has 0 prompts; give it 1 to 32"),
        ("many.txt", "has 33 prompts; give it 1 to 32"),
        ("missing.txt", "is not a file"),
    ],
)
def test_files_of_prompts(tmp_path, load_script, file, problem):
    for name, content in PROMPTS.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    parse = load_script("finetuning/finetune.py").parse_args
    args = parse(["-D", "x", "--generate_prompts", str(tmp_path / file)])
    plan.choose_sizes(args, None)
    problems = questions.problems(args)
    assert len(problems) == bool(problem) and (not problem or problem in problems[0])
    assert args.generate_tokens == 32
    if not problem:
        assert len(questions.read(tmp_path / file)) == 2
    args = parse(["-D", "x", "-C", "2", "--generate_prompts", str(tmp_path / "two.txt")])
    assert "--context_parallel_size 2" in questions.problems(args)[0]
    assert "no effect without --generate_prompts" in questions.problems(parse(["-D", "x", "--generate_tokens", "5"]))[0]


def test_loggers_that_are_not_there(tmp_path, monkeypatch, load_script):
    import importlib.util

    from nemo_tutorial import preflight

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("mlflow", "wandb") else find(name))
    parse = load_script("pretraining/pretrain.py").parse_args
    problems = preflight.logger_problems(parse(["-D", "x", "--wandb", "--mlflow"]))
    assert len(problems) == 2
    assert "pip install wandb" in problems[0] and "pip install mlflow-skinny" in problems[1]
    problems = preflight.logger_problems(parse(["-D", "x", "--mlflow", "https://name:secret@host"]))
    assert "MLFLOW_TRACKING_PASSWORD" in problems[-1] and "secret" not in problems[-1]


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    """A folder with mlflow-skinny, which is no part of the environment, for the PYTHONPATH."""
    folder = tmp_path_factory.mktemp("mlflow")
    lock = [one for one in (ROOT / "requirements.lock").read_text().splitlines() if "importlib" not in one]
    (folder / "lock.txt").write_text("\n".join(lock))
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), "mlflow-skinny"]
    done = subprocess.run([*command, "-c", str(folder / "lock.txt")], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mlflow-skinny can't be installed here: {done.stderr[-200:]}")
    return folder


def log(code, **env):
    """What a process prints that logs a few values by `code`, in this repository."""
    lines = "from nemo_tutorial import loggers\n" + code + "\n"
    lines += "logger.experiment\nfor step in range(3): logger.log_metrics({'loss': 2.0 - step}, float(step))\n"
    lines += "logger.finalize('success')\nprint('goes on')\n"
    env = os.environ | {"WANDB_SILENT": "true"} | env
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, env=env, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.nemo
def test_mlflow_in_a_folder(mlflow, tmp_path):
    code = f"logger = loggers.MLflow(experiment_name='e', run_name='r', save_dir={str(tmp_path / 'runs')!r})"
    said = log(code, PYTHONPATH=str(mlflow), MLFLOW_TRACKING_URI="")
    assert "goes on" in said and "warning" not in said
    log(code, PYTHONPATH=str(mlflow), MLFLOW_TRACKING_URI="")  # the run goes on
    values = [file.read_text().split() for file in (tmp_path / "runs").rglob("metrics/loss")]
    assert len(values) == 1 and values[0][1::3] == ["2.0", "1.0", "0.0"] * 2
    assert values[0][2::3] == ["0", "1", "2"] * 2


@pytest.mark.full
@pytest.mark.nemo
def test_mlflow_without_its_server(mlflow, tmp_path):
    """A port where nobody listens: one warning, and on."""
    code = "logger = loggers.MLflow(experiment_name='e', run_name='r', tracking_uri='http://127.0.0.1:9', "
    code += f"save_dir={str(tmp_path / 'runs')!r})"
    said = log(code, PYTHONPATH=str(mlflow))
    assert said.count("warning: --mlflow:") == 1 and "training goes on" in said and said.endswith("goes on\n")


@pytest.mark.nemo
def test_wandb_without_its_server(tmp_path):
    """The run is kept on the disk, with all values, and the warning says how to send it."""
    code = f"logger = loggers.WeightsAndBiases(project='p', name='n', save_dir={str(tmp_path)!r})"
    said = log(code, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40, WANDB_INIT_TIMEOUT="5")
    assert said.count("warning: --wandb:") == 1 and said.endswith("goes on\n")
    folder = said.split("wandb sync ")[1].splitlines()[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")) and str(tmp_path / "wandb") in folder


@pytest.mark.full
@pytest.mark.nemo
def test_on_a_terminal_there_is_a_bar(stages):
    """The whole script on a pseudo-terminal: no line of NeMo's or of the ranks, one bar that reaches the end."""
    import pty

    (stages / "prompts.txt").write_text("The river\n")
    flags = "--nemo_model nemo_ckpt/tiny --dataset_path data/pre --split 90,10,0 --seq_length 128 --lr 6e-3"
    flags += " --global_batch_size 8 --num_workers 0 --max_steps 6 --experiment terminal"
    command = [sys.executable, str(ROOT / "pretraining/pretrain.py"), *flags.split()]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=stages, stdout=theirs, stderr=subprocess.STDOUT, stdin=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        said += more
    assert process.wait(timeout=60) == 0
    said = said.decode()
    assert "100%  6/6  loss" in said and "default0" not in said.replace("experiments", "")
    assert said.count("6/6") >= 1 and "result           done" in said

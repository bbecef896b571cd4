"""Runs that are interrupted, go on, fail, hang or fill the disk: what the user is told, and what is lost (nothing)."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, losses, script

from nemo_tutorial import checkpoints, faults

TRAIN = (
    "--dataset_path data/pre --split 90,10,0 --seq_length 128 --global_batch_size 8 --micro_batch_size 4 "
    "--nemo_model nemo_ckpt/tiny --lr 6e-3 --num_workers 1"
).split()
LORA = (
    "--dataset_path data/rows --seq_length 128 --global_batch_size 4 --no_packing --nemo_model nemo_ckpt/tiny "
    "--peft lora --num_workers 1"
).split()
# Loaded by every rank (sitecustomize): faults that can't be made from outside, at signals that nobody else uses.
INJECT = """
import os, signal
if "RANK" in os.environ:
    def fail(number, frame):
        raise RuntimeError("injected")
    def fill(module, inputs):
        module.weight.data.fill_(float("nan"))
    def poison(number, frame):
        import gc
        gc.unfreeze()  # after the first step it is told to look at nothing
        for module in gc.get_objects():
            if type(module).__name__ == "VocabParallelEmbedding":
                # As a forward pass begins: what is put there later in a step, the optimizer writes over.
                module.register_forward_pre_hook(fill)
    signal.signal(signal.SIGUSR2, fail)
    signal.signal(signal.SIGRTMIN, poison)
"""


# What needs no NeMo


def flags(**changed):
    common = {"dataset_path": ["data/pre"], "split": "90,10,0", "seq_length": 128, "global_batch_size": 8, "seed": 1}
    return {**common, "lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 10, "max_steps": 100, "peft": None, **changed}


@pytest.mark.parametrize(
    "changed, found",
    [
        ({}, []),
        ({"lr": 2e-3}, [("--lr", 1e-3, 2e-3)]),
        ({"dataset_path": ["data/other"]}, [("--dataset_path", ["data/pre"], ["data/other"])]),
        ({"peft": "lora"}, [("--peft", None, "lora")]),
        ({"max_steps": 50, "warmup_steps": 5}, [("--max_steps", 100, 50)]),
        ({"max_steps": 200, "warmup_steps": 20}, []),  # trained further, the warm-up by default
        ({"max_steps": 200, "warmup_steps": 7}, [("--warmup_steps", 10, 7)]),
    ],
)
def test_changes(changed, found):
    assert faults.changes(Namespace(**flags(**changed)), {"flags": flags()}, {}) == found


def test_changed_data(tmp_path):
    """A file of the same size with other content, a grown one, one more."""
    names = [tmp_path / name for name in ("a.bin", "b.bin", "c.bin")]
    for name in names[:2]:
        name.write_bytes(bytes(3 << 20))
    last = {"flags": flags(), "data": faults.identity(names[:2])}
    assert faults.changes(Namespace(**flags()), last, faults.identity(names[:2])) == []
    names[0].write_bytes(bytes((3 << 20) - 1) + b"x")
    names[1].write_bytes(bytes(4 << 20))
    names[2].write_bytes(b"new")
    found = faults.changes(Namespace(**flags()), last, faults.identity(names))
    assert [file for file, _, _ in found] == list(map(str, names))
    assert found[1][1:] == ("3,145,728 bytes", "4,194,304 bytes") and found[2][1] == "not there"


@pytest.mark.parametrize(
    "step, failures, allowed, again",
    [
        (0, [], 0, False),
        (0, [], 2, True),
        (5, [0], 2, True),
        (9, [0, 5], 2, False),  # no restart is left
        (0, [0], 9, True),
        (0, [0, 0], 9, False),  # the third failure without a step
        (7, [0, 5, 5], 9, True),
        (5, [0, 5, 5], 9, False),
    ],
)
def test_restart(step, failures, allowed, again):
    assert faults.restart(step, failures, allowed)[0] is again


def plan(folder, *more, check=True):
    return script(folder, "pretraining/pretrain.py", "-E", "run", *more, "--dry_run", check=check)


@pytest.fixture
def stopped(tmp_path, nemo_checkpoint, write_index):
    """A run of 20 steps of 100, as its folder tells, and the flags that it was started with."""
    write_index(tmp_path / "data/pre/one", [200] * 100)
    nemo_checkpoint(tmp_path / "nemo_ckpt/tiny")
    nemo_checkpoint(
        tmp_path / "results/run/checkpoints/model_name=0--val_loss=1.50-step=19-consumed_samples=160.0",
        stage="pretraining",
    )
    command = "-n nemo_ckpt/tiny -D data/pre --split 90,10,0 -s 128 -g 8 --max_steps 100 --lr 1e-3".split()
    kept = flags(dataset_path=["data/pre"], seed=1234)
    data = {f"data/pre/one.{end}": faults.identity([tmp_path / f"data/pre/one.{end}"]) for end in ("idx", "bin")}
    data = {name: next(iter(value.values())) for name, value in data.items()}
    (tmp_path / "results/run/record").mkdir()
    history = {"stage": "pretraining", "restored_from": "nemo_ckpt/tiny", "starts": [{"flags": kept, "data": data}]}
    (tmp_path / "results/run/record/run.json").write_text(json.dumps(history))
    return tmp_path, command


def test_going_on_says_from_where(stopped):
    folder, command = stopped
    output = plan(folder, *command).stdout
    assert "goes on from step 20 of results/run/checkpoints/" in output and "160 samples" in output


def test_change_is_refused_with_old_and_new(stopped):
    folder, command = stopped
    result = plan(folder, *command, "--lr", "2e-3", "--seed", 5, check=False)
    assert result.returncode == 2
    assert "--lr: 0.001 -> 0.002" in result.stderr and "--seed: 1234 -> 5" in result.stderr
    assert "--allow_change" in result.stderr
    allowed = plan(folder, *command, "--lr", "2e-3", "--allow_change")
    assert "--lr: 0.001 -> 0.002" in allowed.stderr and "goes on from step 20" in allowed.stdout
    (folder / "data/pre/one.bin").write_bytes(bytes(100 * 200 * 2 - 1) + b"x")
    result = plan(folder, *command, check=False)
    assert result.returncode == 2 and "one.bin" in result.stderr


def test_more_steps_go_on(stopped):
    folder, command = stopped
    output = plan(folder, *command, "--max_steps", 300).stdout
    assert "--max_steps 100 -> 300: from step 20 on, the schedule is that of 300" in output


def test_finished_run(stopped):
    folder, command = stopped
    result = plan(folder, *command, "--max_steps", 20)
    assert result.returncode == 0 and "finished" in result.stdout and "--max_steps above 20" in result.stdout


def test_fresh_refuses_a_run(stopped):
    folder, command = stopped
    result = plan(folder, *command, "--fresh", check=False)
    assert result.returncode == 2 and "rm -r results/run" in result.stderr and "--experiment" in result.stderr
    shutil.rmtree(folder / "results")
    assert plan(folder, *command, "--fresh").returncode == 0


def test_a_run_is_trained_once(stopped):
    folder, command = stopped
    lock = faults.hold(folder / "results/run")
    result = plan(folder, *command, check=False)
    assert result.returncode == 2 and "another process trains in results/run" in result.stderr
    lock.close()
    assert plan(folder, *command).returncode == 0


def test_no_optimizer_no_going_on(stopped):
    folder, command = stopped
    (checkpoints.latest(folder / "results/run") / checkpoints.NO_OPTIMIZER).touch()
    result = plan(folder, *command, check=False)
    assert result.returncode == 2 and "--keep_optimizer last" in result.stderr and "--nemo_model" in result.stderr


@pytest.mark.parametrize(
    "more, said",
    [
        (["--max_loss_spike", "0.5"], "--max_loss_spike 0.5"),
        (["--max_restarts", "2", "--executor", "slurm"], "--max_restarts 2"),
    ],
)
def test_flags_of_faults(stopped, more, said):
    folder, command = stopped
    result = plan(folder, *command, *more, check=False)
    assert result.returncode == 2 and said in result.stderr


def test_unfinished_checkpoints_go(tmp_path, nemo_checkpoint):
    whole = nemo_checkpoint(tmp_path / "checkpoints/model_name=0--step=4", stage="pretraining")
    half = nemo_checkpoint(tmp_path / "checkpoints/model_name=0--step=9", stage="pretraining")
    (tmp_path / "checkpoints/model_name=0--step=9-unfinished").touch()
    assert faults.remove_unfinished(tmp_path) == [half.name]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [whole.name]


# What needs it


class Run:
    """A training run in the background, on two processes: its script, its ranks, its metrics."""

    def __init__(self, folder, name, *flags, of="pretraining/pretrain.py", ranks=2, **variables):
        self.folder, self.name, self.count = folder, name, ranks
        (folder / "inject").mkdir(exist_ok=True)
        (folder / "inject/sitecustomize.py").write_text(INJECT)
        self.path = folder / "results" / name
        self.lines = len(self.metrics_text())
        command = [sys.executable, str(ROOT / of), "-E", name, "--num_gpus", str(ranks), *map(str, flags)]
        self.log = folder / f"{name}.log"
        with open(self.log, "ab") as log:
            self.began = log.tell()
            path = [str(folder / "inject"), os.environ.get("PYTHONPATH")]
            env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))} | variables
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env)

    def metrics_text(self):
        file = self.path / "record/metrics.jsonl"
        return file.read_text().splitlines() if file.exists() else []

    def said(self):
        with open(self.log, "rb") as log:
            log.seek(self.began)
            return log.read().decode(errors="replace")

    def wait_for_steps(self, more=1):
        """Until this start has written so many lines of metrics; False if it ended before."""
        deadline = time.monotonic() + 600
        while len(self.metrics_text()) < self.lines + more:
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.05)
        return True

    def ranks(self):
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                env, parent = process.environ(), process.parent()
                if "RANK" in env and "torchrun" in " ".join(parent.cmdline()):
                    found[int(env["RANK"])] = process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                pass
        return [found[rank] for rank in sorted(found)]

    def wait(self, timeout=600):
        code = self.process.wait(timeout)
        return code, self.said()


@pytest.fixture(scope="session")
def rows(stages):
    """Instruction data for LoRA, which has dropout."""
    lines = (ROOT / "data/sample/instructions.jsonl").read_text(encoding="utf-8").splitlines()
    (stages / "data/rows").mkdir(exist_ok=True)
    for name, part in (("training", lines[:120]), ("validation", lines[120:140])):
        (stages / f"data/rows/{name}.jsonl").write_text(
            "\n".join(
                json.dumps({"input": row["instruction"], "output": row["output"]}) for row in map(json.loads, part)
            )
        )
    return stages


@pytest.mark.nemo
def test_a_signal_at_rank_1(stages):
    """SIGUSR1 at rank 1: a complete checkpoint of the step that ran, the marker, exit 143, all said."""
    run = Run(stages, "warned", *TRAIN, "--max_steps", 2000, "--val_check_interval", 2000)
    assert run.wait_for_steps(5), run.said()[-3000:]
    run.ranks()[1].send_signal(signal.SIGUSR1)
    code, said = run.wait(120)
    assert code == 143, said[-3000:]
    marker = json.loads((run.path / "record/preempted.json").read_text())
    assert marker["signal"] == "SIGUSR1" and marker["step"] == max(losses(run.path))
    last = checkpoints.latest(run.path)
    assert Path(marker["checkpoint"]).name == last.name and checkpoints.step(last) == marker["step"]
    assert f"stopped after step {marker['step']}" in said


@pytest.mark.full
@pytest.mark.nemo
def test_a_second_signal_hurries(stages):
    """Nothing is saved; the script fails."""
    run = Run(stages, "hurried", *TRAIN, "--max_steps", 2000, "--val_check_interval", 2000)
    assert run.wait_for_steps(3), run.said()[-3000:]
    ranks = run.ranks()
    ranks[0].suspend()  # so that the step does not end
    run.process.send_signal(signal.SIGTERM)
    time.sleep(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(60)[0] == 1
    assert checkpoints.latest(run.path) is None and not (run.path / "record/preempted.json").exists()
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


HEARTS = """
import os, sys, time, types
from pathlib import Path
from nemo_tutorial import callbacks

def wait(seconds):
    time.sleep(seconds)

saving = {"__name__": "saving"}
exec(compile("def save(step):\\n    for _ in range(60):\\n        step()", "model_checkpoint.py", "exec"), saving)
folder = Path(sys.argv[1])  # of the case "files" alone: in the others' nothing is written
(folder / "checkpoints").mkdir()

def grow():
    with open(folder / "checkpoints/part", "a") as file:
        file.write("more")
    time.sleep(0.1)

def retention():
    with callbacks.patience("retention"):
        wait(6)

def first_step(heart):
    heart.settled, heart.SLOW = False, 4
    heart.beat("the start")
    wait(60)

CASES = {
    "first step": first_step,
    "validation": lambda heart: (heart.on_validation_start(None, None), wait(60)),
    "validated": lambda heart: (heart.on_validation_end(None, None), wait(60)),
    "saving": lambda heart: saving["save"](lambda: wait(1)),
    "files": lambda heart: saving["save"](grow),
    "retention": lambda heart: retention(),
    "tokens": lambda heart: [(heart.beat("a token"), wait(1)) for _ in range(6)],
    "the end": lambda heart: (heart.on_train_end(None, None), wait(60)),
}
trainer = types.SimpleNamespace(num_nodes=1, global_step=3, fit_loop=None, global_rank=0)
children = {}
for name, case in CASES.items():
    children[name] = os.fork(), time.monotonic()
    if not children[name][0]:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        callbacks.write_failure = lambda *words: print("said", name, words[-1], flush=True)
        heart = callbacks.Heartbeat(str((folder if name == "files" else folder / name) / "record"), 2)
        heart.on_train_start(trainer, None)
        heart.on_train_batch_end(trainer, None, None, None, 0)
        case(heart)
        os._exit(0)
for name, (child, began) in children.items():
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), round(time.monotonic() - began), flush=True)
"""


@pytest.mark.nemo
def test_what_the_heartbeat_waits_for(tmp_path):
    """Ended within seconds where nothing moves, with validations and saves; not where files or tokens do."""
    command = [sys.executable, "-c", HEARTS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("said")]
    assert any(line.startswith("said first step nothing moved for 4 s after the start") for line in said), said
    assert any(line.startswith("said validated nothing moved for 2 s after a validation's end") for line in said), said
    lines = [line.rsplit(" ", 2) for line in done.stdout.splitlines() if line not in said]
    found = {name: rest for name, *rest in lines}
    for name in ("first step", "validation", "validated", "saving", "the end"):
        assert found[name][0] == "1" and int(found[name][1]) < 20, found
    for name in ("files", "retention", "tokens"):
        assert found[name][0] == "0", found


@pytest.mark.full
@pytest.mark.nemo
@pytest.mark.parametrize("fault", ["stopped", "stopped while saving", "killed", "exception"])
def test_all_ranks_end(stages, fault):
    """Within 120 s, with the default --hang_timeout, and what happened is said."""
    saving = "saving" in fault
    steps = 8 if saving else 5000
    run = Run(stages, f"ends_{fault.replace(' ', '_')}", *TRAIN, "--max_steps", 5000, "--val_check_interval", steps)
    assert run.wait_for_steps(5), run.said()[-3000:]
    ranks = run.ranks()
    while saving and not list(run.path.glob("checkpoints/*-unfinished")):
        time.sleep(0.01)
    began = time.monotonic()
    kind = fault.split()[0]
    ranks[1].send_signal({"stopped": signal.SIGSTOP, "killed": signal.SIGKILL, "exception": signal.SIGUSR2}[kind])
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        assert time.monotonic() - began < 120
        time.sleep(0.5)
    print(f"{fault}: all ranks gone after {time.monotonic() - began:.0f} s")
    code, said = run.wait(60)
    assert code == 1, said[-3000:]
    if kind == "stopped":
        assert re.search(r"hang at step \d+, rank 0, samples \d+ to \d+", said), said[-3000:]
    if kind == "exception":
        assert re.search(r"exception at step \d+, rank 1, samples \d+ to \d+: RuntimeError: injected", said)


@pytest.mark.nemo
def test_what_a_rank_forked_ends_with_it():
    """Of its main thread, when the rank is killed; of another thread not when that has ended."""
    from nemo_tutorial import callbacks

    read, write = os.pipe()

    def fork():
        callbacks._note_thread()
        if not os.fork():
            callbacks._in_child()
            os.write(write, b"%d\n" % os.getpid())
            time.sleep(60)
            os._exit(0)

    rank = os.fork()
    if not rank:
        fork()
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        time.sleep(60)
        os._exit(0)
    told = b""
    while told.count(b"\n") < 2:
        told += os.read(read, 100)
    first, second = (psutil.Process(int(pid)) for pid in told.split())
    try:
        assert os.getpgid(first.pid) == first.pid and os.getpgid(second.pid) == second.pid
        time.sleep(0.3)
        alive = [each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in (first, second)]
        assert alive == [True, True]
    finally:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    _, left = psutil.wait_procs([first, second], timeout=3)
    for each in left:
        each.kill()
    assert len(left) == 1


@pytest.mark.nemo
def test_nan_weights_are_not_saved(tmp_path):
    """A validation loss of NaN ends the run if weights are NaN, as the last step's; an exception is the next one's."""
    import torch

    from nemo_tutorial import callbacks

    sampler, metrics = Namespace(global_batch_size=8), {"val_loss": torch.tensor(float("nan"))}
    trainer = Namespace(
        datamodule=Namespace(data_sampler=sampler), callback_metrics=metrics, global_step=20, global_rank=1
    )
    model, guard = torch.nn.Linear(2, 2), callbacks.LossGuard(str(tmp_path))
    guard.on_validation_end(trainer, model)
    assert not list(tmp_path.iterdir())
    model.bias.data[1] = float("nan")
    with pytest.raises(SystemExit):
        guard.on_validation_end(trainer, model)
    found = json.loads((tmp_path / faults.FAILURE).read_text())
    assert (found["kind"], found["rank"], found["step"], found["samples"]) == ("NaN", 1, 20, [152, 159])
    assert "bias has NaN" in found["message"]
    (tmp_path / faults.FAILURE).unlink()
    guard.on_exception(trainer, model, RuntimeError("found NaN in local grad norm"))
    found = json.loads((tmp_path / faults.FAILURE).read_text())
    assert (found["kind"], found["step"], found["samples"]) == ("NaN", 21, [160, 167])


@pytest.mark.nemo
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_start", "on_train_end", "on_save_checkpoint"])
@pytest.mark.parametrize(
    "last, kind, message",
    [
        (
            {"reduced_train_loss": float("nan"), "grad_norm": 1.0},
            "NaN",
            "the loss is nan, in micro batch 1 of this rank",
        ),
        ({"reduced_train_loss": 2.0, "grad_norm": float("inf")}, "NaN", "the gradient norm is inf"),
        (
            {"reduced_train_loss": 2.0, "grad_norm": float("nan"), "own_gradients": float("nan")},
            "NaN",
            "the gradient norm is nan, in this rank's own gradients",
        ),
        (
            {"reduced_train_loss": 2.0, "own_gradients": float("inf")},  # nothing is clipped
            "NaN",
            "the gradient norm is inf, in this rank's own gradients",
        ),
        ({"reduced_train_loss": 9.0}, "spike", "the loss is 9, 4.5 times the mean of the 6 steps before"),
    ],
)
def test_a_step_is_judged_after_the_next_or_before_a_save(tmp_path, monkeypatch, hook, last, kind, message):
    import torch

    from nemo_tutorial import ahead, callbacks

    slept = []
    monkeypatch.setattr(callbacks.time, "sleep", slept.append)
    trainer = Namespace(datamodule=Namespace(data_sampler=Namespace(global_batch_size=8)), global_rank=0)
    guard = callbacks.LossGuard(str(tmp_path), 3)

    def step(number, values):
        trainer.global_step = number
        trainer.callback_metrics = {name: torch.tensor(value) for name, value in values.items()}
        own = values["reduced_train_loss"] if kind == "NaN" else 2.0
        norm = trainer.callback_metrics.pop("own_gradients", None)
        monkeypatch.setattr(ahead, "_norms", [] if norm is None else [norm])
        guard.on_megatron_reduce_microbatches_start(microbatch_outputs=[{"loss": torch.tensor(x)} for x in (2.0, own)])
        guard.on_train_batch_end(trainer, None, None, None, None)

    for number in range(1, 7):
        step(number, {"reduced_train_loss": 2.0, "grad_norm": 1.0})
    step(7, last)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        if hook == "on_train_batch_end":
            step(8, {"reduced_train_loss": 2.0, "grad_norm": 1.0})
        else:
            getattr(guard, hook)(trainer, None, *([{}] if hook == "on_save_checkpoint" else []))
    found = json.loads((tmp_path / faults.FAILURE).read_text())
    assert (found["kind"], found["step"], found["samples"], found["message"]) == (kind, 7, [48, 55], message)
    # A rank that can't be the one it came from lets that one be named.
    assert slept == ([] if kind == "spike" else [3] if message == "the gradient norm is inf" else [0])


@pytest.mark.nemo
def test_the_step_before_an_exception_is_the_cause(tmp_path):
    import torch

    from nemo_tutorial import callbacks

    trainer = Namespace(datamodule=Namespace(data_sampler=Namespace(global_batch_size=8)), global_rank=0, global_step=3)
    trainer.callback_metrics = {"reduced_train_loss": torch.tensor(float("nan"))}
    guard = callbacks.LossGuard(str(tmp_path))
    guard.on_megatron_reduce_microbatches_start(microbatch_outputs=[torch.tensor(float("nan"))])
    guard.on_train_batch_end(trainer, None, None, None, None)
    guard.on_exception(trainer, None, RuntimeError("found NaN in local grad norm"))
    found = json.loads((tmp_path / faults.FAILURE).read_text())
    assert (found["kind"], found["step"]) == ("NaN", 3)
    (tmp_path / faults.FAILURE).unlink()
    guard.on_exception(trainer, None, RuntimeError("found NaN in local grad norm"))
    assert json.loads((tmp_path / faults.FAILURE).read_text())["step"] == 4


@pytest.mark.nemo
def test_an_exception_does_not_wait_for_a_gpu_that_hangs(tmp_path):
    from nemo_tutorial import callbacks

    def never():
        raise AssertionError("waits")

    trainer = Namespace(datamodule=Namespace(data_sampler=Namespace(global_batch_size=8)), global_rank=0, global_step=3)
    guard = callbacks.LossGuard(str(tmp_path))
    guard.waiting = 3, [], Namespace(arrived=lambda: False, get=never)
    guard.on_exception(trainer, None, ValueError("something else"))
    assert json.loads((tmp_path / faults.FAILURE).read_text())["message"] == "ValueError: something else"


@pytest.mark.nemo
def test_the_end_after_an_exception_is_short(tmp_path):
    from nemo_tutorial import callbacks

    for exception, seconds, allowed in ((ValueError(), 90, 30), (ValueError(), 20, 20), (SystemExit(143), 90, 90)):
        heart = callbacks.Heartbeat(str(tmp_path), seconds)
        heart.on_exception(None, None, exception)
        assert heart.allowed == allowed and 0 <= time.monotonic() + allowed - heart.deadline < 1


@pytest.mark.full
@pytest.mark.nemo
def test_nan_stops_before_the_checkpoint(stages):
    """Named with step, rank and samples; not started again; the checkpoint before stays the last."""
    run = Run(
        stages, "nan", *TRAIN, "--max_steps", 3000, "--val_check_interval", 10, "--max_restarts", 3, "--save_top_k", 1
    )
    assert run.wait_for_steps(15), run.said()[-3000:]
    run.ranks()[1].send_signal(signal.SIGRTMIN)
    code, said = run.wait(300)
    assert code == 1
    found = re.search(r"NaN at step (\d+), rank (\d), samples (\d+) to (\d+)", said)
    assert found, said[-3000:]
    step, rank, first, last = map(int, found.groups())
    assert rank == 1 or "the validation loss is nan" in said  # after the step, when all ranks have the same weights
    assert (first, last) == ((step - 1) * 8, step * 8 - 1)
    assert "not started again" in said and 0 < checkpoints.step(checkpoints.latest(run.path)) < step


@pytest.mark.full
@pytest.mark.nemo
def test_restarts(stages):
    """Killed after two of its checkpoints, --max_restarts 2: every loss as in a run without a stop, beside it."""
    import torch

    fixed = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}  # of a GPU's attention
    steps = 400 if torch.cuda.is_available() else 120  # a GPU's last 0.03 s, and a save takes longer than twenty
    flags = [*TRAIN, "--max_steps", steps, "--val_check_interval", 20]
    run = Run(stages, "again", *flags, "--max_restarts", 2, **fixed)
    calm = Run(stages, "calm", *flags, **fixed)
    for rank in (0, 1):
        before = checkpoints.latest(run.path)
        while checkpoints.latest(run.path) == before:
            assert run.process.poll() is None, run.said()[-3000:]
            time.sleep(0.05)
        ranks = run.ranks()
        ranks[rank].kill()
        assert not psutil.wait_procs(ranks, timeout=120)[1], run.said()[-3000:]
    code, said = run.wait()
    assert code == 0, said[-3000:]
    first, second = map(int, re.findall(r"restart \d of 2 from step (\d+)", said))
    assert 20 <= first < second <= steps - 20
    assert calm.wait()[0] == 0
    assert losses(run.path) == losses(calm.path) and len(losses(run.path)) == steps


@pytest.mark.full
@pytest.mark.nemo
def test_other_layouts_go_on(stages):
    """1 -> TP 2, TP 2 -> PP 2 and PP 2 -> DP 2 after six of twelve steps, fp32: losses within 1e-3 of one process'."""
    fp32 = [*TRAIN, "--precision", "fp32", "--max_steps", 12, "--val_check_interval", 6]
    exact = {"NVIDIA_TF32_OVERRIDE": "0"}  # on a GPU Transformer Engine's products of fp32 are of TF32 otherwise
    one, tp, pp, dp = ([], 1), (["-T", 2], 2), (["-P", 2], 2), ([], 2)
    moves = {"one_to_tp": (one, tp), "tp_to_pp": (tp, pp), "pp_to_dp": (pp, dp)}
    whole = Run(stages, "whole", *fp32, ranks=1, **exact)
    for part in (0, 1):
        runs = []
        for name, move in moves.items():
            layout, ranks = move[part]
            runs.append(Run(stages, name, *fp32, "--exit_interval", 6, *layout, ranks=ranks, **exact))
        for run in runs:
            code, said = run.wait()
            assert code == 0, said[-3000:]
            assert part == 0 or "goes on from step 6 " in said
    assert whole.wait()[0] == 0, whole.said()[-3000:]
    expected = losses(whole.path)
    assert len(expected) == 12
    for run in runs:
        found = losses(run.path)
        worst = max(abs(found[step] - expected[step]) for step in expected)
        print(f"{run.name}: largest difference of a loss {worst:.2g}")
        assert worst < 1e-3


@pytest.mark.full
@pytest.mark.nemo
def test_trained_further(stages):
    """Finished, then --max_steps raised: the learning rates are those of the new schedule, from the first new step."""
    from nemo_tutorial import schedule

    first = Run(stages, "further", *TRAIN, "--max_steps", 10, "--val_check_interval", 10, ranks=1)
    assert first.wait()[0] == 0, first.said()[-3000:]
    run = Run(stages, "further", *TRAIN, "--max_steps", 30, "--val_check_interval", 10, ranks=1)
    code, said = run.wait()
    assert code == 0 and "--max_steps 10 -> 30" in said, said[-3000:]
    lines = [json.loads(line) for line in run.metrics_text()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "loss" in line}
    for step in range(11, 31):
        expected = schedule.learning_rate(step - 1, 6e-3, 6e-4, 3, 30)
        assert rates[step] == pytest.approx(expected, rel=1e-4), step


@pytest.mark.nemo
def test_only_a_step_that_draws_is_seeded(monkeypatch):
    import torch

    from nemo_tutorial import callbacks

    seeds = []
    monkeypatch.setattr(callbacks.megatron_init, "_set_random_seed", seeds.append)
    for dropout, module, expected in ((0.0, 0.0, 0), (0.1, 0.0, 2), (0.0, 0.1, 2)):
        seeds.clear()
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(module))
        model.config = Namespace(hidden_dropout=dropout, attention_dropout=0.0)
        callback = callbacks.RandomState(7)
        for step in range(2):
            callback.on_train_batch_start(Namespace(global_step=step), model, None, step)
        assert len(set(seeds)) == expected


@pytest.mark.full
@pytest.mark.nemo
def test_dropout_goes_on_bit_equal(rows):
    """LoRA with its dropout, stopped by a signal and gone on: every loss as in a run without a stop."""
    flags = (*LORA, "--max_steps", 40, "--val_check_interval", 10)
    calm = Run(rows, "lora_calm", *flags, of="finetuning/finetune.py")
    assert calm.wait()[0] == 0, calm.said()[-3000:]
    run = Run(rows, "lora_stopped", *flags, of="finetuning/finetune.py")
    assert run.wait_for_steps(13), run.said()[-3000:]
    run.ranks()[0].send_signal(signal.SIGTERM)
    code, said = run.wait()
    assert code == 143, said[-3000:]
    stopped = checkpoints.step(checkpoints.latest(run.path))
    assert 10 < stopped < 40  # after a checkpoint, and the validations are lines too
    run = Run(rows, "lora_stopped", *flags, of="finetuning/finetune.py")
    assert run.wait()[0] == 0, run.said()[-3000:]
    assert losses(run.path) == losses(calm.path)


@pytest.mark.full
@pytest.mark.nemo
def test_optimizer_of_the_last_alone(stages):
    """--keep_optimizer last: older checkpoints have a quarter of the size, and are good to start from."""
    flags = (*TRAIN, "--max_steps", 12, "--val_check_interval", 4, "--save_top_k", 3, "--keep_optimizer", "last")
    run = Run(stages, "lean", *flags)
    code, said = run.wait()
    assert code == 0, said[-3000:]
    last = checkpoints.latest(run.path).resolve()
    others = [path for path in last.parent.iterdir() if not path.is_symlink() and path != last and path.is_dir()]
    assert len(others) == 2
    for path in others:
        assert checkpoints.problem(path) is None and (path / checkpoints.NO_OPTIMIZER).exists()
        assert checkpoints.size(path / "weights") < 0.3 * checkpoints.size(last / "weights")
    newest = max(others, key=checkpoints.step)
    again = [word if word != "nemo_ckpt/tiny" else str(newest) for word in TRAIN]
    next_run = Run(stages, "from_lean", *again, "--max_steps", 2, "--val_check_interval", 2)
    code, said = next_run.wait()
    assert code == 0, said[-3000:]
    assert losses(next_run.path)[1] < losses(run.path)[1]  # trained weights, and not the first ones


@pytest.mark.nemo
def test_the_tokenizer_outlives_the_checkpoint_that_a_run_went_on_from(stages, tmp_path):
    """Older checkpoints are removed while a run goes on; it may start again by itself, and saves the tokenizer."""
    from transformers import AutoTokenizer

    from nemo_tutorial import runs

    run = tmp_path / "results/run"
    checkpoint = run / "checkpoints/model_name=0--val_loss=1.50-step=3-consumed_samples=32.0"
    shutil.copytree(stages / "nemo_ckpt/tiny", checkpoint)
    _, folder = runs.Source(resume_from=checkpoint, run=run).config_and_tokenizer()
    expected = AutoTokenizer.from_pretrained(stages / "hf_model/tiny")("a word")
    shutil.rmtree(checkpoint)
    assert AutoTokenizer.from_pretrained(folder)("a word") == expected
    assert (folder / "config.json").read_bytes() == (stages / "hf_model/tiny/config.json").read_bytes()


# The campaign


def strike(ranks, kind, chance, ballast):
    """Do a fault of this kind to running ranks."""
    if kind == "disk":
        disk = os.statvfs(ballast.parent)
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, disk.f_bavail * disk.f_bsize - (4 << 20)))
        return
    signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "exception": signal.SIGUSR2, "hang": signal.SIGSTOP}
    ranks[chance.randrange(len(ranks))].send_signal(signals[kind])


def _reached(run):
    """The step of a run's newest complete checkpoint, 0 before the first."""
    last = checkpoints.latest(run.path)
    return checkpoints.step(last) if last else 0


def gone(ranks):
    return not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.full
@pytest.mark.nemo
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the results lie on a small disk of their own (tmpfs)")
def test_thirty_interruptions(stages):
    """At random moments of one run on two processes: nothing lost, never from scratch, every loss bit-equal.

    After a signal the command is given again; after the other faults it starts itself again (--max_restarts). As three
    failures at one step end a run for good, the third waits until there is a newer checkpoint.
    """
    chance = random.Random(int(os.environ.get("FAULTS_SEED", "1")))
    count = int(os.environ.get("FAULTS_COUNT", "30"))
    kinds = (["kill", "term", "exception", "hang", "disk"] * count)[:count]
    chance.shuffle(kinds)
    steps = 12 * count
    flags = (*TRAIN, "--val_check_interval", 6, "--limit_val_batches", 1, "--max_steps", steps)
    calm = Run(stages, "campaign_calm", *flags)
    assert calm.wait(1800)[0] == 0, calm.said()[-3000:]
    folder = stages / "campaign"
    (folder / "results").mkdir(parents=True)
    for name in ("data", "nemo_ckpt"):
        (folder / name).symlink_to(stages / name)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=110m", "tmpfs", folder / "results"], check=True)
    ballast, told, run, step, stuck = folder / "results/ballast", [], None, 0, 0
    faulty = (*flags, "--max_restarts", 99, "--hang_timeout", 15)
    try:
        for kind in kinds:
            if run is None:
                run = Run(folder, "run", *faulty)
            if not run.wait_for_steps(1):
                break
            first = json.loads(run.metrics_text()[run.lines])["step"]
            assert first in (step, step + 1), (first, step, told)  # a validation of that step, or the next step
            while stuck == 2 and _reached(run) == step:
                time.sleep(0.1)
            time.sleep(chance.uniform(0, 3))
            ranks = run.ranks()
            if len(ranks) < 2:
                break  # it has just ended
            strike(ranks, kind, chance, ballast)
            began, lines = time.monotonic(), len(run.metrics_text())
            while not gone(ranks):
                if kind == "exception" and len(run.metrics_text()) > lines + 6:
                    # Raised in a destructor, say, an exception is lost; the run went on.
                    strike(ranks, kind, chance, ballast)
                    lines = len(run.metrics_text())
                assert time.monotonic() - began < 120, run.said()[-3000:]
                time.sleep(0.1)
            seconds = time.monotonic() - began
            ballast.unlink(missing_ok=True)
            reached, run.lines = _reached(run), len(run.metrics_text())
            told.append(
                (len(told) + 1, kind, f"at {first}", f"goes on from {reached}", f"ranks gone in {seconds:.0f} s")
            )
            print(*told[-1], flush=True)
            assert reached >= step, told
            stuck = 0 if kind == "term" else stuck + 1 if reached == step and stuck else 1
            step = reached
            if kind == "term":
                assert run.wait(120)[0] in (143, 0), run.said()[-3000:]
                run = None
        while step < steps:
            run = run or Run(folder, "run", *faulty)
            assert run.wait(1800)[0] == 0, run.said()[-4000:]
            step, run = checkpoints.step(checkpoints.latest(run.path)), None
        found, expected = losses(folder / "results/run"), losses(calm.path)
        assert sorted(found) == list(range(1, steps + 1))
        assert found == expected
        print(f"{len(told)} interruptions in {steps} steps: every loss bit-equal")
    finally:
        if run and run.process.poll() is None:
            run.process.kill()
            for rank in run.ranks():
                rank.kill()
        subprocess.run(["umount", "-l", folder / "results"], check=False)

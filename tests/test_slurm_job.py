"""The script as Slurm runs it, its ranks' place taken by a small program: requeued, chained, failed, stopped.

With the real ranks, and much slower: tests/test_slurm.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from nemo_tutorial import executors, plan, preflight, slurm

# Two ranks that count tenths of seconds as steps, for ever in a first start, and stop as ours do.
RANK = """\
import json, os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1]).parents[1]
rank, told = os.environ["SLURM_PROCID"], []
signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
saved = run / f"saved.{rank}"
step = int(saved.read_text()) if saved.exists() else 0
steps = step + 20 if saved.exists() else 10**9
(run / f"pid.{rank}").write_text(str(os.getpid()))
while step < steps:
    time.sleep(0.1)
    step += 0 if "STUCK" in os.environ else 1
    if told:
        saved.write_text(str(step))
        if rank == "0":
            (run / "record" / "preempted.json").write_text(json.dumps({"step": step, "signal": "SIGUSR1"}))
        time.sleep(0.5)
        sys.exit(143)
"""


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch, load_script):
    """Write and submit a job of two nodes: (its ids, the run's folder)."""
    monkeypatch.chdir(tmp_path)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)

    def submit(name, *flags, **env):
        words = ["--executor", "slurm", "--accelerator", "cpu", "-N", 2, "-E", name, "-D", "x", "-g", 2, *flags]
        args = load_script("pretraining/pretrain.py").parse_args([*map(str, words)])
        assert preflight.fill_hardware(args) + preflight.execution_problems(args) == []
        plan.choose_sizes(args, None)
        for key, value in env.items():
            monkeypatch.setenv(key, str(value))
        path = slurm.write(args, "pretraining", executors.environment(args), recipe="")
        (path.parent / "code" / "nemo_tutorial" / "rank.py").write_text(RANK)
        run = path.parents[1]
        (run / "record").mkdir()
        numbers, error = slurm.submit(args, path)
        assert error is None
        return numbers, run

    return submit


def history(run):
    return (run / "slurm" / "history.txt").read_text()


def started(cluster, run, times=1):
    """Wait until both ranks have begun, for the n-th time."""
    cluster.until(lambda: history(run).count("started on") == times, "the start", 60)
    pids = [run / f"pid.{rank}" for rank in "01"]
    cluster.until(lambda: all(pid.exists() for pid in pids), "the ranks", 30)
    time.sleep(1)


def limit(cluster, job):
    """The time limit comes so near that the warning is due."""
    cluster.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1", check=True)


def test_time_limit_requeue_and_end(submit, cluster):
    (job,), run = submit("limit", "--time", 30, "--save_before", 60)
    started(cluster, run)
    for pid in run.glob("pid.*"):
        pid.unlink()
    limit(cluster, job)
    cluster.until(lambda: " requeued" in history(run), "the requeueing", 90)
    began = time.monotonic()
    assert cluster.end(job, 240) == "COMPLETED"
    words = history(run)
    assert words.count("started on") == 2 and words.endswith(" done\n")
    assert f"job {job}.1 started" in words
    assert slurm.exit_code(run, job) == 0 and slurm.jobs(run) == [job]
    print(f"{time.monotonic() - began:.0f} s from the requeueing to the end")


def test_failure_stop_and_cancel(submit, cluster):
    """A killed rank, a person's wish to stop, a plain scancel: never requeued, and the exit code says what it was."""
    (job,), run = submit("killed")
    started(cluster, run)
    os.kill(int((run / "pid.1").read_text()), signal.SIGKILL)
    assert cluster.end(job, 60) == "FAILED" and slurm.exit_code(run, job) == 1
    assert "rank 1 on n2: Killed; its last lines:" in slurm.wait(run, [job])[1]
    assert "failed: srun's exit code is" in history(run) and "Restarts=0" in cluster.slurm(
        "scontrol", "show", "job", job
    )

    (job,), run = submit("asked")
    started(cluster, run)
    words = [sys.executable, "-m", "nemo_tutorial.executors", "cancel", str(run)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"job {job} was told to save and stop\n")
    assert cluster.end(job, 60) == "FAILED" and slurm.exit_code(run, job) == 143
    assert "ExitCode=143:0" in cluster.slurm("scontrol", "show", "job", job)
    assert json.loads((run / "record" / "preempted.json").read_text())["step"] > 0

    (job,), run = submit("cancelled")
    started(cluster, run)
    cluster.slurm("scancel", job, check=True)
    assert cluster.end(job, 60) == "CANCELLED" and slurm.exit_code(run, job) == 1
    assert not slurm.alive(run)
    code, lines = slurm.wait(run, [job])
    assert code == 1 and f"job {job}: " in lines[0]


def test_no_progress_ends_the_requeueing(submit, cluster):
    (job,), run = submit("stuck", "--time", 30, "--save_before", 60, STUCK=1)
    (run / "record" / "preempted.json").write_text('{"step": 0, "signal": "SIGUSR1"}')
    started(cluster, run)
    limit(cluster, job)
    assert cluster.end(job, 90) == "FAILED"
    assert history(run).endswith("failed: no step between two time limits\n")


def test_chain(submit, cluster):
    """Where there is no requeueing: the second goes on, the third finds it done. After a failure nothing is done."""
    jobs, run = submit("chain", "--chain", 3, "--time", 30, "--save_before", 60)
    started(cluster, run)
    limit(cluster, jobs[0])
    states = [cluster.end(job, 120) for job in jobs]
    assert states == ["FAILED", "COMPLETED", "COMPLETED"] and slurm.jobs(run) == jobs
    assert re.findall(r"job (\d+)\.0 (started|done)", history(run)) == [
        (jobs[0], "started"),
        (jobs[1], "started"),
        (jobs[1], "done"),
    ]
    assert slurm.wait(run, jobs) == (0, [])

    jobs, run = submit("failed", "--chain", 2)
    started(cluster, run)
    os.kill(int((run / "pid.0").read_text()), signal.SIGKILL)
    assert [cluster.end(job, 60) for job in jobs] == ["FAILED", "FAILED"]
    assert history(run).count("started on") == 1
    assert slurm.wait(run, jobs)[0] == 1

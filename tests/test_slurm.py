"""Runs on a real Slurm of two nodes, without GPUs and containers: TP over nodes, tokens, time limits, faults."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
from conftest import ROOT, losses, script

from nemo_tutorial import checkpoints

pytestmark = pytest.mark.nemo
CANARY = "hf_canaryTq7Zx31bLk"
NAME = "tp2 $(touch executed) 'it' 測試"
MODE = ["--executor", "slurm", "--container", "none", "--accelerator", "cpu", "--gres", "none"]
TRAIN = "--nemo_model nemo_ckpt/tiny --dataset_path data/pre --split 90,10,0 -s 128 -g 8 --lr 6e-3 --num_workers 0 "
TRAIN = (TRAIN + "--precision fp32").split()


def pretrain(folder, cluster, name, *flags, check=True, **env):
    env = {"SLURM_CONF": cluster.env["SLURM_CONF"], **env}
    return script(folder, "pretraining/pretrain.py", *MODE, "-E", name, *TRAIN, *flags, check=check, **env)


def encoded(token):
    """What a token looks like in a file: plain, hex, and in base64 at each of the three places it can begin."""
    yield token.encode()
    yield token.encode().hex().encode()
    for before in range(3):
        text = base64.b64encode(b"\0" * before + token.encode())
        yield text[-(-before * 8 // 6) + (before > 0) :].rstrip(b"=")[:-2]


def contents(folder):
    """Every file's bytes, and what is packed in it (zlib in base64, as NeMo-Run packs)."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            yield path, data
            for packed in re.findall(rb"[A-Za-z0-9+/_-]{200,}={0,2}", data):
                for decode in (base64.b64decode, base64.urlsafe_b64decode):
                    with contextlib.suppress(ValueError, zlib.error):
                        yield path, zlib.decompress(decode(packed))


@contextlib.contextmanager
def watching(*commands):
    """The output of `commands`, again and again while the block runs, in one list."""
    seen, over = [], threading.Event()

    def watch():
        while not over.wait(0.5):
            for command in commands:
                seen.append(subprocess.run(command, shell=True, capture_output=True, text=True).stdout)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


# In the rank's own process, before anything else of it: does the token reach the Hub?
ASK = """\
import os, sys
if any(word.endswith("rank.py") for word in sys.orig_argv) and os.environ.get("SLURM_PROCID"):
    import huggingface_hub
    huggingface_hub.HfApi().model_info("lab/private")
"""


def test_two_nodes_a_token_and_a_hostile_name(stages, cluster, server, tmp_path):
    """TP over two nodes, waited for: done and checked, the network measured, the token used, and nowhere to be read."""
    server.add("lab/private", stages / "hf_model/tiny")
    (tmp_path / "sitecustomize.py").write_text(ASK)
    env = {
        "HF_TOKEN": CANARY,
        "WANDB_API_KEY": CANARY,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(tmp_path),
    }
    slurm_conf = f"SLURM_CONF={cluster.env['SLURM_CONF']} "
    batch = f"for job in $({slurm_conf} squeue -h -o %i); do {slurm_conf} scontrol write batch_script $job -; done"
    with watching(
        "ps axww -o args", slurm_conf + "scontrol show job -d", slurm_conf + "scontrol show steps", batch
    ) as seen:
        done = pretrain(stages, cluster, NAME, "-N", 2, "-G", 1, "-T", 2, "--max_steps", 4, "--wait", **env)
    run = stages / "results" / NAME
    log = next((run / "slurm").glob("*.log"))
    job = log.stem
    # What a user sees.
    assert f"submitted as job {job}" in done.stdout and str(run / "slurm" / "script.sh") in done.stdout
    for words in ("tail -F ", f"scancel {job} ", "sbatch "):
        assert words in done.stdout
    assert re.search(r"result +done", done.stdout) and checkpoints.step(checkpoints.latest(run)) == 4
    assert sorted(losses(stages / "results" / NAME)) == [1, 2, 3, 4]
    text = log.read_text()
    assert re.search(r"network: 2 ranks on 2 node\(s\) add 4 MiB in [\d.]+ ms, [\d.]+ GB/s a rank", text)
    assert text in done.stdout  # the log was followed
    assert "started on n[1-2]" in text and (run / "slurm" / "history.txt").read_text().endswith(" done\n")
    # The token reached the Hub from both ranks, and no place that anyone could read.
    asked = [line for line in server.log if line[1] == "/api/models/lab/private"]
    assert len(asked) == 2 and all(line[3] == f"Bearer {CANARY}" for line in asked)
    forms = list(encoded(CANARY))
    for path, data in contents(stages):
        assert not any(form in data for form in forms), path
    everything = "\n".join([*seen, done.stdout, done.stderr]).encode()
    assert b"rank.py" in everything and b"#SBATCH --open-mode=append" in everything
    assert not any(form in everything for form in forms)
    assert log.stat().st_mode & 0o777 == 0o600
    assert not list(stages.rglob("executed"))
    # And afterwards.
    words = [sys.executable, "-m", "nemo_tutorial.executors", "status", str(run)]
    status = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | cluster.env)
    assert f"job {job}" in status.stdout and "4 of 4" in status.stdout, status
    words[3] = "cancel"
    refused = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | cluster.env)
    assert refused.returncode == 2 and "nothing of" in refused.stderr


def test_what_slurm_refuses_is_said_at_once(stages, cluster):
    """A partition that is not there, more nodes than there are: exit code 2 with Slurm's words, before NeMo."""
    began = time.monotonic()
    done = pretrain(stages, cluster, "refused", "-G", 1, "--max_steps", 4, "--partition", "no-such", check=False)
    assert done.returncode == 2 and "invalid partition" in done.stderr and "--partition no-such" in done.stderr
    done = pretrain(stages, cluster, "refused", "-N", 3, "-G", 1, "--max_steps", 4, "-g", 9, check=False)
    assert done.returncode == 2 and "--num_nodes 3" in done.stderr
    assert time.monotonic() - began < 10
    assert not (stages / "results" / "refused").exists()


class Run:
    """A run of many steps that is submitted once, watched, and disturbed."""

    def __init__(self, folder, cluster, name, *flags):
        self.folder, self.cluster, self.name = folder, cluster, name
        done = pretrain(folder, cluster, name, "-G", 1, *flags)
        self.job = re.search(r"submitted as job (\d+)", done.stdout).group(1)
        self.path = folder / "results" / name

    def again(self):
        """Submit the script by hand, as the README says."""
        path = str(self.path / "slurm" / "script.sh")
        self.job = self.cluster.slurm("sbatch", "--parsable", path, check=True).strip()

    def step(self):
        return max(losses(self.path), default=0) if (self.path / "record/metrics.jsonl").exists() else 0

    def reach(self, step):
        self.cluster.until(lambda: self.step() >= step, f"step {step} of {self.name}", 300)

    def history(self):
        return (self.path / "slurm" / "history.txt").read_text().splitlines()

    def requeued(self):
        return sum(line.endswith(" requeued") for line in self.history())

    def seconds_of_job(self):
        text = self.cluster.slurm("squeue", "-h", "-j", self.job, "-o", "%M")
        return sum(int(part) * 60**place for place, part in enumerate(reversed(text.strip().split(":"))))


# Steps of two seconds: Slurm looks at time limits twice a minute.
STEPS = ["-N", 2, "-T", 2, "--max_steps", 60, "--val_check_interval", 15, "-m", 4, "-g", 192]


@pytest.fixture(scope="session")
def undisturbed(stages, cluster):
    run = Run(stages, cluster, "undisturbed", *STEPS)
    assert cluster.end(run.job) == "COMPLETED"
    return run


def equal(run, other):
    """Every loss, and every byte of the last checkpoint's weights."""
    ours, theirs = losses(run.path), losses(other.path)
    assert sorted(ours) == list(range(1, 61)) and ours == theirs
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    found = []
    for one in (run, other):
        file = one.path / "weights.pt"
        dcp_to_torch_save(checkpoints.latest(one.path) / "weights", file)
        found.append(torch.load(file, weights_only=False))
    compared = 0
    for key, value in found[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, found[1][key]), key
            compared += 1
    assert compared > 10


@pytest.mark.full
def test_submitting_takes_little_more_than_importing_nemo(stages, cluster):
    """The quickest of three, in turn: from the command to the submitted job, and NeMo's import alone."""
    imported, submitted = [], []
    code = "import nemo_tutorial, nemo_run; from nemo_tutorial import recipes"
    for number in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", code], cwd=stages, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        imported.append(time.monotonic() - began)
        began = time.monotonic()
        run = Run(stages, cluster, f"quick{number}", "-N", 2, "-T", 2, "--max_steps", 4)
        submitted.append(time.monotonic() - began)
        cluster.slurm("scancel", run.job)
        cluster.end(run.job)
    print(f"import {min(imported):.1f} s, submitted after {min(submitted):.1f} s")
    assert min(submitted) - min(imported) < 2


@pytest.mark.full
def test_three_time_limits(stages, cluster, undisturbed):
    """Warned ahead of the limit, saved, requeued, gone on, three times; then bit-equal to the run without a limit."""
    run = Run(stages, cluster, "limits", *STEPS, "--time", "30", "--save_before", 60)
    for step in (8, 22, 36):
        run.reach(step)
        # The limit comes to the run: within a minute from now, so that the warning is due.
        limit, ends = run.seconds_of_job() // 60 + 1, run.requeued() + 1
        cluster.slurm("scontrol", "update", f"JobId={run.job}", f"TimeLimit={limit}", check=True)
        cluster.until(lambda ends=ends: run.requeued() == ends, "the requeueing", 150)
        cluster.slurm("scontrol", "update", f"JobId={run.job}", "TimeLimit=30", check=True)
    assert cluster.end(run.job) == "COMPLETED"
    history = "\n".join(run.history())
    assert history.count("started on") == 4 and history.endswith(" done")
    assert len(set(re.findall(r'"step": (\d+)', history))) == 3
    equal(run, undisturbed)


@pytest.mark.full
def test_faults(stages, cluster, undisturbed):
    """Asked to stop, slurmctld restarted, a node drained, a rank killed, cancelled: nothing lost, in the end equal."""
    run = Run(stages, cluster, "faults", *STEPS)

    run.reach(10)
    cluster.slurm("scancel", "--signal=USR1", "--batch", run.job, check=True)
    assert cluster.end(run.job) == "FAILED" and "ExitCode=143:0" in cluster.slurm("scontrol", "show", "job", run.job)
    saved = json.loads((run.path / "record" / "preempted.json").read_text())
    assert saved["step"] >= 10 and checkpoints.step(checkpoints.latest(run.path)) == saved["step"]

    run.again()
    run.reach(saved["step"] + 3)
    cluster.restart("slurmctld")
    cluster.until(lambda: cluster.state(run.job) == "RUNNING", "slurmctld")
    cluster.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test", check=True)
    run.reach(saved["step"] + 8)
    assert cluster.state(run.job) == "RUNNING"
    ranks = subprocess.run(["pgrep", "-f", f"{run.name}/slurm/recipe"], capture_output=True, text=True).stdout.split()
    ranks = [pid for pid in ranks if "rank.py" in Path(f"/proc/{pid}/cmdline").read_text() and _is_python(pid)]
    os.kill(int(ranks[-1]), 9)
    assert cluster.end(run.job) == "FAILED"
    assert "failed: srun's exit code is" in run.history()[-1]
    assert "Restarts=0" in cluster.slurm("scontrol", "show", "job", run.job)
    kept = checkpoints.step(checkpoints.latest(run.path))
    assert kept >= saved["step"]

    cluster.slurm("scontrol", "update", "NodeName=n2", "State=RESUME", check=True)
    run.again()
    run.reach(run.step() + 2)
    before = checkpoints.latest(run.path)
    cluster.slurm("scancel", run.job, check=True)
    assert cluster.end(run.job) == "CANCELLED"
    time.sleep(3)
    latest = checkpoints.latest(run.path)
    assert checkpoints.problem(latest) is None and checkpoints.step(latest) >= checkpoints.step(before)
    assert not cluster.slurm("squeue", "-h")

    run.again()
    assert cluster.end(run.job) == "COMPLETED"
    equal(run, undisturbed)


def _is_python(pid):
    return "python" in Path(f"/proc/{pid}/exe").resolve().name


@pytest.mark.full
def test_chain(stages, cluster):
    """Three jobs, one after another, where there is no requeueing: the second goes on, the third has nothing to do."""
    run = Run(stages, cluster, "chain", *STEPS, "--chain", 3, "--time", "30", "--save_before", 60)
    first = int(run.job)
    run.reach(10)
    limit = run.seconds_of_job() // 60 + 1
    cluster.slurm("scontrol", "update", f"JobId={first}", f"TimeLimit={limit}", check=True)
    assert cluster.end(first) == "FAILED"
    assert cluster.end(first + 1) == "COMPLETED" and cluster.end(first + 2) == "COMPLETED"
    assert sorted(losses(stages / "results/chain")) == list(range(1, 61))
    history = "\n".join(run.history())
    assert history.count("started on") == 2 and f"job {first + 1}.0 done" in history


@pytest.mark.full
@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_losses_are_those_of_one_node(stages, cluster, layout):
    """Ten steps over two nodes, against one process on this machine: within 1e-3."""
    flags = ["--max_steps", 10, "--val_check_interval", 10]
    if not (stages / "results" / "one_node").exists():
        script(stages, "pretraining/pretrain.py", "-E", "one_node", *TRAIN, "-G", 1, *flags)
    pretrain(stages, cluster, layout, "-N", 2, "-G", 1, *flags, "-T", 2 if layout == "tp2" else 1, "--wait")
    one, two = losses(stages / "results/one_node"), losses(stages / "results" / layout)
    assert sorted(one) == sorted(two) == list(range(1, 11))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-3


@pytest.mark.full
def test_all_stages(tmp_path, cluster):
    """slurm/*.sh, chained by all.sh, with the values of a tiny model: a Hugging Face model at the end."""
    work = tmp_path / "work"
    shutil.copytree(ROOT, work, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", "results", "quickstart"))
    script(work, "data/make_tiny_model.py", "--output_path", "hf_model/tiny")
    more = "--container none --accelerator cpu -s 128 --lr 4e-3 --num_workers 0"
    values = {
        "PYTHON": sys.executable,
        "TEXT": "data/sample/corpus.jsonl",
        "DATASET": "data/sample/instructions.jsonl",
        "CHECKPOINT": "nemo_ckpt/tiny",
        "GPUS": "1",
        "STEPS": "10",
        "BATCH": "8",
        "TIME": "30",
    }
    for path in (work / "slurm").glob("*.sh"):
        text = path.read_text()
        for name, value in values.items():
            text = re.sub(rf"^{name}=.*", f"{name}={value}", text, flags=re.MULTILINE)
        text = re.sub(r"^MODEL=meta.*", "MODEL=hf_model/tiny", text, flags=re.MULTILINE)
        # Of so few rows, the default ratios leave two for validation.
        text = text.replace('--output_path "$DATA"', '--output_path "$DATA" --ratios 80,15,5')
        extra = " --split 90,10,0" if path.name == "pretrain.sh" else ""
        text = re.sub(r"^MORE=.*", f"MORE=({more}{extra})", text, flags=re.MULTILINE)
        text = re.sub(r"^#SBATCH --(mem|cpus-per-task)=.*\n", "", text, flags=re.MULTILINE)
        path.write_text(text)
    done = subprocess.run(
        ["bash", "slurm/all.sh"], cwd=work, capture_output=True, text=True, env=os.environ | cluster.env
    )
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"\d+", done.stdout)
    assert len(jobs) == 6
    for job in jobs:
        state = cluster.end(job, 900)
        logs = "\n".join(log.read_text()[-3000:] for log in work.glob(f"*-{job}.log"))
        assert state in ("COMPLETED", ""), logs
    assert (work / "hf_ckpt" / "model.safetensors").is_file() or list((work / "hf_ckpt").glob("*.safetensors"))
    for name in ("llama31_pretraining", "llama31_finetuning"):
        assert checkpoints.step(checkpoints.latest(work / "results" / name)) == 10


def test_dry_run_full_writes_what_sbatch_needs(stages):
    """Two nodes of eight GPUs: the recipe with what was corrected is shown; script, recipe and code lie in the run."""
    argv = "--executor slurm --container_image nvcr.io#nvidia/nemo:25.02 -N 2 -G 8 -T 2 -g 16 --max_steps 4"
    flags = [*TRAIN, *argv.split(), "-E", "dry_run_full", "--dry_run", "full"]
    done = script(stages, "pretraining/pretrain.py", *flags, HF_TOKEN=CANARY, WANDB_API_KEY=CANARY)
    folder = stages / "results" / "dry_run_full" / "slurm"
    for words in ("tensor_model_parallel_size: 2", "resume.NewestComplete", "sequence_parallel: true"):
        assert words in done.stdout
    assert (folder / "script.sh").read_text() in done.stdout and f"sbatch {folder / 'script.sh'}" in done.stdout
    assert (folder / "recipe").stat().st_mode & 0o777 == 0o600
    assert (folder / "code" / "nemo_tutorial" / "rank.py").read_text() == (ROOT / "nemo_tutorial/rank.py").read_text()
    assert CANARY not in done.stdout + done.stderr
    forms = list(encoded(CANARY))
    for path, data in contents(folder):
        assert not any(form in data for form in forms), path
    # The forms do find a token, wherever it begins.
    for before in range(3):
        hidden = base64.b64encode(b"x" * before + CANARY.encode() + b"yz")
        assert any(form in hidden for form in forms)

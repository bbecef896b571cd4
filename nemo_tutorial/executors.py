"""Where a recipe runs: NeMo-Run's local (torchrun) and Slurm executors, and what became of the job."""

import contextlib
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import nemo_run as run
import psutil
from nemo_run.core.frontend.console.api import CONSOLE

from nemo_tutorial import compat, faults, terminal

ROOT = Path(__file__).resolve().parents[1]
# What torchrun passes on to the ranks, and how long it lets them save before it kills them: 30 s if it isn't told.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SAVING = 1800
SECRETS = ("HF_TOKEN", "WANDB_API_KEY")  # never written anywhere: ranks inherit them from the environment


def environment(args):
    """Environment variables for the ranks, none of them secret."""
    path = [str(ROOT), os.environ.get("PYTHONPATH")]
    if args.accelerator == "cpu":
        path.insert(0, str(ROOT / "nemo_tutorial" / "no_gpu"))
    values = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "TOKENIZERS_PARALLELISM": "false"}
    values |= {"TORCHELASTIC_SIGNALS_TO_HANDLE": SIGNALS, "PET_SIGNALS_TO_HANDLE": SIGNALS}  # by the age of torch
    values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVING)
    if args.accelerator == "gpu":
        values |= {"TORCH_NCCL_AVOID_RECORD_STREAMS": "1", "NCCL_NVLS_ENABLE": "0"}
    if args.accelerator == "gpu" and args.tensor_model_parallel_size > 1:
        values["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it with TP, up to Hopper
    if args.accelerator == "cpu":
        values["CUDA_VISIBLE_DEVICES"] = ""
        values["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.num_gpus))
    if not any(os.environ.get(name) for name in ("HF_TOKEN", "HF_ENDPOINT")):
        values["HF_HUB_OFFLINE"] = "1"  # the launcher has fetched what is needed; ranks must not each ask the Hub
    return values


def local(args):
    """torchrun on this machine."""
    # NeMo-Run calls torchrun by name: this Python's own must come first.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    nodes = compat.supported(run.LocalExecutor, nodes=args.num_nodes)
    return run.LocalExecutor(launcher="torchrun", ntasks_per_node=args.num_gpus, env_vars=environment(args), **nodes)


def slurm(args):
    """sbatch, with the NeMo container if one is named. The environment, tokens included, is inherited by name."""
    work = sorted({str(Path.cwd()), str(ROOT)})
    gpus = {"gpus_per_node": args.num_gpus, "gres": f"gpu:{args.num_gpus}"} if args.accelerator == "gpu" else {}
    container = {}
    if args.container_image:
        container = {
            "container_image": args.container_image,
            "container_mounts": [f"{folder}:{folder}" for folder in work],
            **compat.supported(run.SlurmExecutor, container_env=[name for name in SECRETS if os.environ.get(name)]),
        }
    return run.SlurmExecutor(
        account=args.account,
        partition=args.partition,
        time=args.time,
        nodes=args.num_nodes,
        ntasks_per_node=args.num_gpus,
        exclusive=True,
        mem="0",
        # NeMo-Run writes `export NAME=value` unquoted: a space would end the value, `;` start a command.
        env_vars={name: shlex.quote(value) for name, value in environment(args).items()},
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=str(Path("experiments").absolute())),
        **gpus,
        **container,
    )


def launch(recipe, args, name):
    """Run `recipe` and return (exit code, lines to show).

    0 done or submitted, 1 failed, 130 interrupted by Ctrl-C, 143 stopped by a signal. NeMo-Run itself returns normally
    from a job that failed, so its state is read.
    """
    executor = {"local": local, "slurm": slurm}[args.executor](args)
    detach = args.executor == "slurm"
    interrupted = []
    if not detach:
        # A handler and no KeyboardInterrupt: NeMo-Run waits for the job while the `with` below is left, in a thread
        # pool that an exception would wait for too. Once the ranks are gone that wait ends by itself. Set by hand,
        # because Python leaves Ctrl-C ignored where the shell did (`script &`).
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: _on_signal(number, interrupted))
    with run.Experiment(args.experiment, base_dir=str(Path.cwd()), skip_status_at_exit=True) as experiment:
        experiment.add(recipe, executor=executor, name=name)
        experiment.run(detach=detach, tail_logs=not detach, sequential=not detach)
        job = experiment.jobs[0]
    stopped = faults.read(Path("results", args.experiment), faults.PREEMPTED)
    if interrupted or stopped:
        line = "interrupted; the same command goes on from the last checkpoint"
        if stopped:
            line = f"{stopped['signal']}: stopped after step {stopped['step']}; the same command goes on from there"
        if signal.SIGINT in interrupted:
            return 130, [line]
        # Without a checkpoint of the last step it is a failure, to whoever started this.
        return (143 if stopped else 1), [line]
    folder = Path(job.executor.job_dir)
    if detach:
        number = job.handle.rsplit("/", 1)[-1] if job.handle else None
        script = folder.parent / f"{name}_sbatch.sh"
        return (0, [f"submitted as job {number}", f"script: {script}"]) if number else (1, ["sbatch failed"])
    # Not experiment.status(): of a job that has ended it says RUNNING.
    if job.state.name == "SUCCEEDED":
        return 0, []
    return 1, failure(folder)


def _on_signal(number, interrupted):
    """The first signal asks the ranks to save and stop; a second one ends them."""
    interrupted.append(number)
    found = ranks()
    if len(interrupted) > 1 or not found:
        end_ranks(seconds=1 if len(interrupted) > 1 else 20)
        return
    print(f"{signal.Signals(number).name}: a checkpoint after this step, then the end; again: at once", flush=True)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)


def ranks():
    """The processes of this run's ranks on this machine: what torchrun has started."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("torchrun" in word for word in process.cmdline()):
                found += process.children()
    return found


def end_ranks(seconds=20):
    """End every process that this one started: politely, then not. NeMo-Run's own cancel leaves local jobs running."""
    started = psutil.Process().children(recursive=True)
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(started, timeout=seconds)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def failure(folder, lines=15):
    """The last lines of the rank that failed first, without the launcher's own, and where the whole log lies."""
    logs = sorted(Path(folder).rglob("combined.log")) or sorted(Path(folder).rglob("*.log"))
    if not logs:
        return [f"the job failed and left no log under {folder}"]
    text = logs[0].read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    ranks = {}
    for line in text.splitlines():
        match = re.match(r"\[\w*?(\d+)\]:(.*)", line)
        if match:
            ranks.setdefault(int(match.group(1)), []).append(match.group(2))
    first = re.search(r"Root Cause.*?rank\s*:\s*(\d+)", text, re.DOTALL)
    rank = int(first.group(1)) if first else min(ranks, default=None)
    tail = ranks.get(rank) or text.splitlines()
    return [f"rank {rank} failed; its last lines:", *("  " + line for line in tail[-lines:]), f"whole log: {logs[0]}"]


def launch_text(recipe, args, name):
    """What NeMo-Run would start: the sbatch script, or the torchrun command. Nothing is started."""
    executor = {"local": local, "slurm": slurm}[args.executor](args)
    CONSOLE.width = 1000  # else the script's lines are broken to fit the window, and can't be copied
    with run.Experiment(args.experiment, base_dir=str(Path.cwd()), skip_status_at_exit=True) as experiment:
        experiment.add(recipe, executor=executor, name=name)
        terminal.describe("launch", [("executor", args.executor)])
        experiment.dryrun(delete_exp_dir=True)

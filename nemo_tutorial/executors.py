"""Where a recipe runs: NeMo-Run's local executor (torchrun) or a Slurm job, and what became of it.

What became of a run, its log, its end, from the repository's root:

    python -m nemo_tutorial.executors status|logs|cancel RUN
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import psutil

from nemo_tutorial import arguments, checkpoints, compat, faults, live, network, runs, slurm, terminal

ROOT = Path(__file__).resolve().parents[1]
# What torchrun passes on to the ranks, and how long it lets them save before it kills them: 30 s if it isn't told.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SAVING = 1800


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
    import nemo_run as run

    # NeMo-Run calls torchrun by name: this Python's own must come first.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    nodes = compat.supported(run.LocalExecutor, nodes=args.num_nodes)
    # With several nodes, ranks as NODE_RANK says: torchrun's own rendezvous would number the nodes as they come.
    launcher = run.Torchrun(rdzv_backend="static") if args.num_nodes > 1 else "torchrun"
    return run.LocalExecutor(launcher=launcher, ntasks_per_node=args.num_gpus, env_vars=environment(args), **nodes)


def serialized(recipe):
    """The recipe as text, as NeMo-Run sends it to the ranks."""
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    return ZlibJSONSerializer().serialize(recipe)


def launch(recipe, args, name):
    """Run `recipe` and return (exit code, lines to show).

    0 done or submitted, 1 failed, 130 interrupted by Ctrl-C, 143 stopped by a signal. NeMo-Run itself returns normally
    from a job that failed, so its state is read.
    """
    if args.executor == "slurm":
        return slurm.launch(serialized(recipe), args, name, environment(args))
    import nemo_run as run

    executor, interrupted, title = local(args), [], args.experiment
    if not network.is_first(args):
        title += f"_node{os.environ['NODE_RANK']}"  # NeMo-Run's folder is named by the second, and so would be the same
    else:
        here = {"pid": os.getpid(), "host": os.uname().nodename, "began": psutil.Process().create_time()}
        file = Path("results", args.experiment, "record", "launcher.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(here), encoding="utf-8")
    # A handler and no KeyboardInterrupt: NeMo-Run waits for the job while the `with` below is left, in a thread
    # pool that an exception would wait for too. Once the ranks are gone that wait ends by itself. Set by hand,
    # because Python leaves Ctrl-C ignored where the shell did (`script &`).
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: _on_signal(number, interrupted))
    watched = sys.stdout.isatty()
    bar = live.bar(args.experiment, args.max_steps, Path("results", args.experiment)) if watched else None
    quiet = compat.supported(run.Experiment.__init__, clean_mode=watched)  # instead of NeMo-Run's own bar, of no steps
    # Around the `with` of the experiment: it is when that is left that NeMo-Run waits.
    with bar or contextlib.nullcontext():
        with run.Experiment(title, base_dir=str(Path.cwd()), skip_status_at_exit=True, **quiet) as experiment:
            experiment.add(recipe, executor=executor, name=name)
            experiment.run(detach=False, tail_logs=not watched, sequential=True)
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
    """What would be started: the Slurm job's files, written, or the torchrun command. Nothing is started."""
    if args.executor == "slurm":
        path = slurm.write(args, name, environment(args), serialized(recipe))
        terminal.describe("launch", [("script", path), ("submit it", f"sbatch {shlex.quote(str(path))}")])
        print(path.read_text(encoding="utf-8"))
        return
    import nemo_run as run
    from nemo_run.core.frontend.console.api import CONSOLE

    executor = local(args)
    CONSOLE.width = 1000  # else the script's lines are broken to fit the window, and can't be copied
    with run.Experiment(args.experiment, base_dir=str(Path.cwd()), skip_status_at_exit=True) as experiment:
        experiment.add(recipe, executor=executor, name=name)
        terminal.describe("launch", [("executor", args.executor)])
        experiment.dryrun(delete_exp_dir=True)


def status(run):
    """Print what became of a run: its jobs or its launcher, its steps, its checkpoint. Returns an exit code."""
    rows = []
    numbers = slurm.jobs(run)
    known = slurm.states(numbers)
    for number in numbers:
        state, word = known.get(number, {}), slurm.last_word(run, number)
        shown = [state.get("JobState"), state.get("Reason") if state.get("JobState") == "PENDING" else None]
        if state.get("JobState") == "RUNNING":
            shown += [f"on {state.get('NodeList')}", f"{state.get('RunTime')} of {state.get('TimeLimit')}"]
        shown += [word]
        rows.append((f"job {number}", ", ".join(filter(None, shown)) or "ended without a word"))
    process = launcher(run)
    if process:
        rows.append(("launcher", f"process {process['pid']} on {process['host']}, " + process["state"]))
    steps = None
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        steps = json.loads(slurm.tail(run / "record" / "metrics.jsonl", 1)[0])["step"]
    flags = (runs.record(run).get("starts") or [{}])[-1].get("flags", {})
    rows.append(("steps", f"{steps or 0} of {flags.get('max_steps', '?')}"))
    rows.append(("last checkpoint", checkpoints.latest(run) or "none complete"))
    terminal.describe(str(run), rows)
    return 0


def launcher(run):
    """The last local launcher of a run: {"pid", "host", "state"}, or None."""
    found = faults.read(run, "launcher.json")
    if found is None:
        return None
    if found["host"] != os.uname().nodename:
        return {**found, "state": "maybe running: ask there"}
    try:
        alive = abs(psutil.Process(found["pid"]).create_time() - found["began"]) < 1
    except psutil.NoSuchProcess:
        alive = False
    return {**found, "state": "running" if alive else "over"}


def logs(run):
    """Print the newest log of a run, and go on while its job runs. Returns an exit code."""
    numbers = slurm.jobs(run)
    started = [number for number in numbers if (run / "slurm" / f"{number}.log").is_file()]
    waiting = [number for number in slurm.alive(run) if number not in started]
    if started or waiting:
        return 130 if slurm.follow(run, (started or waiting)[-1]) else 0
    found = sorted((Path.cwd() / "experiments" / run.name).rglob("combined.log"), key=lambda log: log.stat().st_mtime)
    if not found:
        terminal.fail([f"{run} has no log yet, or ran from another folder than this one"])
    print(found[-1].read_text(encoding="utf-8", errors="replace"), end="")
    return 0


def cancel(run, now=False):
    """Stop a run: after a checkpoint of the running step, or `now`. Returns an exit code."""
    numbers, process = slurm.alive(run), launcher(run)
    if numbers:
        for line in slurm.cancel(numbers, now):
            print(line)
        return 0
    if process and process["state"] == "running":
        os.kill(process["pid"], signal.SIGTERM)
        print(f"process {process['pid']} was told to stop" + (", after a checkpoint" if not now else ""))
        if now:
            os.kill(process["pid"], signal.SIGTERM)  # the second one does not wait
        return 0
    where = f" here; its launcher is on {process['host']}" if process and process["state"] != "over" else ""
    terminal.fail([f"nothing of {run} runs{where}"])


def main(argv=None):
    parser = arguments.Parser("What became of a run: its state, its log, its end.")
    parser.add_argument("what", choices=("status", "logs", "cancel"))
    parser.add_argument("run", help="results/NAME, or NAME")
    parser.add_argument("--now", action="store_true", help="cancel: without a checkpoint first")
    args = parser.parse_args(argv)
    run = Path(args.run) if Path(args.run).is_dir() else Path("results", args.run)
    if not ((run / "slurm").is_dir() or (run / "record").is_dir()):
        terminal.fail([f"{args.run} is not a run: neither it nor {run} holds slurm/ or record/"])
    if args.now and args.what != "cancel":
        terminal.fail([f"--now has no effect with {args.what}; leave it out"])
    sys.exit({"status": status, "logs": logs}[args.what](run) if args.what != "cancel" else cancel(run, args.now))


if __name__ == "__main__":
    main()

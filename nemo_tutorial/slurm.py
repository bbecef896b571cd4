"""A run as a Slurm job: its options, its script in results/<experiment>/slurm, submitting it, and what became of it.

The script is our own and not NeMo-Run's, whose script needs pyxis, echoes every variable into the log, writes values
unquoted, requeues after any failure and knows no time limit. The recipe in it is serialized and read by NeMo-Run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nemo_tutorial import checkpoints, faults, terminal

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = ("pyxis", "apptainer", "none")
# Inherited from the environment of sbatch, by name.
SECRETS = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
# The flags that only mean something here, and what their absence means.
OPTIONS = {
    "account": None,
    "partition": None,
    "qos": None,
    "time": "1-00:00:00",
    "gres": None,
    "mem": None,
    "exclusive": None,
    "constraint": None,
    "nodelist": None,
    "container": None,
    "container_image": None,
    "mount": [],
    "setup": [],
    "env": [],
    "srun_arg": [],
    "sbatch_arg": [],
    "wait": False,
    "chain": 1,
    "save_before": None,
}
READ = {  # what else says the value of a flag
    "account": ("SLURM_ACCOUNT", "SBATCH_ACCOUNT"),
    "partition": ("SLURM_PARTITION", "SBATCH_PARTITION"),
    "container_image": ("CONTAINER_IMAGE",),
}
OURS = {  # what --sbatch_arg may not say, and why
    **{name: f"use --{name.replace('-', '_')}" for name in ("account", "partition", "qos", "time", "gres", "mem")},
    **{name: f"use --{name}" for name in ("exclusive", "constraint", "nodelist")},
    "nodes": "use --num_nodes",
    "ntasks": "use --num_nodes and --num_gpus",
    "ntasks-per-node": "use --num_gpus",
    "job-name": "use --experiment",
    "signal": "use --save_before",
    "requeue": "it is there already",
    "no-requeue": "use --chain",
    **{name: "the log is where the run is" for name in ("output", "error", "open-mode", "chdir")},
    **{name: "the job has a script of its own" for name in ("wrap", "array", "export", "export-file", "parsable")},
}
LEFT = 120  # seconds by which Slurm may send its warning early, and a little


def fill(args):
    """Set the Slurm options that the user did not, from the environment and from --num_gpus."""
    for name, variables in READ.items():
        if not getattr(args, name):
            setattr(args, name, next((os.environ[v] for v in variables if os.environ.get(v)), None))
    for name, default in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.container = args.container or ("pyxis" if args.container_image else "none")
    gpus = args.accelerator == "gpu"
    if args.exclusive is None:  # whole nodes are what a run on several, or on all GPUs of one, needs
        args.exclusive = gpus and (args.num_nodes > 1 or args.num_gpus >= 8)
    args.gres = args.gres or (f"gpu:{args.num_gpus}" if gpus else "none")
    if args.mem is None and args.exclusive:
        args.mem = "0"  # all of it
    if args.save_before is None:
        limit = seconds(args.time)
        # Ten minutes write a checkpoint of a large model; a short job can't spend them.
        args.save_before = 600 if limit is None else max(60, min(600, limit // 6))


def seconds(limit):
    """A time limit of Slurm's (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; None for none. ValueError."""
    if limit in ("0", "infinite", "INFINITE", "UNLIMITED", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if not match:
        raise ValueError(limit)
    days, *rest = match.groups()
    first, second, third = (None if value is None else int(value) for value in rest)
    if days is not None:
        return int(days) * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + second * 60 + third
    return first * 60 + (second or 0)


def problems(args):
    """What of the Slurm options can't be carried out."""
    found = []
    try:
        limit = seconds(args.time or OPTIONS["time"])
    except ValueError:
        return [
            f"--time {args.time!r} is not a time limit of Slurm's; write it like 90 (minutes), 4:00:00 or 2-00:00:00"
        ]
    fill(args)
    if limit is not None and args.save_before >= limit:
        found.append(f"--save_before {args.save_before} s is not below --time {args.time}; use {max(1, limit // 6)}")
    for name, value in [(option, one) for option in OPTIONS for one in _values(args, option)]:
        # A line of the script ends where the value has a new line, and Slurm's log and e-mails show the rest as it is.
        if name != "setup" and re.search(r"[\x00-\x1f\x7f]", value):
            found.append(f"--{name} {value!r}: Slurm can't carry control characters such as a new line")
        if not value and name != "setup":
            found.append(f"--{name} is empty; leave it out")
    for name, value in (("--experiment", args.experiment), ("the current folder", str(Path.cwd()))):
        if re.search(r"[\x00-\x1f\x7f\\%]", value):
            found.append(
                f"{name} {value!r}: the job's log would lie in it, and Slurm can't carry \\, % or a new line there"
            )
    for value in args.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII):
            found.append(f"--env {value.split('=')[0]!r} takes the name of a variable: export it, and name it")
        elif value not in os.environ:
            found.append(f"--env {value}: there is no such variable; export {value}=... first")
    for value in args.srun_arg:
        if not re.match(r"--?[A-Za-z]", value):
            found.append(f"--srun_arg {value!r} is not an option of srun; write --srun_arg=--name=value")
    for value in args.sbatch_arg:
        name = value.split("=")[0].lstrip("-")
        if not re.fullmatch(r"(--)?[a-z][a-z0-9-]+(=.*)?", value, re.DOTALL):
            found.append(f"--sbatch_arg {value!r} is not an option of sbatch; write --sbatch_arg name=value")
        elif name in OURS:
            found.append(f"--sbatch_arg {value!r}: {OURS[name]}")
    return found + _container_problems(args)


def _values(args, name):
    value = getattr(args, name)
    return [] if value is None or isinstance(value, (bool, int)) else [value] if isinstance(value, str) else value


def _container_problems(args):
    if args.container == "none":
        named = [f"--{name}" for name in ("container_image", "mount") if getattr(args, name)]
        return [f"{name} has no effect with --container none; leave one out" for name in named]
    found = []
    if not args.container_image:
        found.append(f"--container {args.container} needs --container_image")
    for source, target in mounts(args):
        for path in (source, target):
            if "," in path or ":" in path:
                found.append(f"{path!r} is to be mounted, and a mount can't carry a comma or a colon; rename it")
    for value in args.mount:
        if value.count(":") > 1 or not all(part.startswith("/") for part in value.split(":")):
            found.append(f"--mount {value!r} is not SRC or SRC:DST, both with the whole path")
    return found


def mounts(args):
    """(source, target) of each folder that the container sees: the current one, the code's, and --mount."""
    own = {str(Path.cwd()), str(ROOT)}
    pairs = [(path, path) for path in sorted(own)]
    for value in args.mount:
        source, _, target = value.partition(":")
        pairs.append((source, target or source))
    return pairs


def folder(args):
    """Where the job's files lie: script.sh, recipe, code/, history.txt and the logs."""
    return Path("results", args.experiment, "slurm").absolute()


def _directive(name, value=None):
    """A line of sbatch's, which reads double quotes and backslashes in them as C does, and expands nothing."""
    if value is None:
        return f"#SBATCH --{name}"
    value = str(value)
    if not re.fullmatch(r"[\w@%+=:,./-]*", value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"#SBATCH --{name}={value}"


def directives(args, stage):
    """The script's #SBATCH lines."""
    log = str(folder(args)) + "/%j.log"
    lines = [
        _directive("job-name", args.experiment),
        _directive("output", log),
        _directive("open-mode", "append"),
        _directive("chdir", Path.cwd()),
        _directive("nodes", args.num_nodes),
        _directive("ntasks-per-node", args.num_gpus),
        _directive("time", args.time),
    ]
    names = ["account", "partition", "qos", "mem", "constraint", "nodelist"]
    lines += [_directive(name, getattr(args, name)) for name in names if getattr(args, name)]
    if args.gres != "none":
        lines.append(_directive("gres", args.gres))
    given = {value.lstrip("-").split("=")[0] for value in args.sbatch_arg}
    if args.exclusive:
        lines.append(_directive("exclusive"))
    elif args.accelerator == "gpu" and not given & {"cpus-per-task", "cpus-per-gpu"}:
        lines.append(_directive("cpus-per-task", 2 + args.num_workers))
    lines.append(_directive("signal", f"B:USR1@{args.save_before}"))
    lines.append(_directive("no-requeue" if args.chain > 1 else "requeue"))
    lines.append(_directive("export", "ALL"))
    for value in args.sbatch_arg:
        name, equals, rest = value.removeprefix("--").partition("=")
        lines.append(_directive(name, rest if equals else None))
    return lines


def _words(words, indent=4):
    """Words of a command, quoted, one a line."""
    return " \\\n".join(" " * indent + word for word in words)


def _srun(args, variables):
    """The words of the srun command that starts the ranks."""
    quote, code = shlex.quote, '"$run/slurm/code/nemo_tutorial/rank.py" "$run/slurm/recipe"'
    # The launcher's own Python, unless something says that another one comes first.
    code += " --check_network" if args.check_network else ""
    python = "python" if args.container != "none" or args.setup else quote(sys.executable)
    words = ["srun --label --kill-on-bad-exit=1 --wait=60", *map(quote, args.srun_arg)]
    inside = [f"{source}:{target}" for source, target in mounts(args)]
    if args.container == "pyxis":
        words.append(f"--container-image={quote(args.container_image)}")
        words.append(f"--container-mounts={quote(','.join(inside))}")
        words.append(f"--container-workdir={quote(str(Path.cwd()))}")
        # Else a variable of the image's would come before the one of the same name here.
        tokens = [name for name in SECRETS if os.environ.get(name)]
        names = dict.fromkeys([*tokens, "PYTHONPATH", "MASTER_ADDR", "MASTER_PORT", *variables, *args.env])
        words.append("--container-env=" + ",".join(names))
    if args.container == "apptainer":
        words.append("apptainer exec" + (" --nv" if args.accelerator == "gpu" else ""))
        words += [f"--bind {quote(mount)}" for mount in inside]
        words += [f"--pwd {quote(str(Path.cwd()))}", quote(args.container_image)]
    return [*words, f"{python} {code}"]


SCRIPT = """\
#!/bin/bash
# {title}
# Edit it if you like, and submit it: sbatch {here}
# Tokens are not in here: the job inherits HF_TOKEN and WANDB_API_KEY from where sbatch is called.
{directives}

run={run}
save_before={save_before} # seconds that a checkpoint may take; as in --signal above
requeue={requeue}

umask {umask}
{setup}{exports}
# One line for every start and end; "done" and "failed" end a chain.
say() {{
    printf '%s job %s.%s %s\\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "${{SLURM_RESTART_COUNT:-0}}" "$*" |
        tee -a "$run/slurm/history.txt"
}}

# A later job of a chain (sbatch --dependency=afterany:JOB {here} chained) goes on where one was stopped.
if [ "${{1:-}}" = chained ]; then
    case "$(tail -n 1 "$run/slurm/history.txt")" in
    *" done") exit 0 ;;
    *" failed"*)
        echo "the job before failed: nothing is done here"
        exit 1
        ;;
    esac
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR="${{MASTER_ADDR:-$first}}"
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 4 + ${{SLURM_RESTART_COUNT:-0}} % 4) % 20000))
# Since Slurm 22.05 srun does not take over the job's; without, a rank and its loaders would share one core.
cpus=$((SLURM_CPUS_ON_NODE / {tasks}))
export SRUN_CPUS_PER_TASK=$((cpus > 0 ? cpus : 1))
{threads}
marker=$run/record/preempted.json
before=$(cat "$marker" 2>/dev/null)
rm -f "$marker" "$run/record/failure.json"

# Ahead of the time limit, or by `scancel --signal=USR1 --batch`: the ranks save and stop. Slurm asks this shell only,
# and srun passes it on to every rank.
asked=no
# shellcheck disable=SC2317 # called by trap
warned() {{
    again=yes
    end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\\([^ ]*\\).*/\\1/p')
    left=$(($(date -d "$end" +%s 2>/dev/null || echo 9999999999) - $(date +%s)))
    asked=limit
    [ "$left" -gt $((save_before + {left})) ] && asked=person
    say "warned by USR1, $asked"
    kill -USR1 "$ranks" 2>/dev/null
}}
# shellcheck disable=SC2317
stopped() {{
    again=yes
    asked=cancelled
}}
trap warned USR1
trap stopped TERM

say started on "$SLURM_JOB_NODELIST"
{srun} &
ranks=$!
again=yes
while [ "$again" = yes ]; do # a signal ends a wait early
    again=no
    wait "$ranks"
    code=$?
done

if [ -s "$marker" ]; then
    say "stopped with a checkpoint: $(cat "$marker")"
    if [ "$asked" = limit ] && [ "$requeue" = yes ]; then
        if [ "$(cat "$marker")" = "$before" ]; then
            say "failed: no step between two time limits"
            exit 1
        fi
        say requeued
        scontrol requeue "$SLURM_JOB_ID" || say "not requeued; submit it again"
    fi
    exit 143
fi
if [ "$code" -eq 0 ]; then
    say "done"
    exit 0
elif [ "$asked" = cancelled ]; then
    say "cancelled; the last complete checkpoint is whole"
else
    say "failed: srun's exit code is $code" # that of the first rank, or of one that was ended because of it
fi
exit 1
"""


def script(args, stage, environment):
    """The text of the job's script. `environment` are the ranks' variables, none of them secret."""
    values = dict(environment)
    own = "$run/slurm/code"
    path = ["$run/slurm/code/nemo_tutorial/no_gpu", own] if args.accelerator == "cpu" else [own]
    values.pop("PYTHONPATH", None)
    threads = values.pop("OMP_NUM_THREADS", None)
    exports = [f'export PYTHONPATH="{":".join(path)}${{PYTHONPATH:+:$PYTHONPATH}}"']
    exports += [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    exports += [f': "${{{name}:?is not set: export it before sbatch}}"' for name in args.env]
    setup = [line for lines in args.setup for line in lines.splitlines()]
    here = folder(args) / "script.sh"
    # In a comment: whatever the name is, it stays on its line.
    comment = shlex.quote(str(here))
    mask = os.umask(0)
    os.umask(mask)
    return SCRIPT.format(
        title=f"{stage}, {args.num_nodes} x {args.num_gpus}, written by --executor slurm",
        here=comment,
        directives="\n".join(directives(args, stage)),
        run=shlex.quote(str(folder(args).parent)),
        save_before=args.save_before,
        requeue="no" if args.chain > 1 else "yes",
        umask=f"{mask:04o}",
        setup="\n".join(["", "# --setup", *setup, ""]) if setup else "",
        exports="\n".join(exports) + "\n",
        tasks=args.num_gpus,
        threads="export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK\n" if threads else "",
        left=LEFT,
        srun=_words(_srun(args, values)).lstrip(),
    )


def write(args, stage, environment, recipe=None):
    """Write the job's files and return the script's path; without a recipe, only the script."""
    target = folder(args)
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    target.chmod(0o700)
    (target / "history.txt").touch(mode=0o600)
    checkpoints.write_whole(target / "script.sh", script(args, stage, environment), mode=0o600)
    if recipe is not None:
        checkpoints.write_whole(target / "recipe", recipe, mode=0o600)
        # A copy: what is pulled or edited while the job waits does not change it.
        shutil.rmtree(target / "code", ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "nemo_tutorial", target / "code" / "nemo_tutorial", ignore=ignore)
    return target / "script.sh"


def environment_of_sbatch():
    """This environment without what another job or the login shell would put over the script's own options."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SBATCH_CLUSTERS")
    return {n: v for n, v in os.environ.items() if n in kept or not n.startswith(("SLURM_", "SBATCH_", "SRUN_"))}


def _sbatch(*words):
    """Call sbatch as a file's owner alone would: the log that it makes is mode 0600. Returns the finished process."""
    return subprocess.run(
        ["sbatch", *map(str, words)], capture_output=True, text=True, env=environment_of_sbatch(), umask=0o077
    )


def refused(args, stage):
    """What Slurm itself says against the options, before anything is started: a list of problems."""
    text = "#!/bin/sh\n" + "\n".join(directives(args, stage)) + "\n"
    done = subprocess.run(
        ["sbatch", "--test-only"], input=text, capture_output=True, text=True, env=environment_of_sbatch()
    )
    said = " ".join(line.split("error: ")[-1] for line in done.stderr.splitlines()) or f"exit code {done.returncode}"
    # A node that is down today is no mistake of the command's: the job waits for it.
    if done.returncode == 0 or re.search(r"DOWN|DRAIN|[Uu]nable to contact|not responding|in use", said):
        return []
    flags = [
        f"--{name} {getattr(args, name)}"
        for name in ("account", "partition", "qos", "time", "gres", "mem", "constraint", "nodelist")
        if getattr(args, name) not in (None, "none")
    ]
    return [f"sbatch refuses the job: {said}; it would get --num_nodes {args.num_nodes} {' '.join(flags)}"]


def submit(args, path):
    """Submit the script, --chain times one after the other: (job ids, error or None)."""
    jobs = []
    for _ in range(args.chain):
        words = ["--parsable"]
        words += [f"--dependency=afterany:{jobs[-1]}", path, "chained"] if jobs else [path]
        done = _sbatch(*words)
        number = done.stdout.strip().split(";")[0]
        if done.returncode or not number.isdigit():
            return jobs, done.stderr.strip() or f"sbatch said {done.stdout.strip()!r}"
        jobs.append(number)
        with open(path.with_name("jobs.txt"), "a", encoding="utf-8") as file:
            file.write(number + "\n")
    return jobs, None


def jobs(run):
    """The ids of a run's jobs, as submitted from here or by hand, oldest first."""
    found = []
    for name, pattern in (("jobs.txt", r"^(\d+)$"), ("history.txt", r"^\S+ job (\d+)\.")):
        file = Path(run) / "slurm" / name
        if file.is_file():
            found += re.findall(pattern, file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return sorted(set(found), key=int)


def states(numbers):
    """What Slurm knows of jobs now: {id: {"JobState", "Reason", "ExitCode", ...}}; a job that it forgot is left out."""
    found = {}
    for number in numbers:
        done = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True)
        if done.returncode == 0:
            found[number] = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
    return found


ALIVE = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def alive(run):
    """The ids of a run's jobs that wait or run."""
    return [number for number, state in states(jobs(run)[-20:]).items() if state.get("JobState") in ALIVE]


def last_word(run, number):
    """What a job's script wrote last into the history, or None."""
    file = Path(run) / "slurm" / "history.txt"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    words = re.findall(rf"^\S+ job {number}\.\d+ (.*)$", text, re.MULTILINE)
    return words[-1] if words else None


def exit_code(run, number):
    """The exit code of a job that is over. Slurm forgets jobs after minutes, so the script's own word counts first."""
    word = last_word(run, number) or ""
    if word == "done":
        return 0
    if word.startswith(("stopped with a checkpoint", "requeued", "not requeued")):
        return 143
    return 1


def cancel(numbers, now=False):
    """Stop jobs: a running one after a checkpoint of its running step, unless `now`; lines to show."""
    state, lines = states(numbers), []
    # The last of a chain first: else it would start.
    for number in sorted(numbers, key=int, reverse=True):
        if now or state[number].get("JobState") != "RUNNING":
            done = subprocess.run(["scancel", number], capture_output=True, text=True)
            lines.append(f"job {number} is cancelled" if done.returncode == 0 else done.stderr.strip())
            continue
        # So that it is not requeued, even close to its time limit.
        subprocess.run(["scontrol", "update", f"JobId={number}", "Requeue=0"], capture_output=True)
        done = subprocess.run(["scancel", "--signal=USR1", "--batch", number], capture_output=True, text=True)
        told = f"job {number} was told to save and stop"
        lines.append(told if done.returncode == 0 else done.stderr.strip())
    return lines


def launch(recipe, args, stage, environment):
    """Submit a recipe: (exit code, lines to show). With --wait, follow it to its end."""
    run = folder(args).parent
    running = alive(run)
    if running:
        return 2, [f"job {' '.join(running)} of this run waits or runs already; stop it first: scancel {running[0]}"]
    path = write(args, stage, environment, recipe)
    numbers, error = submit(args, path)
    if not numbers:
        return 1, [f"sbatch: {error}", f"script: {path}"]
    quoted = shlex.quote(str(path))
    lines = [f"submitted as job {' '.join(numbers)}", f"script: {path}"]
    lines += [f"sbatch, for a later job of the chain: {error}"] if error else []
    commands = [
        ("log", path.with_name(f"{numbers[0]}.log")),
        ("follow", f"tail -F {shlex.quote(str(path.with_name(numbers[0] + '.log')))}"),
        ("stop", f"scancel {' '.join(numbers)} (to save first: scancel --signal=USR1 --batch {numbers[0]})"),
        ("resume", f"sbatch {quoted}"),
    ]
    lines += [f"{name}: {value}" for name, value in commands]
    if not args.wait:
        return (1 if error else 0), lines
    terminal.describe("submitted", [("", line) for line in lines])
    return wait(run, numbers)


def wait(run, numbers):
    """Follow the jobs' logs until all are over: (exit code of the last that did something, lines to show)."""
    for number in numbers:
        if follow(run, number):
            return 130, [f"no longer followed; job {' '.join(numbers)} goes on. Stop it: scancel {' '.join(numbers)}"]
    said = [(number, last_word(run, number)) for number in numbers]
    number, word = next(((number, word) for number, word in reversed(said) if word), (numbers[-1], None))
    code = exit_code(run, number)
    if code == 0:
        return 0, []
    log = Path(run) / "slurm" / f"{number}.log"
    state = states([number]).get(number, {})
    what = word if word and not word.startswith("started") else "ended without a word (cancelled, or its node is lost)"
    cause = faults.read(run, faults.FAILURE)
    lines = [f"{cause['kind']} at step {cause['step']}, rank {cause['rank']}: {cause['message']}"] if cause else []
    lines += [f"job {number}: {what}" + (f"; Slurm says {state['JobState']}" if state.get("JobState") else "")]
    if code != 143 and log.is_file():
        lines += failure(log)
    return code, lines


def failure(log, count=15):
    """The last lines of the rank that ended first, as srun tells, and where the whole log lies."""
    found = log.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next(
        (m for m in (re.match(r"srun: error: (\S+): tasks? (\d+)\S*: (.*)", line) for line in found) if m), None
    )
    if first is None:
        return ["its last lines:", *("  " + line for line in found[-count:]), f"whole log: {log}"]
    node, rank, how = first.groups()
    own = [line for line in found if re.match(rf" *{rank}: ", line)]
    lines = [f"rank {rank} on {node}: {how}; its last lines:", *("  " + line for line in own[-count:])]
    return [*lines, f"whole log: {log}"]


def tail(path, count):
    """The last lines of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        return file.read().decode("utf-8", "replace").splitlines()[-count:]


def follow(run, number, poll=2.0):
    """Print a job's log as it grows, until the job is over; True if Ctrl-C ended that before.

    A second Ctrl-C within five seconds cancels the job.
    """
    log, position = Path(run) / "slurm" / f"{number}.log", 0
    waiting, over = None, False
    try:
        while True:
            if log.is_file():
                with open(log, "rb") as file:
                    file.seek(position)
                    new = file.read()
                    position = file.tell()
                sys.stdout.buffer.write(new)
                sys.stdout.flush()
            if over:
                return False
            state = states([number]).get(number)
            # None: forgotten, or slurmctld does not answer. Only an answer is one.
            if state is None:
                over = _forgotten(number)
            else:
                over = state["JobState"] not in ALIVE
                if state["JobState"] == "PENDING" and state.get("Reason") != waiting:
                    waiting = state.get("Reason")
                    print(f"job {number} waits: {waiting}", flush=True)
            if not over:
                time.sleep(poll)
    except KeyboardInterrupt:
        print(f"\njob {number} goes on; Ctrl-C again cancels it", flush=True)
        try:
            time.sleep(5)
        except KeyboardInterrupt:
            subprocess.run(["scancel", number])
        return True


def _forgotten(number):
    done = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True)
    return "Invalid job id" in done.stderr

"""The job's script: as in tests/golden/slurm, and nothing in it that a value could start or a token be read from.

SLURM_GOLDEN=write writes the golden files anew, after a wanted change.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script

from nemo_tutorial import arguments, executors, plan, preflight, slurm

GOLDEN = Path(__file__).parent / "golden" / "slurm"
CANARY = "hf_canary5e0c7a"
# Each would make the file `executed` if a shell read it.
HOSTILE = [
    "$(touch executed)",
    "`touch executed`",
    "x; touch executed;",
    "x && touch executed",
    "| touch executed",
    "'; touch executed; '",
    '"; touch executed; "',
    "x' $(touch executed) '",
    "${IFS}$(touch${IFS}executed)",
    "x\ntouch executed\n",
    "x\r\n#SBATCH --account=y",
    "#SBATCH --wrap=x",
    "a b  c",
    "臺灣 \"大\" 'x'",
    "%j %u %% $HOME ~ * ? [a] {b,c} !x <y >executed &",
    "\\$(touch executed)\\",
]
FLAGS = ("account", "partition", "qos", "time", "gres", "mem", "constraint", "nodelist", "container_image", "mount")
FLAGS += ("env", "srun_arg", "sbatch_arg", "experiment")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of its own, and none of the names that are read from the environment."""
    for name in (
        "SLURM_ACCOUNT",
        "SLURM_PARTITION",
        "SBATCH_ACCOUNT",
        "SBATCH_PARTITION",
        "CONTAINER_IMAGE",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def parse(load_script):
    """The flags of a pretraining on Slurm: (args, problems)."""

    def parse(*argv):
        args = load_script("pretraining/pretrain.py").parse_args(
            ["--executor", "slurm", "-D", "data/x", "-g", "64", *map(str, argv)]
        )
        args.dry_run = "plan"  # this machine needs no sbatch
        problems = preflight.fill_hardware(args) + preflight.execution_problems(args)
        plan.choose_sizes(args, None)
        return args, problems

    return parse


def rendered(args):
    """The path of the written script, and its text."""
    path = slurm.write(args, "pretraining", executors.environment(args))
    return path, path.read_text(encoding="utf-8")


def plain(text, folder):
    """The script without what differs between machines."""
    text = text.replace(str(folder), "WORK").replace(str(ROOT), "ROOT").replace(sys.executable, "PYTHON")
    text = re.sub(r"^umask .*", "umask 0022", text, flags=re.MULTILINE)
    return text.replace("ROOT:ROOT,WORK:WORK", "WORK:WORK,ROOT:ROOT").replace(
        "--bind ROOT:ROOT \\\n    --bind WORK:WORK", "--bind WORK:WORK \\\n    --bind ROOT:ROOT"
    )


CONTAINERS = {
    "pyxis": ["--container_image", "nvcr.io#nvidia/nemo:25.02", "--mount", "/data:/mnt/data"],
    "apptainer": ["--container", "apptainer", "--container_image", "/images/nemo.sif"],
    "none": ["--container", "none", "--setup", "module load nemo", "--env", "LAB_DATA"],
}


@pytest.mark.parametrize("nodes", [1, 2, 16])
@pytest.mark.parametrize("container", CONTAINERS)
def test_script_is_the_golden_one(container, nodes, parse, here, monkeypatch):
    monkeypatch.setenv("LAB_DATA", "/lab")
    monkeypatch.setenv("HF_TOKEN", CANARY)
    argv = ["-N", nodes, "-G", 8, "-T", 2, "--account", "lab", "--partition", "gpus", "-E", "golden"]
    args, problems = parse(*argv, *CONTAINERS[container])
    assert problems == []
    path, text = rendered(args)
    text = plain(text, here)
    golden = GOLDEN / f"{container}_{nodes}.sh"
    if os.environ.get("SLURM_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
    assert CANARY not in text
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


SHELLCHECK = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.skipif(not SHELLCHECK, reason="there is no shellcheck here")
@pytest.mark.parametrize("files", ["golden", "stages"])
def test_shellcheck_is_silent(files):
    found = sorted(GOLDEN.glob("*.sh") if files == "golden" else (ROOT / "slurm").glob("*.sh"))
    assert found
    unless = "--exclude=SC2329"  # a function that is never called: by traps
    done = subprocess.run([SHELLCHECK, "--shell=bash", unless, *found], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run_with_stubs(path, folder):
    """Run a script with bash; srun and scontrol only write down their words. Returns srun's words, or None."""
    bin = folder / ".bin"
    bin.mkdir(exist_ok=True)
    words = bin / "words"
    words.unlink(missing_ok=True)
    for name, body in (("srun", f"printf '%s\\0' \"$@\" >{words}"), ("scontrol", "echo NodeAddr=127.0.0.1")):
        (bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin / name).chmod(0o755)
    env = {"PATH": f"{bin}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(["bash", path], env=env, capture_output=True, text=True, cwd=folder)
    return (words.read_text().split("\0")[:-1] if words.exists() else None), done


def hostile_flags(flag, value):
    """The words that give `flag` a hostile value; a value is put where the flag takes free text."""
    image = ["--container_image", "image"] if flag == "mount" else []
    value = {"mount": "/" + value, "srun_arg": "--x=" + value, "sbatch_arg": "comment=" + value}.get(flag, value)
    return [*image, f"--{flag}={value}"], value


@pytest.mark.parametrize("flag", FLAGS)
def test_hostile_values_are_quoted_or_refused(flag, parse, here):
    """Bash runs each script; the words that reach srun are the values, letter by letter."""
    quoted = 0
    for value in HOSTILE:
        argv, value = hostile_flags(flag, value)
        args, problems = parse("-G", 8, *argv)
        if problems:
            assert any(f"--{flag}" in problem or repr(value)[1:6] in problem for problem in problems), problems
            continue
        quoted += 1
        path, text = rendered(args)
        assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0, value
        words, done = run_with_stubs(path, here)
        assert words is not None, (value, done.stderr)
        if flag == "container_image":
            assert f"--container-image={value}" in words
        if flag == "srun_arg":
            assert value in words
        if flag == "mount":
            assert any(value in word for word in words if word.startswith("--container-mounts="))
        if flag == "experiment":
            assert words[-1] == str(here / "results" / value / "slurm" / "recipe")
        shutil.rmtree(here / "results")
    assert not list(here.rglob("executed"))
    # Names of variables and times are never free text; the others must carry what Slurm can.
    assert quoted >= (0 if flag in ("env", "time") else 3)


def test_sbatch_reads_the_values_as_they_are(parse, here, cluster):
    """What the real sbatch takes from the script: names, comment and log path, letter by letter."""
    for value in HOSTILE:
        args, problems = parse("--accelerator", "cpu", f"--experiment={value}", f"--sbatch_arg=comment={value}")
        if problems:
            continue
        path, _ = rendered(args)
        job = cluster.slurm("sbatch", "--parsable", "--hold", str(path), check=True).strip()
        shown = cluster.slurm("scontrol", "show", "job", job)
        log = here / "results" / value / "slurm" / f"{job}.log"
        assert f"   StdOut={log}\n" in shown
        assert f" JobName={value}\n" in shown and f"   Comment={value} \n" in shown
        assert f"   WorkDir={here}\n" in shown
        cluster.slurm("scancel", job)
    assert not list(here.rglob("executed"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--time soon", "--time 'soon'"),
        ("--container pyxis", "needs --container_image"),
        ("--container none --container_image x", "--container_image has no effect"),
        ("--env HF_TOKEN=secret", "--env 'HF_TOKEN' takes the name"),
        ("--env NOT_THERE", "export NOT_THERE="),
        ("--sbatch_arg nodes=3", "use --num_nodes"),
        ("--sbatch_arg export=NONE", "script of its own"),
        ("--srun_arg touch", "not an option of srun"),
        ("--time 10 --save_before 600", "--save_before 600 s is not below"),
        ("--container_image x --mount relative", "whole path"),
    ],
)
def test_wrong_options_are_refused(argv, said, parse):
    problems = parse(*argv.split())[1]
    assert any(said in problem for problem in problems), problems
    assert "secret" not in " ".join(problems)


def test_slurm_options_have_no_effect_locally(load_script):
    args = load_script("pretraining/pretrain.py").parse_args("-D x -G 1 --accelerator cpu --qos high --wait".split())
    args.dry_run = "plan"
    problems = preflight.fill_hardware(args) + preflight.execution_problems(args)
    plan.choose_sizes(args, None)
    assert [problem.split()[0] for problem in problems] == ["--qos", "--wait"]


def test_defaults_follow_the_gpus_and_the_environment(parse, monkeypatch):
    monkeypatch.setenv("SLURM_ACCOUNT", "lab")
    monkeypatch.setenv("SLURM_PARTITION", "gpus")
    monkeypatch.setenv("CONTAINER_IMAGE", "/images/nemo.sqsh")
    text = rendered(parse("-G", 4)[0])[1]
    for line in ("account=lab", "partition=gpus", "gres=gpu:4", "ntasks-per-node=4", "cpus-per-task=4"):
        assert f"#SBATCH --{line}\n" in text
    assert "--exclusive" not in text and "--container-image=/images/nemo.sqsh" in text
    text = rendered(parse("-G", 8, "--account", "other")[0])[1]
    assert "#SBATCH --exclusive\n" in text and "#SBATCH --mem=0\n" in text and "--account=other\n" in text
    text = rendered(parse("--accelerator", "cpu", "--container", "none", "--container_image", "")[0])[1]
    assert "--gres" not in text and "--exclusive" not in text and "no_gpu" in text
    assert "--gres" not in rendered(parse("-G", 8, "--gres", "none")[0])[1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-2:03", 93780),
        ("1-00:00:01", 86401),
        ("0", None),
    ],
)
def test_time_limits(text, seconds):
    assert slurm.seconds(text) == seconds


def test_dry_run_writes_the_script_and_stops(here, nemo_checkpoint, write_index):
    """At once, without NeMo; what it says to type is right."""
    nemo_checkpoint(here / "nemo_ckpt/tiny")
    write_index(here / "data/pre", [500] * 40)
    flags = "--nemo_model nemo_ckpt/tiny -D data/pre --split 80,20,0 -s 128 -g 16 --max_steps 2 -G 8".split()
    done = script(here, "pretraining/pretrain.py", "--executor", "slurm", "-E", "it's", *flags, "--dry_run")
    path = here / "results" / "it's" / "slurm" / "script.sh"
    assert str(path) in done.stdout and path.is_file()
    assert not (path.parent / "recipe").exists()
    comment = path.read_text().splitlines()[2]
    assert shlex.split(comment.split("submit it: ")[1]) == ["sbatch", str(path)]


def test_flags_of_every_script_part_are_known():
    """OPTIONS, which says what has no effect locally, has all flags of the group."""
    parser = arguments.Parser("")
    arguments.add_slurm(parser)
    assert {action.dest for action in parser._actions} - {"help"} == set(slurm.OPTIONS)

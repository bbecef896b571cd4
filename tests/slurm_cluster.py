"""A real Slurm cluster of two nodes on this machine, for the tests; started once, torn down at the end."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = """\
ClusterName=demo
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/d.%n.log
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.%n.pid
SlurmctldPort={port}
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
KillWait=20
# A warning that is due comes up to half a minute later, when limits are looked at: not at the limit itself.
OverTimeLimit=1
SchedulerParameters=sched_interval=2,bf_interval=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=defq Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


def missing():
    """Why there can be no cluster here, or None. Installs Debian's packages where it may."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if os.geteuid():
        return "a Slurm cluster for the tests needs root, as in a container"
    if not all(map(shutil.which, PROGRAMS)):
        if not shutil.which("apt-get"):
            return "Slurm is not installed, and there is no apt-get here"
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
            done = subprocess.run(["apt-get", "-q", *words], env=env, capture_output=True, text=True)
        if done.returncode or not all(map(shutil.which, PROGRAMS)):
            return f"Slurm can't be installed here: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return None


def _end_with_parent():
    """Linux ends this process when the one that started it is gone, even killed: no cluster is left behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Cluster:
    """Two nodes, n1 and n2, of 4 CPUs each as Slurm sees them. `env` is what commands need to reach it."""

    def __init__(self, folder):
        self.folder, self.started = Path(folder), {}
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": os.environ["PATH"]}
        for name in ("state", "spool.n1", "spool.n2", "log"):
            (self.folder / name).mkdir()
        ports = []
        for _ in range(3):
            with socket.socket() as taken:
                taken.bind(("", 0))
                ports.append(taken.getsockname()[1])
        host = subprocess.run(["hostname", "-s"], capture_output=True, text=True).stdout.strip()
        values = {"host": host, "folder": self.folder, "port": ports[0], "port1": ports[1], "port2": ports[2]}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        own += [f"--key-file={key}", f"--seed-file={self.folder}/munge.seed", "--force", "--foreground"]
        self.spawn("munged", *own)
        self.until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.spawn("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.spawn("slurmd", "-D", "-N", node)
        self.until(lambda: self.slurm("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"], "the nodes")

    def spawn(self, *words):
        name = " ".join(word for word in words if not word.startswith(("--", "-D")))
        log = open(self.folder / "log" / f"{name.replace(' ', '')}.out", "ab")
        process = subprocess.Popen(
            words,
            env=os.environ | self.env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        self.started[name] = process

    def until(self, true, what, seconds=60):
        """Wait until `true()` is."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                logs = "\n".join(file.read_text(errors="replace")[-1500:] for file in (self.folder / "log").iterdir())
                raise TimeoutError(f"{what} not there within {seconds} s\n{logs}")
            time.sleep(0.3)

    def slurm(self, *words, check=False):
        """Output of one of Slurm's commands."""
        done = subprocess.run(words, env=os.environ | self.env, capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(f"{words}: {done.stderr}")
        return done.stdout

    def state(self, job):
        """A job's state, RUNNING or so, or "" if it is forgotten."""
        words = self.slurm("scontrol", "show", "job", "-o", str(job)).split()
        return next((word.split("=")[1] for word in words if word.startswith("JobState=")), "")

    def end(self, job, seconds=600):
        """Wait until a job is over; its state."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "")
        self.until(lambda: self.state(job) in over, f"the end of job {job}", seconds)
        return self.state(job)

    def restart(self, name):
        """Stop one of the daemons and start it again."""
        process = self.started[name]
        words = process.args
        process.terminate()
        process.wait(30)
        self.spawn(*words)

    def stop(self):
        """End every job, then the daemons that were started here."""
        subprocess.run(["scancel", "--user=root"], env=os.environ | self.env, capture_output=True, timeout=30)
        deadline = time.monotonic() + 40
        while self.slurm("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in reversed(self.started.values()):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two Slurm nodes, for the whole session; skips where there can be none."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    # A short path: the socket's may have 108 letters.
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"slurm-{os.getpid()}"
    folder.mkdir(mode=0o755)
    made = None
    try:
        made = Cluster(folder)
        yield made
    finally:
        if made:
            made.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":  # a cluster by hand: python tests/slurm_cluster.py FOLDER
    print(missing() or Cluster(sys.argv[1]).env)
    time.sleep(1e6)

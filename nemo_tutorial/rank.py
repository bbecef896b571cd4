"""Start of a rank under srun: as under torchrun, with signals remembered until the recipe listens to them.

srun python rank.py RECIPE [--check_network]
"""

import os
import signal
import sys
from pathlib import Path

# The code that travels with the job, whatever lies in the folder that the job runs in.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from nemo_tutorial import faults, network  # noqa: E402


def as_torchrun():
    """Say in torchrun's variables what Slurm's say, and take Slurm's away: returns the number of nodes.

    Lightning would requeue the job by itself, find the first node by its name, and refuse a job named "bash".
    """
    slurm, tasks = os.environ, os.environ["SLURM_NTASKS"]
    nodes = int(slurm["SLURM_NNODES"])
    values = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(int(tasks) // nodes),
        "GROUP_RANK": slurm["SLURM_NODEID"],
        "NODE_RANK": slurm["SLURM_NODEID"],
        "TORCHELASTIC_RUN_ID": slurm["SLURM_JOB_ID"],
        "TORCHELASTIC_RESTART_COUNT": slurm.get("SLURM_RESTART_COUNT", "0"),
    }
    for name in [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_JOB_ID"]:
        del os.environ[name]
    os.environ.update(values)
    return nodes


def main(recipe, check_network):
    early = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: early.append(number))
    nodes = as_torchrun()
    if check_network and nodes > 1 and os.environ["LOCAL_RANK"] == "0":
        try:
            network.meet({}, nodes)
        except ValueError as error:
            sys.exit(f"error: the nodes do not find one another\n{error}")

    if os.environ["RANK"] == "0":
        faults.remove_unfinished(Path(recipe).parents[1])  # of a start whose node was lost

    import fiddle as fdl
    from nemo_run.config import Partial
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    function = fdl.build(fdl.cast(Partial, ZlibJSONSerializer().deserialize(Path(recipe).read_text(encoding="utf-8"))))
    if early:  # now that the recipe's own callback listens
        os.kill(os.getpid(), early[0])
    function()


if __name__ == "__main__":
    main(sys.argv[1], "--check_network" in sys.argv[2:])

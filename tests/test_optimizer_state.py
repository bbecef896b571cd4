"""The optimizer's state in checkpoints: of any number of replicas, whole, and the same for Megatron."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.nemo


def test_each_element_is_somebodys_and_owners_have_about_as_many():
    """Three replicas, two buckets that are padded to a multiple of three, a parameter that lies on all ranks."""
    from nemo_tutorial import optimizer_state

    buckets = [SimpleNamespace(offset=0, grad_data=range_of(90)), SimpleNamespace(offset=90, grad_data=range_of(60))]
    names = {"a": (0, 70, 0), "b": (70, 86, 0), "c": (90, 100, 1), "d": (100, 150, 1)}
    buffer = SimpleNamespace(param_index_map=names, buckets=buckets)
    optimizer = SimpleNamespace(buffers=[buffer], data_parallel_group=SimpleNamespace(size=lambda: 3))
    found = {name: (owner, pieces) for _, name, owner, pieces in optimizer_state.parameters(optimizer)}
    assert found == {
        "a": (0, [(0, 0, 30), (1, 30, 60), (2, 60, 70)]),
        "b": (1, [(2, 0, 16)]),
        "c": (2, [(0, 0, 10)]),
        "d": (2, [(0, 0, 10), (1, 10, 30), (2, 30, 50)]),
    }


def range_of(size):
    return SimpleNamespace(numel=lambda: size)


def replicas(root, count, who, folder):
    """What rank 0 of tests/replicas.py prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", "0"]
    path = os.pathsep.join([str(root / "nemo_tutorial/no_gpu"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "--standalone", str(root / "tests/replicas.py"), who, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1])


def test_replicas_go_on(root, tmp_path):
    """Three, of which Megatron's own way mixes the parameters' states up, two, and one as Megatron loads it."""
    (tmp_path / "checkpoint").mkdir()
    saved = replicas(root, 3, "save", tmp_path / "checkpoint")
    assert saved["padded"]
    assert replicas(root, 3, "load", tmp_path / "checkpoint")["losses"] == saved["losses"]
    for count, who in ((2, "load"), (1, "load"), (1, "stock-load")):
        losses = replicas(root, count, who, tmp_path / "checkpoint")["losses"]
        assert losses == pytest.approx(saved["losses"], rel=0.01), (count, who)

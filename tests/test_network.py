"""Nodes without a scheduler: each mistake in one node's variables is found, on time, and named with its node."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, free_port

NODE = """\
import json, sys
from nemo_tutorial import network
nodes, facts, seconds = json.loads(sys.argv[1])
print(*(network.environment_problems(nodes) or network.meet(facts, nodes, seconds)))
"""
SECONDS = 3


@pytest.fixture
def port():
    return free_port()


def nodes(*settings, count=2, seconds=SECONDS):
    """Start a process for each node's (MASTER_ADDR, MASTER_PORT, NODE_RANK, facts): what each said, and the seconds."""
    began, processes = time.monotonic(), []
    for number, (address, port, node, facts) in enumerate(settings):
        env = {"MASTER_ADDR": address, "MASTER_PORT": port, "NODE_RANK": node}
        env = {name: str(value) for name, value in env.items() if value is not None}
        env |= {"PYTHONPATH": str(ROOT), "SLURMD_NODENAME": f"host{number}", "PATH": os.environ["PATH"]}
        words = [sys.executable, "-c", NODE, json.dumps([count, facts, seconds])]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=60)[0] for process in processes]
    return said, time.monotonic() - began


def test_nodes_meet(port):
    said, _ = nodes(*(("127.0.0.1", port, node, {"--lr": 1}) for node in (2, 0, 1)), count=3)
    assert said == ["host1 host2 host0\n"] * 3


@pytest.mark.parametrize(
    ("first", "second", "on_first", "on_second"),
    [
        # (address, rank, facts); what each node's error names.
        (("127.0.0.1", 0, {}), None, "no word within 3 s from the node with NODE_RANK=1; here are 0 (host0)", None),
        (("127.0.0.1", 1, {}), None, "node 1 (host0): nothing answers at MASTER_ADDR=127.0.0.1", None),
        (
            ("127.0.0.1", 0, {}),
            ("127.0.0.1", 0, {}),
            "only one node with NODE_RANK=0",
            "only one node with NODE_RANK=0",
        ),
        (("192.0.2.1", 0, {}), None, "node 0 (host0): MASTER_ADDR=192.0.2.1 is not this node's address", None),
        (("127.0.0.1", 0, {}), ("127.0.0.1", 2, {}), "NODE_RANK=1", "NODE_RANK=2 is not one of 0 to 1"),
        (("127.0.0.1", 0, {}), ("127.0.0.1", None, {}), "NODE_RANK=1", "NODE_RANK not set"),
        (("127.0.0.1", 0, {}), ("no.such.host.invalid", 1, {}), "NODE_RANK=1", "no address that this node knows"),
        (
            ("127.0.0.1", 0, {"--lr": 1}),
            ("127.0.0.1", 1, {"--lr": 2}),
            "node 1 (host1) has --lr 2, node 0 (host0) has 1",
            "node 1 (host1) has --lr 2, node 0 (host0) has 1",
        ),
    ],
)
def test_a_mistake_is_named(first, second, on_first, on_second, port):
    settings = [(address, port, node, facts) for address, node, facts in filter(None, (first, second))]
    said, took = nodes(*settings)
    wanted = [on_first, on_second] if second else [on_first]
    if second and second[1] == 0:  # whichever came second
        assert any(on_second in text for text in said), said
    else:
        for text, want in zip(said, wanted):
            assert want in text, text
    assert took < 5 * SECONDS


def test_two_nodes_with_one_rank(port):
    said, _ = nodes(*(("127.0.0.1", port, node, {}) for node in (0, 1, 1)), count=3, seconds=10)
    assert "two nodes have NODE_RANK=1: host" in said[0]
    assert sum("two nodes have NODE_RANK=1" in text for text in said) >= 2


def test_another_number_of_nodes(port):
    """And a port that something else listens at."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", NODE, json.dumps([count, {}, SECONDS])],
            env=env | {"NODE_RANK": node, "SLURMD_NODENAME": f"host{node}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node, count in (("0", 2), ("1", 4))
    ]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert all("node 1 (host1) has --num_nodes 4, node 0 (host0) has 2" in text for text in said), said
    with socket.create_server(("127.0.0.1", port)):
        said, _ = nodes(("127.0.0.1", port, 0, {}), ("127.0.0.1", port, 1, {}))
    assert f"MASTER_PORT={port} can't be listened at" in said[0]
    assert "is not node 0 of this run" in said[1]

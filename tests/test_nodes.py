"""Two nodes without a scheduler: the same command on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, script

from nemo_tutorial import checkpoints

pytestmark = [pytest.mark.nemo, pytest.mark.full]
TRAIN = "--nemo_model nemo_ckpt/tiny --dataset_path data/pre --split 90,10,0 -s 128 -g 8 --lr 6e-3 --num_workers 0 "
TRAIN = (TRAIN + "--precision fp32 --max_steps 10 --val_check_interval 10 -G 1").split()


def losses(run):
    lines = (run / "record" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def test_two_launchers_are_one_run(stages):
    """Both end with 0, the losses are those of one process, and the log has the speed between the nodes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = [sys.executable, str(ROOT / "pretraining/pretrain.py"), "-E", "by_hand", "-N", "2", "-T", "2", *TRAIN]
    processes = []
    for node in range(2):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": str(node)}
        processes.append(
            subprocess.Popen(
                words, cwd=stages, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert all(re.search(r"nodes +0 \S+, 1 \S+", text) and re.search(r"result +done", text) for text in said)
    assert re.search(r"network: 2 ranks on 2 node\(s\) add 4 MiB in [\d.]+ ms, [\d.]+ GB/s a rank", said[0])
    run = stages / "results" / "by_hand"
    assert checkpoints.step(checkpoints.latest(run)) == 10
    assert len(json.loads((run / "record" / "run.json").read_text())["starts"]) == 1
    script(stages, "pretraining/pretrain.py", "-E", "by_hand_one", *TRAIN)
    one, two = losses(stages / "results" / "by_hand_one"), losses(run)
    assert sorted(one) == sorted(two) == list(range(1, 11))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-3

"""Two nodes without a scheduler: the same command on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK."""

import json
import os
import re

import pytest
from conftest import losses, on_nodes, script

from nemo_tutorial import checkpoints

pytestmark = pytest.mark.nemo
TRAIN = "--nemo_model nemo_ckpt/tiny --dataset_path data/pre --split 90,10,0 -s 128 -g 8 --lr 6e-3 --num_workers 0 "
TRAIN = (TRAIN + "--precision fp32 --max_steps 10 --val_check_interval 10").split()


@pytest.mark.parametrize("node", [0, 1])
def test_the_first_node_alone_writes_the_record(tuned_stages, load_script, monkeypatch, node):
    """Two that wrote prompts.json at once stopped one another."""
    from nemo_tutorial import executors, network

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended

    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "NODE_RANK": str(node)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tuned_stages)
    monkeypatch.setattr(network, "meet", lambda *args: ["first", "second"])
    monkeypatch.setattr(executors, "launch", lambda *args: (1, ["was not launched"]))
    monkeypatch.setattr(os, "_exit", end)
    flags = ["-E", f"node{node}", "-N", "2", "-G", "1", "--generate_prompts", "prompts.txt"]
    with pytest.raises(Ended):
        load_script("pretraining/pretrain.py").main([*TRAIN, *flags])
    found = {file.name for file in (tuned_stages / "results" / f"node{node}").rglob("*") if file.is_file()}
    expected = {"prompts.json", "config.yaml", "lineage.json", "run.json", "report.html", "summary.json"}
    assert found == (expected if node == 0 else set())


@pytest.mark.full
def test_two_launchers_are_one_run(stages):
    """Both end with 0, the losses are those of one process, and the log has the speed between the nodes."""
    (stages / "asked.txt").write_text("The river\n", encoding="utf-8")
    ask = ["--generate_prompts", "asked.txt", "--generate_tokens", 4]
    flags = ["-E", "by_hand", "-T", 2, *TRAIN, *ask]
    said = [node.stdout for node in on_nodes(stages, "pretraining/pretrain.py", 2, *flags)]
    assert [bool(re.search(r"report +results/", text)) for text in said] == [True, False]
    assert all(re.search(r"nodes +0 \S+, 1 \S+", text) and re.search(r"result +done", text) for text in said)
    assert re.search(r"network: 2 ranks on 2 node\(s\) add 4 MiB in [\d.]+ ms, [\d.]+ GB/s a rank", said[0])
    run = stages / "results" / "by_hand"
    assert checkpoints.step(checkpoints.latest(run)) == 10
    assert len(json.loads((run / "record" / "run.json").read_text())["starts"]) == 1
    script(stages, "pretraining/pretrain.py", "-E", "by_hand_one", "-G", 1, *TRAIN)
    one, two = losses(stages / "results" / "by_hand_one"), losses(run)
    assert sorted(one) == sorted(two) == list(range(1, 11))
    assert max(abs(one[step] - two[step]) for step in one) < 1e-3

"""The job that NeMo-Run would submit to Slurm, and that no token is in it."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, script

pytestmark = pytest.mark.nemo
CANARY = "hf_canary5e0c7a"


def test_sbatch_script_is_the_golden_one_and_holds_no_token(stages):
    """Two nodes of eight GPUs with a container; run again after a wanted change: tests/golden/two_nodes.sh."""
    result = script(
        stages,
        "pretraining/pretrain.py",
        "--executor",
        "slurm",
        "--account",
        "lab",
        "--partition",
        "gpus",
        "--container_image",
        "nvcr.io/nvidia/nemo:25.02",
        "--num_nodes",
        2,
        "--num_gpus",
        8,
        "-T",
        2,
        "--nemo_model",
        "nemo_ckpt/tiny",
        "--dataset_path",
        "data/pre",
        "--split",
        "90,10,0",
        "-s",
        128,
        "-g",
        16,
        "--max_steps",
        4,
        "--experiment",
        "golden",
        "--dry_run",
        "full",
        HF_TOKEN=CANARY,
    )
    lines = [line.strip() for line in result.stdout.splitlines()]
    text = "\n".join(lines[lines.index("#!/bin/bash") : lines.index("exit $exitcode") + 2]) + "\n"
    text = text.replace(str(stages), "WORK").replace(str(ROOT), "ROOT")
    text = re.sub(r"golden_\d+", "golden_ID", text)
    # The two mounts stand in the order of their names.
    text = text.replace("ROOT:ROOT,WORK:WORK", "WORK:WORK,ROOT:ROOT")
    golden = Path(__file__).parent / "golden" / "two_nodes.sh"
    assert text == golden.read_text()
    assert CANARY not in result.stdout + result.stderr
    for file in stages.rglob("*"):
        if file.is_file():
            assert CANARY.encode() not in file.read_bytes(), file
    # The recipe, too, is shown with what was corrected.
    assert "tensor_model_parallel_size: 2" in result.stdout and "nemo_tutorial.resume.NewestComplete" in result.stdout
    assert "sequence_parallel: true" in result.stdout

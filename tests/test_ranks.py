"""Four ranks and eight, TP, PP, CP and DP at once: a GPU each, or all on one, or the no-GPU mode's processes."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import losses, on_ranks, script
from test_conversion import hf_tensors

from nemo_tutorial import checkpoints, preflight

pytestmark = [pytest.mark.nemo, pytest.mark.full]
GPU = preflight.gpus_here() > 0
TRAIN = "--nemo_model nemo_ckpt/tiny --dataset_path data/pre --split 90,10,0 -s 128 -g 8 -m 2 --lr 6e-3 --num_workers 0"
TRAIN = [*TRAIN.split(), *"--max_steps 10 --val_check_interval 5 --precision".split(), "bf16" if GPU else "fp32"]
# On a GPU attention by CP is of 16 bits; there its backward pass is to sum in the same order each time.
NEAR, FIXED = (0.02, {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}) if GPU else (1e-3, {})
LAYOUTS = {
    "one": ([], 1),
    "tp2-pp2": (["-T", 2, "-P", 2], 4),
    "tp2-pp2-dp2": (["-T", 2, "-P", 2], 8),
    "tp2-pp2-cp2": (["-T", 2, "-P", 2, "-C", 2], 8),
    "tp2-cp2-dp2": (["-T", 2, "-C", 2], 8),
}


@pytest.mark.parametrize("layout, then", [("tp2-pp2", "one"), ("tp2-pp2-cp2", "tp2-pp2-dp2"), ("tp2-cp2-dp2", "one")])
def test_layouts_together(stages, layout, then):
    """One process' losses and weights; a run that was stopped goes on bit-equal, and near by another layout."""
    if not GPU and LAYOUTS[layout][1] > 4:
        pytest.skip("asks for a GPU: CP is Transformer Engine's")

    def train(name, layout, *more):
        flags, ranks = LAYOUTS[layout]
        flags = ["-E", name, *TRAIN, *flags, *more]
        return on_ranks(stages, "pretraining/pretrain.py", ranks, *flags, **FIXED).stdout

    whole, stopped, other, one = (stages / "results" / f"{layout}-{name}" for name in ("whole", "stop", "other", "one"))
    stop = ("--exit_interval", 5)
    runs = [(whole.name, layout), (stopped.name, layout, *stop), (one.name, "one")]
    with ThreadPoolExecutor() as pool:  # most of each is the import of NeMo
        list(pool.map(lambda run: train(*run), runs))
        shutil.copytree(stopped, other, symlinks=True)
        runs = [(stopped.name, layout), (other.name, then)]
        for said in pool.map(lambda run: train(*run), runs):
            assert "goes on from step 5 " in said
        checkpoint = {run: checkpoints.latest(run).resolve() for run in (whole, other, one)}
        export = "convert_ckpt/convert_from_nemo_to_hf.py"
        list(
            pool.map(
                lambda run: script(stages, export, "--source", checkpoint[run], "--output_path", f"hf_{run.name}"),
                checkpoint,
            )
        )
    expected = losses(one)
    assert sorted(expected) == list(range(1, 11)) and expected[10] < 0.9 * expected[1]
    assert losses(whole) == losses(stopped)
    weights = {name: tensor.float() for name, tensor in hf_tensors(stages / f"hf_{one.name}").items()}
    for run in (whole, other):
        worst = max(abs(loss - expected[step]) for step, loss in losses(run).items())
        found = hf_tensors(stages / f"hf_{run.name}")
        assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in weights.items()}
        off = max(((found[name] - tensor).norm() / tensor.norm()).item() for name, tensor in weights.items())
        print(f"{run.name}: largest difference of a loss {worst:.2g}, of an exported tensor {off:.2g}")
        assert len(losses(run)) == 10 and worst < NEAR and off < 10 * NEAR

"""What the flags of schedule, memory and adapters do to a training run, through the real NeMo on the CPU."""

import json

import pytest
from conftest import script

from nemo_tutorial import memory, models, schedule

pytestmark = pytest.mark.nemo
FLAGS = (
    "--hf_model_id hf_model/tiny --dataset_path data/pre --split 90,10,0 --seq_length 128 --global_batch_size 8 "
    "--micro_batch_size 4 --num_workers 0 --precision fp32 --limit_val_batches 1 --num_gpus 1"
)


def train(stages, name, words, flags=FLAGS, program="pretraining/pretrain.py"):
    """Train: the lines with a loss by step, the validation losses, what was said."""
    said = script(stages, program, "--experiment", name, *flags.split(), *words.split()).stdout
    lines = (stages / "results" / name / "record/metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    steps = {line["step"]: line for line in lines if "loss" in line}
    return steps, [line["val_loss"] for line in lines if "val_loss" in line], " ".join(said.split())


def kept(stages, name):
    """The steps of a run's checkpoints."""
    folder = stages / "results" / name / "checkpoints"
    return sorted(
        int(path.name.split("step=")[1].split("-")[0]) + 1 for path in folder.iterdir() if not path.is_symlink()
    )


@pytest.fixture(scope="session")
def plain(stages):
    """Six steps without any of the flags."""
    return train(stages, "options_plain", "--max_steps 6 --lr 6e-3 --val_check_interval 2 --save_interval 4")


def test_save_interval(stages, plain):
    """Validated at 2, 4 and 6; saved at 4, and at the end."""
    assert len(plain[1]) >= 3
    assert kept(stages, "options_plain") == [4, 6]


def test_the_size_of_a_checkpoint(stages, plain):
    """What was said about the disk, against what lies there."""
    from types import SimpleNamespace

    model = models.from_hf(stages / "hf_model/tiny")
    one = memory.checkpoint_bytes(model, SimpleNamespace(precision="fp32", peft=None))
    folder = stages / "results/options_plain/checkpoints"
    for checkpoint in folder.iterdir():
        files = sum(file.stat().st_size for file in (checkpoint / "weights").iterdir())
        assert files == pytest.approx(one, rel=0.08), checkpoint


def test_seed_schedule_and_early_stopping(stages, plain):
    """Other random weights; NeMo's learning rates are the announced ones; stopped when the loss rises, with exit 0."""
    words = "--max_steps 12 --lr 9 --warmup_steps 2 --lr_decay wsd --lr_wsd_decay_steps 3 --seed 7"
    steps, losses, said = train(stages, "options_stop", f"{words} --val_check_interval 2 --early_stopping_patience 1")
    last = max(steps)
    assert last < 12 and f"stopped early at step {last}" in said and "result done" in said
    assert losses[-1] >= min(losses[:-1]) and kept(stages, "options_stop")[-1] == last
    for step, line in steps.items():
        expected = schedule.learning_rate(step - 1, 9, 0.9, 2, 12, "wsd", 3)
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-5)
    assert abs(steps[1]["loss"] - plain[0][1]["loss"]) > 1e-4


def same(steps, others):
    assert sorted(steps) == sorted(others)
    for step, line in steps.items():
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(others[step][name], rel=1e-5, abs=1e-6), (step, name)


@pytest.mark.full
@pytest.mark.parametrize("words", ["--recompute full", "--recompute selective"], ids=str)
def test_recomputation_changes_no_number(stages, plain, words):
    same(train(stages, f"options_{words.split()[1]}", f"--max_steps 6 --lr 6e-3 {words}")[0], plain[0])


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [
        "--recompute full --recompute_method block --recompute_num_layers 1",
        "--recompute selective --recompute_modules core_attn mlp",
    ],
    ids=["block", "core_attn mlp"],
)
def test_other_recomputations_change_no_number(stages, plain, words):
    name = "options_" + words.split()[-1]
    same(train(stages, name, f"--max_steps 6 --lr 6e-3 {words}")[0], plain[0])


@pytest.mark.full
def test_recomputation_under_an_adapter(stages, write_rows):
    """Without the hook on the embedding, nothing would have a gradient."""
    write_rows(stages / "options_rows", 32, 8)
    flags = (
        "--nemo_model nemo_ckpt/tiny --dataset_path options_rows --seq_length 128 --global_batch_size 8 "
        "--num_workers 0 --precision fp32 --peft lora --lora_rank 4 --max_steps 4 --lr 1e-2"
    )
    program = "finetuning/finetune.py"
    before = train(stages, "options_lora", "", flags, program)[0]
    after = train(stages, "options_lora_full", "--recompute full", flags, program)[0]
    same(after, before)
    assert after[4]["loss"] < after[1]["loss"] and all(line["grad_norm"] > 0 for line in after.values())


def test_parts_of_a_pipeline_stage(stages):
    """Four layers as 1, as PP 2, and as PP 2 with two parts each: the same losses, from the same checkpoint.

    NeMo alone trains the last on swapped messages: Megatron's overlap_p2p_comm has to be on.
    """
    script(stages, "data/make_tiny_model.py", "--output_path", "hf_model/four", "--num_hidden_layers", 4)
    source = ["--source", "hf_model/four", "--output_path", "nemo_ckpt/four"]
    script(stages, "convert_ckpt/convert_from_hf_to_nemo.py", *source)
    flags = FLAGS.replace("--hf_model_id hf_model/tiny", "--nemo_model nemo_ckpt/four").replace("size 4", "size 2")
    words = "--max_steps 4 --lr 6e-3 --val_check_interval 4"
    one = train(stages, "options_four", words, flags)[0]
    for name, layout in (("two", ""), ("parts", "--virtual_pipeline_model_parallel_size 2")):
        found = train(stages, f"options_{name}", f"{words} --num_gpus 2 -P 2 {layout}", flags)[0]
        for step, line in found.items():
            assert line["loss"] == pytest.approx(one[step]["loss"], abs=1e-4), (name, step)

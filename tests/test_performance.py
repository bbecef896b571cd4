"""Which settings of speed a run gets, and that they reach NeMo's recipe."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from nemo_tutorial import performance

GPU = {
    "accelerator": "gpu",
    "performance": "auto",
    "precision": "bf16",
    "peft": None,
    "lora_dropout": None,
    "num_nodes": 1,
    "num_gpus": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "main_grads_dtype": None,
    "fp8": False,
    "sequence_parallel": False,
}


def names(**flags):
    return {setting.name for setting in performance.settings(SimpleNamespace(**{**GPU, **flags}))}


@pytest.mark.parametrize("flags", [{"accelerator": "cpu"}, {"precision": "fp32"}], ids=str)
def test_nemos_own_kernels_stay(flags):
    """Without a GPU, and in fp32, which is for comparing; what the host does is made as fast there."""
    assert names(**flags) == {"garbage", "pause", "ahead"} and "answers" in names(**flags, packing=False)
    assert names(**flags, performance="off") == set()


def test_one_replica_overlaps_nothing():
    assert "one replica" in names() and "one replica" in names(num_gpus=4, tensor_model_parallel_size=4)
    assert "one replica" not in names(num_gpus=8) and "one replica" not in names(main_grads_dtype="bf16")


def test_attention_that_is_split_is_transformer_engines():
    assert {"attention", "activation"} <= names()
    assert "attention" not in names(num_gpus=2, context_parallel_size=2)


def test_positions_are_turned_with_the_split_but_not_of_packs_on_several_gpus():
    assert {"positions", "gradients", "logits"} <= names()
    assert "positions" in names(packing=True) and "gradients" not in names(packing=True, peft="lora")
    split = {"num_gpus": 2, "context_parallel_size": 2}
    assert "positions" in names(**split) and "positions" in names(**split, packing=False)
    for packing in (True, None):
        assert "positions" not in names(**split, packing=packing)


def test_logits_of_answers_are_of_fine_tuning_where_all_of_a_sample_is_on_the_gpu():
    assert "answers" not in names()  # pretraining, which has no --packing
    for packing in (True, False):
        assert "answers" in names(packing=packing, num_gpus=2) and "answers" in names(packing=packing, peft="lora")
        for split in ("tensor_model_parallel_size", "context_parallel_size"):
            assert "answers" not in names(packing=packing, num_gpus=2, **{split: 2})


def test_gradients_in_bf16_are_not_summed_in_products():
    """They are chosen where memory is short, and Transformer Engine keeps a placeholder of each shape."""
    assert "gradients" not in names(main_grads_dtype="bf16")


def test_adapters_are_split_with_the_sequence():
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "peft": "lora"}
    assert "adapter split" in names(**split) and not {"adapter", "adapter kernels"} & names(**split)
    for flags in ({"sequence_parallel": False}, {"peft": None}, {"lora_dropout": 0.1}):
        assert "adapter split" not in names(**split | flags)


def test_weights_are_cast_to_fp8_where_an_optimizer_has_them():
    assert "casts" in names(fp8=True) and not {"casts"} & (names() | names(fp8=True, peft="lora"))


def test_adapters_without_dropout_are_added_in_the_product():
    assert "adapter" in names(peft="lora", num_gpus=4)
    for flags in ({}, {"lora_dropout": 0.1}, {"tensor_model_parallel_size": 4, "num_gpus": 4}, {"peft": "dora"}):
        assert not {"adapter", "adapter kernels"} & names(**{"peft": "lora" if flags else None} | flags), flags
    assert "adapter kernels" in names(peft="lora") and "adapter kernels" not in names(peft="lora", fp8=True)


def test_each_setting_says_why_and_changes_something():
    assert len({setting.name for setting in performance.SETTINGS}) == len(performance.SETTINGS)
    for setting in performance.SETTINGS:
        assert len(setting.why) > 20 and (setting.values or setting.callback)


@pytest.mark.nemo
@pytest.mark.parametrize("kind", ["pretrain_recipe", "finetune_recipe"])
def test_they_reach_the_recipe(kind):
    """Every value is in NeMo's recipe, unless that has no such part (a finetuning recipe says nothing of DDP)."""
    import fiddle as fdl

    from nemo_tutorial import hooks, kernels, lora, recipes

    peft = "lora" if kind == "finetune_recipe" else None
    args = SimpleNamespace(**GPU | {"accelerator": "gpu", "experiment": "x", "peft": peft})
    recipe = recipes.start("llama32_1b", kind, args)
    stock = recipe.trainer.strategy.ddp.overlap_grad_reduce if kind == "pretrain_recipe" else None
    recipes.set_performance(recipe, args)
    assert recipe.model.config.cross_entropy_loss_fusion is True
    assert recipe.model.config.cross_entropy_fusion_impl == "te"
    callbacks = [fdl.get_callable(callback) for callback in recipe.trainer.callbacks]
    assert (lora.AddedInProduct in callbacks) == (kind == "finetune_recipe")
    assert hooks.FreezeHeap in callbacks and hooks.ShortPause in callbacks
    assert {kernels.FlashAttention3, kernels.SwiGLU, kernels.CrossEntropy, kernels.FusedRoPE} <= set(callbacks)
    assert (kernels.GradientsInProduct in callbacks) == (kind == "pretrain_recipe")
    if kind == "pretrain_recipe":
        ddp = recipe.trainer.strategy.ddp
        assert stock is True and ddp.check_for_nan_in_grad is True
        assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather, ddp.average_in_collective) == (False,) * 3


@pytest.mark.nemo
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_gradients_in_bf16_keep_their_buckets(build, kind):
    """In one bucket, those of 8B parameters were NaN in the first step."""
    words = "--use_precision_aware_optimizer --main_grads_dtype bf16 --exp_avg_dtype bf16"
    ddp = build(kind, words).recipe.trainer.strategy.ddp
    assert ddp.overlap_grad_reduce is True and ddp.overlap_param_gather is True
    assert ddp.grad_reduce_in_fp32 is False and ddp.check_for_nan_in_grad is True


@pytest.mark.nemo
def test_the_collector_leaves_what_is_there_after_the_first_step():
    import gc

    from nemo_tutorial import hooks

    before = gc.get_freeze_count()
    callback = hooks.FreezeHeap()
    try:
        callback.on_train_batch_end(None, None, None, None, 0)
        frozen = gc.get_freeze_count()
        assert frozen > before + 100_000 and len(gc.get_objects()) < frozen / 100
        later = [[] for _ in range(1000)]
        callback.on_train_batch_end(None, None, None, None, 1)
        assert gc.get_freeze_count() <= frozen and gc.is_tracked(later)
    finally:
        gc.unfreeze()


@pytest.mark.nemo
@pytest.mark.parametrize("experts", [None, 8])
def test_what_is_done_for_nothing_between_steps_is_left_out(monkeypatch, experts):
    """Routers are looked for in a mixture of experts only; a logged value that lies where it is asked for stays."""
    import importlib

    import torch
    from lightning.pytorch.trainer.connectors.logger_connector import result

    from nemo_tutorial import hooks

    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    stock = module.reset_model_temporary_tensors
    monkeypatch.setattr(module, "reset_model_temporary_tensors", stock)
    monkeypatch.setattr(result._ResultMetric, "to", hooks.STOCK_TO)
    hooks.ShortPause().setup(None, SimpleNamespace(config=SimpleNamespace(num_moe_experts=experts)), "fit")
    assert (module.reset_model_temporary_tensors is stock) == bool(experts)
    values = result._ResultCollection(training=True)
    for value in (2.0, 4.0):
        values.log("training_step", "loss", torch.tensor(value), on_step=False, on_epoch=True, batch_size=1)
    metric = values["training_step.loss"]
    assert metric.compute() == 3.0 and metric.to(torch.device("cpu")) is metric
    assert metric.to(torch.device("meta")).value.device.type == "meta"


INSIDE = """
import os, sys, tempfile
sys.path[:0] = [os.path.join(sys.argv[1], folder) for folder in ("benchmarks", "tests")]
import nemo_tutorial.cpu
import gpu, gpu_nemo, triton_interpreter
import nemo_run as run
from nemo_tutorial import kernels, lora

calls, add = [], kernels.add_gradient
kernels.add_gradient = lambda *args: calls.append(add(*args))
callbacks = kernels.GradientsInProduct, kernels.FusedRoPE, lora.AddedInProduct, lora.AddedByKernels
inside, adapters = [run.Config(callback) for callback in callbacks[:2]], [run.Config(each) for each in callbacks[2:]]
gpu_nemo.CHANGES["inside"] = lambda recipe: recipe.trainer.callbacks.extend(inside)
gpu_nemo.CHANGES["adapters"] = lambda recipe: recipe.trainer.callbacks.extend(adapters)
pairs = [("tiny", "ours"), ("tiny", "ours+inside"), ("tiny-sft", "ours+packed"), ("tiny-sft", "ours+packed+inside")]
pairs += [("tiny-lora", "ours"), ("tiny-lora", "ours+adapters")]
for row, contestant in pairs:
    cell = {"warmup": 2, "lr": 1e-3, "layout": (1, 1, 1, 1), "data_seed": 1, "seed": 1, "profile": False}
    cell |= gpu.ROWS[row][0] | {"accelerator": "cpu", "contestant": contestant}
    if not os.fork():  # each has a process of its own; the import is shared
        os.chdir(tempfile.mkdtemp())
        if "adapters" in contestant:  # the sum that stays unfused on a CPU: its own compiled function is not called
            del nemo_tutorial.cpu.NO_FUSION["bias_dropout_fusion"]
        with triton_interpreter.imported("rope"), triton_interpreter.imported("lora_kernels"):
            found = gpu_nemo.measure(cell, gpu.tokenizer("."))
        print("found", len(calls), len(triton_interpreter.launched), *found["loss"], flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.nemo
def test_what_is_done_inside_products_and_in_one_pass():
    """Megatron's own layers on a CPU, told before they are built, in samples and in packs: the losses stay."""
    path = os.pathsep.join([str(ROOT / "nemo_tutorial/no_gpu"), str(ROOT)])
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-c", INSIDE, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [list(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("found")]
    layers, linears = 2, 2 * 4 + 1  # of two layers and the output
    adapters = 2 * layers * 4  # an A and a B each
    rows = (*found[:2], 6 * 4, linears, 2), (*found[2:4], 3 * 8, linears, 2), (*found[4:], 6 * 4, adapters, 4)
    for plain, changed, micro_batches, sums, kernels in rows:
        (*before, outside), (calls, launched, inside) = ([*line[:2], line[2:]] for line in (plain, changed))
        # There and back in each layer: what turns positions; or SwiGLU, and two sums with the residual.
        assert before == [0, 0] and calls == sums * micro_batches and launched == kernels * layers * micro_batches
        assert inside == pytest.approx(outside, rel=1e-4)
        assert inside[-1] < inside[0]


@pytest.mark.nemo
def test_off_leaves_the_recipe_as_it_was():
    from nemo_tutorial import recipes

    args = SimpleNamespace(**GPU | {"performance": "off", "experiment": "x"})
    recipe = recipes.start("llama32_1b", "pretrain_recipe", args)
    before = recipes.as_text(recipe)
    recipes.set_performance(recipe, args)
    assert recipes.as_text(recipe) == before


@pytest.mark.nemo
def test_the_benchmark_can_be_rehearsed(tmp_path):
    """One process, two, packs on two, two as nodes, and a peer, in processes of their own; no cell twice."""
    rows = ["layout-parity-tp2", "shared-parity-dp2", "layout-tiny-sft-dp2=ours+packed_2", "tiny=ours,transformers"]
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--accelerator", "cpu", "--layouts", "--gpus", "2"]
    command += ["--steps", "2", "--results", str(tmp_path / "gpu.json"), "--rows", *rows]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    cells = {(row, name.split(" @")[0]): cell for row, names in found.items() for name, cell in names.items()}
    packs = cells.pop(("layout-tiny-sft-dp2", "ours+packed_2"))
    assert packs["step_s"] > 0 and packs["padding"] < 0.1 and packs["tokens_a_step"] > 0.9 * 4 * 256
    names = {("layout-parity-tp2", "ours seed 1"), ("shared-parity-dp2", "ours+mbs4 seed 1")}
    assert set(cells) == names | {("tiny", "ours"), ("tiny", "transformers")}
    for cell in cells.values():
        assert cell["step_s"] > 0 and cell["loss"][-1] < cell["loss"][0], cell
    again = subprocess.run(command, capture_output=True, text=True, timeout=30)  # shorter than an import of NeMo
    assert again.returncode == 0 and again.stdout.count(" ours ") == done.stdout.count(" ours ") / 2


@pytest.mark.nemo
@pytest.mark.parametrize("fails", [False, True])
def test_casts_write_no_transposed_copies(fails):
    """While weights are cast, and only then; also those of a quantizer that is made meanwhile. An error passes."""
    from nemo_tutorial import kernels

    written = []

    class Quantizer:
        columnwise_usage = True

        def set_usage(self, columnwise):
            self.columnwise_usage = columnwise

        def update_quantized(self, source, *, noop_flag=None):
            written.append((source, noop_flag, self.columnwise_usage))
            if source == "wrong":
                raise RuntimeError

    def cast(sources, group=None):
        for source in sources:
            Quantizer().update_quantized(source, noop_flag=group)
            kept.update_quantized(source, noop_flag=group)
        return "done"

    kept, stock = Quantizer(), Quantizer.update_quantized
    ours = kernels.rowwise(cast, Quantizer)
    if fails:
        with pytest.raises(RuntimeError):
            ours(["wrong"])
    else:
        assert ours(["a", "b"], group=1) == "done"
        assert written == [(source, 1, False) for source in "aabb"]
    assert Quantizer.update_quantized is stock and kept.columnwise_usage
    kept.update_quantized("later")
    assert written[-1] == ("later", None, True)

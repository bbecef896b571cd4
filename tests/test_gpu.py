"""On a GPU with Transformer Engine: what the no-GPU mode writes is what a GPU machine writes, and can go on from."""

import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import test_adapters
import test_lora_kernels
from conftest import script
from test_families import CASES, make_model

from nemo_tutorial import checkpoints, preflight

pytestmark = [pytest.mark.nemo, pytest.mark.gpu]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
FIXED = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}  # of Transformer Engine's attention
TRAIN = "--nemo_model nemo_ckpt/tiny --dataset_path data/pre --split 90,10,0 --seq_length 128 --global_batch_size 8"
TRAIN = [*TRAIN.split(), *"--micro_batch_size 4 --lr 6e-3 --max_steps 10 --val_check_interval 10".split()]


def contents(checkpoint):
    """{name: tensor} of a NeMo checkpoint: every tensor entry of its distributed checkpoint."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    entries = FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    load(tensors, storage_reader=FileSystemReader(checkpoint / "weights"), no_dist=True)
    return tensors


def names(checkpoint):
    """What a NeMo checkpoint holds, what is no tensor included: a GPU does not load one that lacks any of its own."""
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata)


def losses(folder, name):
    lines = (folder / "results" / name / "record" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="session")
def pretrained(stages):
    """Ten steps on the GPU, and ten in the no-GPU mode."""
    script(stages, "pretraining/pretrain.py", "--experiment", "gpu", *TRAIN)
    script(stages, "pretraining/pretrain.py", "--experiment", "no_gpu", *TRAIN, **NO_GPU)
    return [checkpoints.latest(stages / "results" / name).resolve() for name in ("gpu", "no_gpu")]


def test_an_import_has_the_same_tensors(stages):
    """Names, shapes, dtypes and bits, the norms' names included."""
    flags = ["--source", "hf_model/tiny", "--output_path", "nemo_ckpt/no_gpu"]
    script(stages, "convert_ckpt/convert_from_hf_to_nemo.py", *flags, **NO_GPU)
    assert names(stages / "nemo_ckpt/no_gpu") >= names(stages / "nemo_ckpt/tiny")
    ours, theirs = contents(stages / "nemo_ckpt/no_gpu"), contents(stages / "nemo_ckpt/tiny")
    assert ours.keys() == theirs.keys() and any("layer_norm_weight" in name for name in theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].equal(tensor), name


@pytest.mark.parametrize("case", ["gemma2", "gemma2-rows", "mixtral", "mixtral-tied", "qwen3moe", "qwen3moe-norm"])
def test_an_import_of_other_layers_has_the_same_tensors(case, stages, tmp_path):
    """Norms behind layers, experts one by one and grouped: without a GPU they are made of other modules."""
    make_model(tmp_path / "model", *CASES[case], stages / "hf_model/tiny")
    for output, env in (("gpu", {}), ("no_gpu", NO_GPU)):
        flags = ["--source", "model", "--output_path", output, "--verify", "logits"]
        script(tmp_path, "convert_ckpt/convert_from_hf_to_nemo.py", *flags, **env)
    assert names(tmp_path / "no_gpu") >= names(tmp_path / "gpu")
    ours, theirs = contents(tmp_path / "no_gpu"), contents(tmp_path / "gpu")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()
    }
    assert [name for name, tensor in theirs.items() if not ours[name].equal(tensor)] == []


def test_a_trained_checkpoint_has_the_same_tensors(pretrained):
    """Names, shapes and dtypes of weights and optimizer state; the values as near as bf16 kernels are."""
    theirs, ours = map(contents, pretrained)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()
    }


def test_losses_are_near(stages, pretrained):
    theirs, ours = losses(stages, "gpu"), losses(stages, "no_gpu")
    assert len(theirs) == len(ours) == 10 and theirs[-1] < 0.9 * theirs[0]
    assert max(abs(a - b) for a, b in zip(theirs, ours)) < 0.05, (theirs, ours)


def test_each_exports_and_goes_on_from_the_others_checkpoint(stages, pretrained):
    """The GPU's checkpoint is exported alike with and without a GPU, and resumed without one; and the other way."""
    from nemo_tutorial import conversion

    for name, env in (("a", {}), ("b", NO_GPU)):
        flags = ["--source", pretrained[0], "--output_path", f"hf_{name}"]
        script(stages, "convert_ckpt/convert_from_nemo_to_hf.py", *flags, **env)
    assert conversion.compare(stages / "hf_a", stages / "hf_b") == (21, [])
    more = [*TRAIN[:-3], 12, "--val_check_interval", 1]
    for name, env in (("gpu", NO_GPU), ("no_gpu", {})):
        output = script(stages, "pretraining/pretrain.py", "--experiment", name, *more, **env).stdout
        assert "goes on from step 10" in output
        assert len(losses(stages, name)) == 12 and losses(stages, name)[-1] < losses(stages, name)[0] * 0.9


@pytest.mark.parametrize("gpus", [1, 2])
def test_small_states_go_on(gpus, stages):
    """Gradients and moments in bf16, stopped after five of ten steps: the same losses as without a stop; whole weights.

    And from the fifth on with float32 states, which such a checkpoint holds: nearly the same.
    """
    if preflight.gpus_here() < gpus:
        pytest.skip(f"asks for {gpus} GPUs")
    wide = [*TRAIN[:-1], 5, "--num_gpus", gpus]
    small = [*wide, "--use_precision_aware_optimizer", "--main_grads_dtype", "bf16"]
    small += ["--exp_avg_dtype", "bf16", "--exp_avg_sq_dtype", "bf16"]
    names = [f"{name}_{gpus}" for name in ("small_whole", "small_stopped", "small_then_not")]

    def train(name, flags):
        return script(stages, "pretraining/pretrain.py", "--experiment", name, *flags, **FIXED).stdout

    stop = ["--exit_interval", 5]
    with ThreadPoolExecutor() as pool:  # most of each is the import of NeMo
        list(pool.map(train, names, [small, [*small, *stop], [*small, *stop]]))
    for name in names[1:]:
        found = contents(checkpoints.latest(stages / "results" / name).resolve())
        prefix = "optimizer.state.param."
        masters = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
        assert len(masters) == 9  # of layers, all of them in one
        for weight, master in masters.items():
            assert (master.bfloat16() != found[weight]).float().mean() < 1e-3, weight  # halves are rounded up
            assert not master.bfloat16().float().equal(master), weight
    with ThreadPoolExecutor() as pool:
        for output in pool.map(train, names[1:], [small, wide]):
            assert "goes on from step 5" in output
    whole, stopped, then_not = (losses(stages, name) for name in names)
    assert len(whole) == 10 and whole == stopped
    assert max(abs(a - b) for a, b in zip(whole, then_not)) < 0.02


def test_fast_settings_change_no_loss(stages, pretrained):
    """Ten steps with NeMo's own settings of speed, from the same weights on the same data: the same losses, nearly."""
    script(stages, "pretraining/pretrain.py", "--experiment", "performance_off", *TRAIN, "--performance", "off")
    fast, stock = losses(stages, "gpu"), losses(stages, "performance_off")
    assert max(abs(a - b) for a, b in zip(fast, stock)) < 0.01, (fast, stock)


@pytest.mark.parametrize("columns", [2048, 128256])
def test_cross_entropy_by_transformer_engines_kernels(columns, monkeypatch):
    """Loss and gradient in bf16 are PyTorch's, with rows without label and without gradient."""
    import torch
    import torch.nn.functional as F

    from nemo_tutorial import kernels

    stock = kernels.language_module.te_parallel_cross_entropy
    monkeypatch.setattr(kernels.language_module, "te_parallel_cross_entropy", stock)
    kernels.CrossEntropy().setup(None, None, "fit")
    assert kernels.language_module.te_parallel_cross_entropy is not stock
    torch.manual_seed(1)
    logits = (3 * torch.randn(64, 2, columns, device="cuda")).bfloat16()
    labels, grad = torch.randint(0, columns, (64, 2), device="cuda"), torch.rand(64, 2, device="cuda") * 1e-4
    labels[1, 1], grad[2, 0] = kernels.IGNORED, 0
    whole, ours = (logits.clone().requires_grad_() for _ in range(2))
    expected = F.cross_entropy(whole.float().flatten(0, 1), labels.flatten(), reduction="none").view(64, 2)
    expected.backward(grad)
    loss = kernels.language_module.te_parallel_cross_entropy(ours * 1, labels, None)
    loss.backward(grad)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, whole.grad, rtol=0.01, atol=1e-9)
    assert not ours.grad[1, 1].any() and not ours.grad[2, 0].any()


@pytest.mark.parametrize("groups, n, d", [(8, 4, 64), (8, 4, 128), (32, 1, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_positions_by_our_kernel(groups, n, d, packed):
    """q, k, v and their gradient in bf16 are Megatron's, computed in float32, to the last bit or one beside it."""
    import torch
    from test_rope import frequencies, megatrons

    from nemo_tutorial import rope

    torch.manual_seed(1)
    tokens, b, cuts = 96, 1 if packed else 2, [0, 40, 41, 96]
    mixed = torch.randn(tokens, b, groups, (n + 2) * d, device="cuda").bfloat16().requires_grad_()
    table, pack = frequencies(tokens, d).cuda(), None
    if packed:
        ends = torch.tensor(cuts, dtype=torch.int32, device="cuda")
        pack = SimpleNamespace(cu_seqlens_q=ends, cu_seqlens_q_padded=None)
    found = rope.SplitAndTurn.apply(mixed, *rope.angles(table, pack, tokens))
    if packed:
        table = torch.cat([table[: end - start] for start, end in zip(cuts, cuts[1:])])
    whole = mixed.detach().float().requires_grad_()
    expected = megatrons(whole, table, n, d)
    grads = [torch.randn_like(part).bfloat16() for part in expected]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, [grad.float() for grad in grads])
    for ours, theirs in zip((*found, mixed.grad), (*expected, whole.grad)):
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("shape", [*test_lora_kernels.SHAPES, (1000, 64, 14336, 128, 16, 16)], ids=str)
def test_adapters_in_kernels(shape):
    """SwiGLU and the sum with the residual, with gradients as autograd has them and in Megatron's float32 sums."""
    import torch

    from nemo_tutorial import lora_kernels

    test_lora_kernels.compare(lora_kernels, test_lora_kernels.tensors(shape, torch.bfloat16, "cuda"), 1e-2)
    once, summed = (test_lora_kernels.tensors(shape, torch.bfloat16, "cuda") for _ in range(2))
    for i in test_lora_kernels.ADAPTERS:
        summed[i].main_grad = torch.ones_like(summed[i], dtype=torch.float32)
    for inputs in (once, summed):
        test_lora_kernels.by_kernels(lora_kernels, *inputs).float().square().sum().backward()
    for i in test_lora_kernels.ADAPTERS:
        assert (summed[i].main_grad - 1 - once[i].grad).norm() < 1e-2 * once[i].grad.norm()


def test_a_product_adds_to_a_sum():
    """Of bf16, in float32; the sum that was there is kept."""
    import torch

    from nemo_tutorial import kernels

    torch.manual_seed(1)
    x, grad = torch.randn(512, 64, device="cuda").bfloat16(), torch.randn(512, 96, device="cuda").bfloat16()
    total = torch.randn(96, 64, device="cuda")
    expected = total + grad.float().t().mm(x.float())
    kernels.add_gradient(x, grad, total)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("recipe", ["DelayedScaling", "Float8CurrentScaling"])
def test_weights_are_cast_to_fp8_without_transposes(recipe, monkeypatch):
    """`casts`: bits, scales, maxima and products are Transformer Engine's, in a fifth of its time or less."""
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes
    from transformer_engine.pytorch.tensor import utils

    from nemo_tutorial import kernels

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    stock, found = utils.cast_master_weights_to_fp8, []
    monkeypatch.setattr(utils, "cast_master_weights_to_fp8", stock)
    kernels.RowwiseCasts().setup(None, None, "fit")
    for cast in (stock, utils.cast_master_weights_to_fp8):
        torch.manual_seed(1)
        with te.fp8_model_init(enabled=True, recipe=getattr(recipes, recipe)()):
            layer = te.Linear(4096, 8192, bias=False, params_dtype=torch.bfloat16, device="cuda")
        master, x = torch.randn(layer.weight.numel(), device="cuda"), torch.randn(64, 4096, device="cuda").bfloat16()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        for event in events:
            cast([layer.weight], [master], [0], torch.distributed.group.WORLD)
            event.record()
        cast([layer.weight], [-master[1000:]], [1000], torch.distributed.group.WORLD)  # a rank's part of it
        quantizer = layer.weight._get_quantizer()
        # Of current scaling it is nothing that anybody reads.
        maximum = [quantizer.amax.clone()] if recipe == "DelayedScaling" else []
        with te.fp8_autocast(enabled=True, fp8_recipe=getattr(recipes, recipe)()):
            output = layer(x.requires_grad_())
        output.float().square().sum().backward()
        torch.cuda.synchronize()
        values = [layer.weight._data, layer.weight._scale_inv, quantizer.scale, output.detach(), x.grad, *maximum]
        found.append((events[1].elapsed_time(events[3]), values))
    (theirs, expected), (ours, values) = found
    assert all(value.equal(other) for value, other in zip(values, expected))
    print(f"{recipe}: {theirs / 2:.2f} and {ours / 2:.2f} ms")
    assert ours < theirs / 5


def test_adapters_split_by_sequence():
    """With Transformer Engine's layers, two ranks: output and gradients are the whole's; NeMo's own way is printed."""
    for rank in test_adapters.on_ranks("cuda", NVIDIA_TF32_OVERRIDE="0"):
        for layer, ways in rank.items():
            print(layer, "stock:", ways["stock"])
            for way in ("mended", "split"):
                assert max(ways[way].values()) < 1e-5, (layer, way, ways[way])


def test_a_step_waits_for_no_number():
    """Norm and clipping leave their number on the GPU, and are Megatron's."""
    import torch
    from megatron.core.optimizer import clip_grads

    from nemo_tutorial import ahead

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    torch.manual_seed(1)
    both = [[torch.nn.Parameter(torch.zeros(1000, 30, device="cuda")) for _ in range(5)] for _ in range(2)]
    for ours, theirs in zip(*both):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
    group = torch.distributed.group.WORLD
    ahead.gradient_norm([parameter.grad.clone() for parameter in both[0]], 2, group)  # makes NCCL's communicator
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = ahead.gradient_norm([parameter.grad for parameter in both[0]], 2, group)
        ahead.clip(both[0], 1.0, norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = clip_grads.get_grad_norm_fp32([parameter.grad for parameter in both[1]], 2, group)
    ahead.STOCK_CLIP(both[1], 1.0, expected)
    assert norm.item() == expected
    assert all(ours.grad.equal(theirs.grad) for ours, theirs in zip(*both))


def test_numbers_of_a_step_are_not_awaited():
    """Of the GPU, and one that the host has, as NeMo's time of a step: that is not sent to the GPU to come back."""
    import torch

    from nemo_tutorial import progress

    values = {"loss": torch.tensor(2.5, device="cuda"), "seconds": torch.tensor(0.5), "step": 3}
    progress.Numbers(values).get()  # makes what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(10**9)
        numbers = progress.Numbers(values)
        assert not numbers.arrived()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert numbers.get() == {"loss": 2.5, "seconds": 0.5, "step": 3}


def test_fp8(stages):
    """FP8 in both recipes that an H100 has: the losses of bf16, nearly."""
    for recipe in ("delayed_scaling", "current_scaling"):
        flags = ["--experiment", recipe, *TRAIN, "--fp8", "--fp8_recipe", recipe]
        script(stages, "pretraining/pretrain.py", *flags)
        assert losses(stages, recipe)[-1] < 0.9 * losses(stages, recipe)[0]


@pytest.mark.parametrize("peft", [[], ["--peft", "lora"]])
def test_packed_fine_tuning(stages, peft):
    """Packing is on by default, and what it packs trains as the same rows do unpacked, as near as bf16 kernels are."""
    rows = [{"input": f"{number} + 1 = ?", "output": str(number + 1)} for number in range(64)]
    (stages / "pairs").mkdir(exist_ok=True)
    for name in ("training", "validation"):
        (stages / "pairs" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--nemo_model nemo_ckpt/tiny --dataset_path pairs --seq_length 512 --global_batch_size 64"
    flags = [*flags.split(), *"--max_steps 10 --lr 3e-3".split(), *peft]
    found = {}
    for name, more in (("packed", []), ("unpacked", ["--no_packing", "--micro_batch_size", 8])):
        name += "_lora" if peft else ""
        output = script(stages, "finetuning/finetune.py", "--experiment", name, *flags, *more).stdout
        assert ("64 rows" in output and "packs of" in output) == (not more)
        found[bool(more)] = losses(stages, name)
    packed, unpacked = found[False], found[True]
    assert packed[-1] < packed[0]
    assert max(abs(a - b) for a, b in zip(packed, unpacked)) < 0.05, (packed, unpacked)

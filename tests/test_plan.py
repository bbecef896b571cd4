"""What --dry_run derives: quickly, without NeMo; memory of a GPU against what was measured; what would make it fit."""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys

import pytest
from conftest import LLAMA31_8B, ROOT

from nemo_tutorial import memory, models, options, plan, preflight, runs

SECONDS = 0.5
HEAVY = ("torch", "nemo", "nemo_run", "megatron", "lightning", "transformers")
LLAMA32_1B = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
MIXTRAL = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}


def benchmark():
    """benchmarks/memory.py as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_memory", ROOT / "benchmarks/memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shape(tmp_path_factory):
    """A models.Model with the given fields of a config.json over those of Llama-3.1-8B."""

    def make(**fields):
        folder = tmp_path_factory.mktemp("shape")
        (folder / "config.json").write_text(json.dumps(LLAMA31_8B | fields))
        return models.from_config(folder / "config.json")

    return make


@pytest.fixture(scope="session")
def flags(load_script):
    """The arguments of a training script after its hardware is filled in: flags("--lora_rank 4", "finetune", ...)."""

    def make(words="", script="pretraining/pretrain.py", **fields):
        args = load_script(script).parse_args(["-D", "x", "--dry_run", "--accelerator", "gpu", *words.split()])
        preflight.fill_hardware(args)
        args.seq_length = args.seq_length or 8192
        plan.choose_sizes(args, None)
        args.sequence_parallel = args.tensor_model_parallel_size > 1
        for name, value in fields.items():
            setattr(args, name, value)
        return args

    return make


def estimate(model, args):
    return memory.estimate(model, args)


# The command.


@pytest.mark.parametrize("script", ("pretraining/pretrain.py", "finetuning/finetune.py"))
def test_a_dry_run_is_quick_and_imports_nothing_heavy(script, tmp_path, nemo_checkpoint, write_index, write_rows):
    nemo_checkpoint(tmp_path / "ckpt", LLAMA31_8B)
    write_index(tmp_path / "data/text", [2000] * 500, dtype_code=4)
    write_rows(tmp_path / "rows", 300, 300)
    data = ["-D", "data", "-s", "1024"] if "pretrain" in script else ["-D", "rows"]
    argv = ["-n", "ckpt", *data, "-G", "8", "-T", "2", "-g", "64", "--max_steps", "100", "--accelerator", "gpu"]
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"{code}; print('MODULES', *sys.modules)"
    command = [sys.executable, "-c", code, str(ROOT / script), *argv, "--dry_run"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Of the processor: other work on the machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= SECONDS
    said, _, loaded = done.stdout.partition("MODULES")
    assert not set(loaded.split()) & set(HEAVY)
    lines = [" ".join(line.split()) for line in said.splitlines()]
    for line in (
        "weights ckpt",
        "tokenizer ckpt/context/nemo_tokenizer",
        "where local, 1 x 8 GPUs",
        "parallel TP 2 x PP 1 x CP 1 x DP 4, sequence parallel",
        "steps 100",
    ):
        assert line in lines, said
    starts = ("tokens a step", "learning rate first", "steps an epoch", "disk", "weights 7.5 GiB, 4.01")
    for start in (*starts, "gradients 15.0 GiB", "optimizer 11.2 GiB", "activations", "together"):
        assert any(line.startswith(start) for line in lines), (start, said)
    assert any("of 80 GiB" in line and line.endswith("fits") for line in lines)


# Memory.

MEASURED = list(benchmark().cells())


@pytest.mark.parametrize(
    "cell, found", [case[2:] for case in MEASURED], ids=[f"{row} {name}" for row, name, *_ in MEASURED]
)
def test_the_estimate_is_near_what_was_measured(cell, found):
    """PyTorch's peak on an H100, within 8 %."""
    assert found.allocated / memory.GIB == pytest.approx(cell["allocated_gb"], rel=0.08)
    if "trained" in cell:  # of one with parts of a stage, one part's were counted
        assert found.trained == pytest.approx(cell["trained"], rel=1e-4)


def test_enough_was_measured():
    assert len(MEASURED) >= 11


@pytest.mark.parametrize("pp", (1, 2, 4))
@pytest.mark.parametrize("tp", (1, 2, 4))
def test_all_gpus_together_hold_the_model(shape, flags, tp, pp):
    model = shape()
    args = flags(f"-G 16 -T {tp} -P {pp}")
    stages = [memory._stage(model, args, stage) for stage in range(pp)]
    norms = model.hidden_size * (2 * model.num_hidden_layers + 1) * (tp - 1)  # on every GPU of a tensor group
    assert tp * sum(stage.parameters for stage in stages) == model.parameters + norms


def test_the_bytes_of_what_is_trained(shape, flags):
    """bf16: 2 + 4 + 12 bytes, the 12 shared by the replicas; fp32: 4 + 4 + 8; lean: 2 + 2 + 2 + 2 + 2."""
    model = shape()
    count = model.parameters
    one, eight = estimate(model, flags("-G 1")), estimate(model, flags("-G 8"))
    assert (one.weights, one.gradients, one.optimizer) == (2 * count, 4 * count, 12 * count)
    assert (eight.weights, eight.gradients, eight.optimizer) == (2 * count, 4 * count, 12 * count / 8)
    full = estimate(model, flags("-G 1 --precision fp32"))
    assert (full.weights, full.gradients, full.optimizer) == (4 * count, 4 * count, 8 * count)
    dtypes = "--main_grads_dtype bf16 --exp_avg_dtype bf16 --exp_avg_sq_dtype bf16"
    lean = estimate(model, flags(f"-G 1 --use_precision_aware_optimizer {dtypes}"))
    assert (lean.weights, lean.gradients, lean.optimizer) == (2 * count, 2 * count, 6 * count)
    # The moments in float32, of one part at a time while it steps; the largest tensor is larger than that.
    assert (one.step, full.step, lean.step) == (0, 0, 8 * model.vocab_size * model.hidden_size)
    small = estimate(model, flags(f"-G 8 -T 8 --use_precision_aware_optimizer {dtypes}"))
    assert small.step == 8 * memory.STEPPED
    short = estimate(model, flags(f"-G 1 -s 128 --recompute full --use_precision_aware_optimizer {dtypes}"))
    assert short.allocated == 10 * count + short.step > 10 * count + short.activations  # in their place


def test_placeholders_of_summed_gradients(shape, flags):
    """A bf16 gradient of each shape: qkv, proj, fc1, fc2, and of the output layer where that is; shared by TP."""
    model, layer = shape(), 4096 * (6144 + 4096 + 28672 + 14336)
    assert memory.placeholders(model, flags("-G 1"), True) == 2 * (layer + 4096 * 128256)
    assert memory.placeholders(model, flags("-G 4 -T 2 -P 2"), False) == layer
    for words in ("--performance off", "--precision fp32", "--use_precision_aware_optimizer --main_grads_dtype bf16"):
        assert memory.placeholders(model, flags(f"-G 1 {words}"), True) == 0, words
    assert memory.placeholders(model, flags("-G 1 --peft lora", "finetuning/finetune.py"), True) == 0
    qwen = shape(architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    assert memory.placeholders(qwen, flags("-G 1"), True) == 0


def test_what_makes_activations_smaller(shape, flags):
    """In this order: nothing, the MLP, half of the layers, all of them recomputed; and by the layout."""
    model = shape()

    def size(words):
        return estimate(model, flags(f"-G 8 -g 64 {words}")).activations

    sizes = [
        size("-m 2"),
        size(""),
        size("--recompute selective"),
        size("--recompute full --recompute_method block --recompute_num_layers 31"),
        size("--recompute full"),
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    assert size("-T 2") < 0.6 * size("") and size("-C 2") < 0.6 * size("")
    assert size("-P 2") > 0.9 * size("")  # the first stage holds two micro batches of half of the layers
    assert size("-P 4 --virtual_pipeline_model_parallel_size 4") > size("-P 4")


def test_experts(shape, flags):
    model = shape(**MIXTRAL)
    alone, shared = (estimate(model, flags(f"-G 8 {words}")) for words in ("", "--expert_model_parallel_size 8"))
    dense = model.parameters - 8 * 3 * 4096 * 14336 * 32
    assert alone.parameters == model.parameters
    assert shared.parameters == dense + 3 * 4096 * 14336 * 32


def test_an_adapter_without_gradients_keeps_no_inputs(shape, flags):
    model = shape()

    def size(words):
        return estimate(model, flags(f"-G 1 --peft lora {words}", "finetuning/finetune.py")).activations

    assert size("--lora_target_modules linear_qkv") < 0.8 * size("") < size("--lora_dropout 0.1")


def test_a_checkpoint_on_disk(shape, flags):
    model = shape()
    assert memory.checkpoint_bytes(model, flags("-G 8 -T 2")) == 14 * model.parameters
    adapter = flags("-G 8 -T 2 --peft lora --lora_rank 16", "finetuning/finetune.py")
    assert memory.checkpoint_bytes(model, adapter) == 14 * 35_651_584


# What would make it fit.


@pytest.mark.parametrize(
    "words, change",
    [
        ("-G 1 -s 4096 -m 4 -g 8 --gpu_memory 40", "--micro_batch_size 2"),
        ("-G 1 -s 8192 -g 8 --gpu_memory 29", "--recompute selective"),
        ("-G 1 -s 8192 -g 8 --gpu_memory 26", "--recompute full"),
    ],
)
def test_the_cheapest_change_first(shape, flags, words, change):
    model = shape(**LLAMA32_1B)
    args = flags(words)
    assert estimate(model, args).total > args.gpu_memory * memory.GIB, "it does not fit as it is"
    assert plan.fitting(args, model, args.gpu_memory).startswith(change)


@pytest.mark.parametrize("gpus, memory_gib", [(8, 80), (8, 40), (2, 80), (1, 80), (8, 24), (1, 24), (64, 80)])
@pytest.mark.parametrize("script", ("pretraining/pretrain.py", "finetuning/finetune.py"))
def test_what_is_proposed_fits_and_is_accepted(shape, flags, script, gpus, memory_gib):
    model = shape()
    args = flags(f"-G {min(8, gpus)} -N {max(1, gpus // 8)} -m 4 -g 128 --gpu_memory {memory_gib}", script)
    words = plan.fitting(args, model, memory_gib)
    if words is None:
        assert gpus == 1 and "pretrain" in script
        return
    changed = flags(
        f"-G {min(8, gpus)} -N {max(1, gpus // 8)} -m 4 -g 128 --gpu_memory {memory_gib} {words.split(' (')[0]}", script
    )
    assert estimate(model, changed).total <= memory_gib * memory.GIB
    rules = preflight.layout_problems(changed) + preflight.model_problems(changed, model)
    assert rules + preflight.sequence_problems(changed) + options.problems(changed, model) == []


def test_the_plan_says_so(shape, flags, capsys):
    plan.describe_memory(flags("-G 1 -g 8"), shape())
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said and "would fit" in said and "80 GiB (assumed" in said


LLAMA31_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
}


@pytest.mark.parametrize(
    "fields, words, script, layout",
    [
        (LLAMA32_1B, "-G 8", "pretraining/pretrain.py", (1, 1, 1)),
        ({}, "-G 8", "pretraining/pretrain.py", (2, 1, 1)),
        ({}, "-G 8 --gpu_memory 140", "pretraining/pretrain.py", (1, 1, 1)),
        ({}, "-G 2 -g 8 --gpu_memory 140.4", "pretraining/pretrain.py", (1, 1, 1)),
        ({}, "-G 2 -g 8 --gpu_memory 137", "pretraining/pretrain.py", (2, 1, 1)),
        ({}, "-G 8 --peft lora", "finetuning/finetune.py", (1, 1, 1)),
        ({}, "-G 8 -C 2", "pretraining/pretrain.py", (1, 1, 2)),
        ({}, "-G 8 -T 1", "pretraining/pretrain.py", (1, 1, 1)),
        (LLAMA31_70B, "-N 8 -G 8", "pretraining/pretrain.py", (8, 2, 1)),
        (LLAMA31_70B, "-N 8 -G 8", "finetuning/finetune.py", (8, 2, 1)),
        (LLAMA31_70B, "-N 8 -G 8 --no_packing", "finetuning/finetune.py", (8, 2, 1)),
        (LLAMA31_70B, "-G 8", "pretraining/pretrain.py", (1, 1, 1)),
    ],
)
def test_the_layout_that_is_chosen(shape, load_script, capsys, fields, words, script, layout):
    """The first that fits, if none is given; where none fits, the one that says so."""
    words = f"-D x --dry_run --accelerator gpu --executor slurm -g 64 {words}".split()
    args, model = load_script(script).parse_args(words), shape(**fields)
    assert runs.hardware_problems(args, model) == [] and runs.model_problems(args, model) == []
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    assert sizes == layout and args.sequence_parallel == (layout[0] > 1)
    chosen = layout != (1, 1, 1) and not {"-C", "-T"} & set(words)
    words = ["-T {} -P {} -C {}".format(*layout)] if chosen else []
    words += [f"-m {args.micro_batch_size}"] if args.micro_batch_size > 1 else []
    said = f"not given, so chosen for {plan.gpu_memory(args)[0]:.3g} GiB: {' '.join(words)}"
    assert capsys.readouterr().out.strip() == (said if words else "")


LLAMA32_3B = {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24}
LLAMA32_3B |= {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    "fields, words, micro_batch_size",
    [
        (LLAMA32_1B, "-G 1 -s 8192", 4),
        (LLAMA32_1B, "-G 1 -s 2048", 16),  # 32,768 tokens
        (LLAMA32_1B, "-G 1 -s 8192 -m 2", 2),
        (LLAMA32_1B, "-G 8 -s 8192 -g 16", 2),  # two samples a replica
        (LLAMA32_1B, "-G 8 -s 8192 -g 24", 1),  # three
        (LLAMA32_1B, "-G 1 -s 8192 --accelerator cpu", 1),
        (LLAMA32_1B, "-G 4 -P 4 -s 2048", 4),  # 16 micro batches for four stages
        (LLAMA32_3B, "-G 1 -s 4096", 1),
        (LLAMA32_3B, "-G 1 -s 4096 --gpu_memory 140", 4),
        ({}, "-G 8 -T 4 -s 8192", 4),
        (LLAMA32_1B | MIXTRAL, "-G 1 -s 1024", 1),
    ],
)
def test_the_micro_batch_size_that_is_chosen(shape, load_script, capsys, fields, words, micro_batch_size):
    words = f"-D x --dry_run --accelerator gpu --executor slurm -g 64 {words}"
    args, model = load_script("pretraining/pretrain.py").parse_args(words.split()), shape(**fields)
    assert runs.hardware_problems(args, model) == [] and runs.model_problems(args, model) == []
    assert args.micro_batch_size == micro_batch_size
    chosen = f"not given, so chosen for {plan.gpu_memory(args)[0]:.3g} GiB: -m {micro_batch_size}"
    assert capsys.readouterr().out.strip() == (chosen if micro_batch_size > 1 and "-m" not in words else "")


@pytest.mark.parametrize("words", ["", "--no_packing"])
def test_rows_of_other_lengths_are_not_put_beside_one_another(shape, load_script, words):
    """They would be padded to the longest."""
    words = f"-D x --dry_run --accelerator gpu --executor slurm -g 64 -G 1 -s 1024 {words}".split()
    args, model = load_script("finetuning/finetune.py").parse_args(words), shape(**LLAMA32_1B)
    assert runs.hardware_problems(args, model) == [] and args.micro_batch_size == 1


@pytest.mark.parametrize(
    "fields, words, tokens",
    [
        (LLAMA32_1B, "-G 1 -s 4096", 32768),
        ({}, "-G 1 -s 4096 --peft lora", 8192),
        ({}, "-G 1 -s 4096 --peft lora --gpu_memory 140", 16384),
        ({}, "-G 1 -s 4096 --peft lora --packed_sequence_size 4096", 4096),
        (LLAMA32_1B, "-G 1 -s 4096 --accelerator cpu", 4096),
    ],
)
def test_the_longest_pack(shape, load_script, fields, words, tokens):
    """What a pack may have before the rows are known; the estimate counts with it."""
    finetune, model = load_script("finetuning/finetune.py"), shape(**fields)
    args = finetune.parse_args(f"-D x --dry_run --accelerator gpu --executor slurm {words}".split())
    assert runs.hardware_problems(args, model) + finetune.packing_problems(args, model) == []
    assert args.packing and args.micro_batch_size == 1
    assert args.longest_pack == memory.sample_length(args) == tokens


def test_memory_of_the_gpu_that_is_found(flags, monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 81559\necho 81920\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert plan.gpu_memory(flags("-G 2")) == (81559 / 1024, "found here")
    assert plan.gpu_memory(flags("-G 2 --gpu_memory 24"))[0] == 24
    assert plan.gpu_memory(flags("-G 2 --executor slurm"))[0] == 80


# Disk.


def test_a_run_that_would_fill_the_disk_is_refused(shape, flags, monkeypatch):
    args = flags("-G 8 --save_top_k 3", max_steps=100, save_interval=10)
    need, _, words = plan.disk(args, shape())
    assert need == 5 * 14 * shape().parameters and "5 x 112.42 GB" in words
    args.dry_run = None
    usage = argparse.Namespace(free=10**9)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: usage)
    (problem,) = plan.disk_problems(args, shape())
    assert problem.startswith("--save_top_k 3:") and "NOT ENOUGH" in problem
    usage.free = 10**15
    assert plan.disk_problems(args, shape()) == []


# Flags that would change nothing.


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lr_wsd_decay_steps 5", "has no effect without --lr_decay wsd"),
        ("--lr_decay constant --min_lr 1e-6", "--min_lr 1e-06 has no effect with --lr_decay constant"),
        ("--gpu_memory -1", "--gpu_memory -1.0 is not a number of GiB above 0"),
        ("--seed 0", "--seed 0 is not above 0"),
        ("--recompute_modules mlp", "--recompute_modules mlp has no effect without --recompute selective"),
        ("--recompute_method block", "has no effect without --recompute full"),
        ("--recompute selective --recompute_num_layers 2", "has no effect without --recompute full"),
        ("--recompute selective --recompute_modules moe", "--recompute_modules moe: the model has no experts; use mlp"),
        ("--recompute full --recompute_num_layers 33", "is above the 32 layers of a pipeline stage"),
        ("--exp_avg_dtype bf16", "has no effect without --use_precision_aware_optimizer"),
        ("--use_precision_aware_optimizer --accelerator cpu", "needs Transformer Engine"),
        ("--use_precision_aware_optimizer --precision fp32", "exclude one another"),
        ("--virtual_pipeline_model_parallel_size 2", "has no effect without --pipeline_model_parallel_size above 1"),
        ("-G 2 -P 2 --virtual_pipeline_model_parallel_size 1", "use 2 or more, or leave it out"),
        ("-G 2 -P 2 --virtual_pipeline_model_parallel_size 3", "does not divide the 32 layers; use one of 2, 4, 8, 16"),
        ("-G 8 -P 8 --virtual_pipeline_model_parallel_size 2 -g 12", "to be a multiple of --pipeline_model_parallel"),
        ("--expert_tensor_parallel_size 2", "the model has no experts"),
    ],
)
def test_no_effect_is_refused(shape, flags, words, message):
    (problem,) = options.problems(flags(f"-G 8 {words}"), shape())
    assert message in problem


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lora_rank 4", "--lora_rank 4 has no effect without --peft"),
        ("--lora_target_modules linear_qkv", "--lora_target_modules linear_qkv has no effect without --peft"),
        ("--lora_dropout 0", "--lora_dropout 0.0 has no effect without --peft"),
        ("--peft lora --lora_rank 6 -T 4", "--lora_rank 6 is not a multiple of --tensor_model_parallel_size 4; use 4"),
        ("--peft lora --use_precision_aware_optimizer", "an adapter's optimizer is not the distributed one"),
    ],
)
def test_adapter_flags_that_do_not_go_together(shape, flags, words, message):
    (problem,) = options.problems(flags(f"-G 8 {words}", "finetuning/finetune.py"), shape())
    assert message in problem

"""Every rule that is checked before NeMo is imported, through the scripts themselves.

A refused command exits 2, says the flag and the value, and leaves every file as it was.
"""

import importlib.util
import json
import os
import pickle
import re
import struct
from pathlib import Path

import pytest

from nemo_tutorial import checkpoints, preflight, runs, tokenization

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 32,
    "vocab_size": 2048,
    "seq_length": 8192,
    "share_embeddings_and_output_weights": False,
}
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 8192,
}


def script(name):
    path = ROOT / name
    spec = importlib.util.spec_from_file_location("script_" + path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pretrain = script("pretraining/pretrain.py")
finetune = script("finetuning/finetune.py")
merge_lora = script("finetuning/merge_lora.py")
download_split = script("finetuning/download_split_data.py")
importer = script("convert_ckpt/convert_from_hf_to_nemo.py")
exporter = script("convert_ckpt/convert_from_nemo_to_hf.py")
preprocess = script("data/preprocess_data_for_megatron.py")


def nemo_checkpoint(path, data=None, nemo_model="LlamaModel", adapter_of=None, **shape):
    """A folder that passes for a NeMo 2 checkpoint, with nothing in its weights."""

    def config(paths, name, values):
        module = {"AutoTokenizer": "nemo.collections.common.tokenizers.huggingface.auto_tokenizer"}.get(
            name, f"nemo.collections.llm.gpt.{'data.api' if name == data else 'model.llama'}"
        )
        fiddle = {"type": "pyref", "module": "fiddle._src.config", "name": "Config"}
        names = {"type": fiddle | {"module": "builtins", "name": "tuple"}, "items": [["", key] for key in values]}
        called = {"type": "pyref", "module": module, "name": name}
        metadata = fiddle | {"name": "BuildableTraverserMetadata"}
        objects[f"{name}_class"] = {"type": metadata, "items": [["Attr(name='fn_or_cls')", called], ["", names]]}
        items = [[f"Attr(name='{key}')", {"type": "leaf", "value": value}] for key, value in values.items()]
        metadata = {"type": "ref", "key": f"{name}_class"}
        objects[name] = {"type": fiddle, "items": items, "paths": [paths], "metadata": metadata}

    path, objects = Path(path), {}
    config("<root>.model", nemo_model, {})
    config("<root>.model.config", "Llama31Config", SHAPE | shape)
    config("<root>.model.tokenizer", "AutoTokenizer", {"pretrained_model_name": "nemo_tokenizer"})
    if data:
        config("<root>.extra['datamodule']", data, {})
    (path / "weights").mkdir(parents=True)
    (path / "context" / "nemo_tokenizer").mkdir(parents=True)
    (path / "context" / "io.json").write_text(json.dumps({"objects": objects}))
    (path / "context" / "nemo_tokenizer" / "config.json").write_text(json.dumps(HF_CONFIG))
    (path / "context" / "nemo_tokenizer" / "tokenizer.json").write_text("{}")
    for name in ("metadata.json", ".metadata", "common.pt", "__0_0.distcp"):
        (path / "weights" / name).write_bytes(pickle.dumps({}))
    if adapter_of:
        (path / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(adapter_of)}))
    return path


def hf_model(path, **changes):
    path = Path(path)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def megatron_dataset(prefix, documents=200, length=100):
    """PREFIX.bin and PREFIX.idx, documents of `length` tokens of two bytes."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(bytes(2 * length * documents))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, documents, documents + 1)
    index += struct.pack(f"<{documents}i", *[length] * documents)
    index += struct.pack(f"<{documents}q", *(2 * length * i for i in range(documents)))
    index += struct.pack(f"<{documents + 1}q", *range(documents + 1))
    Path(f"{prefix}.idx").write_bytes(index)


def instructions(folder, training=40, validation=32):
    Path(folder).mkdir()
    for name, count in (("training", training), ("validation", validation)):
        rows = [json.dumps({"input": f"{name} {i}", "output": "yes"}) + "\n" for i in range(count)]
        Path(folder, f"{name}.jsonl").write_text("".join(rows))


def tree(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(Path(folder).rglob("*"))
    }


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """A folder with a model, a checkpoint and data that every rule accepts, where nothing can be started."""

    def started(*args, **kwargs):
        raise AssertionError("accepted")

    for name in ("SLURM_JOB_ID", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(preflight, "gpus_here", lambda: 8)
    monkeypatch.setattr(runs, "start", started)
    monkeypatch.setattr("nemo_tutorial.instructions.prepare", started)
    monkeypatch.chdir(tmp_path)
    nemo_checkpoint("ckpt")
    hf_model("hf")
    megatron_dataset("tokens/news")
    instructions("rows")
    return tmp_path


@pytest.fixture
def refused(work, capsys):
    """Run a script's main, which must refuse: `problems` of them, with all `parts` in what it says."""

    def check(main, argv, *parts, code=2, problems=1):
        before = tree(work)
        with pytest.raises(SystemExit) as exit:
            main([str(arg) for arg in argv])
        said = capsys.readouterr().err
        assert exit.value.code == code, said
        assert said.count("\n  - ") == problems, said
        assert re.search(rf"^error: {problems} problems?\b", said, re.M), said
        assert [part for part in parts if part not in said] == [], said
        assert tree(work) == before
        return said

    return check


def flags(defaults, changes):
    merged = defaults | changes
    words = []
    for name, value in merged.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", value]
    return [str(word) for word in words]


COMMON = {"nemo_model": "ckpt", "seq_length": 64, "global_batch_size": 4, "max_steps": 10, "accelerator": "cpu"}


def pretraining(**changes):
    return flags(COMMON | {"dataset_path": "tokens", "split": "90,10,0"}, changes)


def tuning(**changes):
    return flags(COMMON | {"dataset_path": "rows"}, changes)


# What the tests below change is accepted as it is: a refusal is for the change alone.


@pytest.mark.parametrize("main, argv", [(pretrain.main, pretraining()), (finetune.main, tuning())])
def test_a_right_command_is_accepted(main, argv):
    with pytest.raises(AssertionError, match="^accepted$"):
        main(argv)


@pytest.mark.parametrize(
    "main, argv",
    [
        (pretrain.main, pretraining()),
        (finetune.main, tuning()),
        (importer.main, ["--source", "hf", "--output_path", "out"]),
        (exporter.main, ["--source", "ckpt", "--output_path", "out"]),
    ],
)
def test_a_dry_run_writes_nothing(work, main, argv, monkeypatch):
    monkeypatch.undo()
    os.chdir(work)
    before = tree(work)
    main([*argv, "--dry_run"])
    assert tree(work) == before


# GPUs, batches, parallel sizes.

LAYOUT = [
    (
        {"num_gpus": 3, "tensor_model_parallel_size": 2},
        ["--tensor_model_parallel_size 2 x", "the 3 GPUs", "--num_gpus 3"],
    ),
    ({"num_gpus": 5, "pipeline_model_parallel_size": 2}, ["--pipeline_model_parallel_size 2 x", "the 5 GPUs"]),
    ({"num_gpus": 9, "accelerator": "gpu", "global_batch_size": 9}, ["--num_gpus 9", "shows 8; use --num_gpus 8"]),
    (
        {"num_gpus": 4, "micro_batch_size": 2, "global_batch_size": 30},
        ["--global_batch_size 30", "--micro_batch_size 2", "data parallel size 4", "use --global_batch_size 24"],
    ),
    ({"num_gpus": 8, "global_batch_size": 4}, ["--global_batch_size 4", "use --global_batch_size 8"]),
    ({"sequence_parallel": True}, ["--sequence_parallel", "--tensor_model_parallel_size above 1"]),
    ({"num_gpus": 2, "context_parallel_size": 2}, ["--context_parallel_size 2", "no-GPU mode"]),
    (
        {"num_gpus": 2, "context_parallel_size": 2, "seq_length": 66, "accelerator": "gpu"},
        ["--seq_length 66", "2 x --context_parallel_size 2"],
    ),
    (
        {"num_gpus": 2, "context_parallel_size": 2, "precision": "fp32", "accelerator": "gpu"},
        ["--context_parallel_size 2 and --precision fp32", "leave one out"],
    ),
    ({"num_gpus": 2, "tensor_model_parallel_size": 2, "seq_length": 65}, ["--seq_length 65", "TP 2"]),
    ({"fp8": True}, ["--fp8 needs a GPU", "no-GPU mode"]),
    ({"fp8": True, "accelerator": "gpu", "num_gpus": 1, "seq_length": 40}, ["--seq_length 40", "16", "--fp8"]),
    ({"fp8": True, "accelerator": "gpu", "num_gpus": 1, "precision": "fp32"}, ["--fp8", "--precision fp32"]),
    ({"fp8_recipe": "mxfp8"}, ["--fp8_recipe mxfp8", "without --fp8"]),
    ({"model_size": "8B"}, ["--model_size 8B", "ckpt has 918.1 K parameters", "leave the flag out"]),
    ({"model_size": "huge"}, ["--model_size", "'huge'", "8B or 135M"]),
    ({"experiment": "a/b"}, ["--experiment 'a/b'", "plain name"]),
    ({"num_nodes": 2}, ["--num_nodes 2", "export MASTER_ADDR", "--executor slurm"]),
]


EXPERTS = [
    ({"num_gpus": 4, "expert_model_parallel_size": 4}, ["--expert_model_parallel_size 4", "6 experts", "1, 2, 3, 6"]),
    (
        {"num_gpus": 4, "expert_model_parallel_size": 3},
        ["--expert_model_parallel_size 3", "4 GPUs of a pipeline stage", "use one of 1, 2"],
    ),
    ({"num_gpus": 2, "tensor_model_parallel_size": 2, "no_sequence_parallel": True}, ["--no_sequence_parallel"]),
]


@pytest.mark.parametrize("changes, parts", EXPERTS, ids=["-".join(changes) for changes, _ in EXPERTS])
def test_experts(work, refused, changes, parts):
    nemo_checkpoint("moe", nemo_model="MixtralModel", num_moe_experts=6, moe_router_topk=2)
    refused(pretrain.main, pretraining(nemo_model="moe", **changes), *parts)
    with pytest.raises(AssertionError, match="^accepted$"):
        pretrain.main(pretraining(nemo_model="moe", num_gpus=4, expert_model_parallel_size=2))


def test_a_model_without_experts(refused):
    changes = {"num_gpus": 2, "expert_model_parallel_size": 2}
    refused(pretrain.main, pretraining(**changes), "--expert_model_parallel_size 2", "no experts")


@pytest.fixture
def gemma2(work):
    """A Gemma 2 with a window of 48 tokens."""
    papers = nemo_checkpoint("gemma2", nemo_model="Gemma2Model") / "context/nemo_tokenizer/config.json"
    papers.write_text(json.dumps(HF_CONFIG | {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 48}))
    return "gemma2"


def test_the_window_of_gemma_2(gemma2, refused, capsys):
    """NeMo has it in other layers than transformers: samples stay within it, by default too."""
    argv = pretraining(nemo_model=gemma2)
    refused(pretrain.main, argv, "--seq_length 64", "the model's window of 48 tokens", "use --seq_length 48")
    with pytest.raises(AssertionError, match="^accepted$"):
        pretrain.main(pretraining(nemo_model=gemma2, seq_length=None))
    assert "4 samples x 48" in capsys.readouterr().out


def test_what_nemos_attention_of_gemma_2_cannot_do(gemma2, refused):
    flags = {"nemo_model": gemma2, "accelerator": "gpu", "num_gpus": 2, "seq_length": 48}
    refused(pretrain.main, pretraining(context_parallel_size=2, **flags), "--context_parallel_size 2", "Gemma2Model")
    refused(finetune.main, tuning(packed_sequence_size=48, **flags), "--packed_sequence_size", "Gemma2Model")


@pytest.mark.parametrize("changes, parts", LAYOUT, ids=["-".join(changes) for changes, _ in LAYOUT])
def test_layout(refused, changes, parts):
    refused(pretrain.main, pretraining(**changes), *parts)
    refused(finetune.main, tuning(**changes), *parts)


@pytest.mark.parametrize(
    "shape, changes, message",
    [
        ({"num_attention_heads": 6, "num_query_groups": 4}, {"tensor_model_parallel_size": 4}, "6 attention heads"),
        ({"num_attention_heads": 4, "num_query_groups": 2}, {"tensor_model_parallel_size": 4}, "2 KV groups"),
        ({"vocab_size": 2047}, {"tensor_model_parallel_size": 2}, "2047 vocabulary rows"),
        ({"num_layers": 3}, {"pipeline_model_parallel_size": 2}, "3 layers"),
    ],
)
def test_shape_against_layout(refused, shape, changes, message):
    nemo_checkpoint("other", **shape)
    ((flag, size),) = changes.items()
    argv = pretraining(nemo_model="other", num_gpus=4, **changes)
    refused(pretrain.main, argv, f"--{flag} {size}", "does not divide", message)


SCHEDULE = [
    ({"lr": 0}, ["--lr 0.0 is not a number above 0"]),
    ({"lr": 1e-5, "min_lr": 1e-4}, ["--min_lr 0.0001", "--lr 1e-05"]),
    ({"warmup_steps": 10}, ["--warmup_steps 10", "10 steps"]),
    ({"val_check_interval": 11}, ["--val_check_interval 11", "10 steps"]),
    ({"exit_interval": 5, "val_check_interval": 2}, ["--exit_interval 5", "--val_check_interval 2"]),
]


@pytest.mark.parametrize("changes, parts", SCHEDULE, ids=["-".join(changes) for changes, _ in SCHEDULE])
def test_schedule(refused, changes, parts):
    refused(pretrain.main, pretraining(**changes), *parts)


def test_all_problems_are_printed_at_once(refused):
    said = refused(
        pretrain.main,
        pretraining(global_batch_size=3, num_gpus=2, model_size="8B", fp8=True, dataset_path="nowhere"),
        "--global_batch_size 3",
        "--model_size 8B",
        "--fp8",
        "--dataset_path",
        "nowhere",
        "nothing was started",
        problems=4,
    )
    assert "Traceback" not in said


# Pretraining data.


def test_dataset_missing(refused):
    refused(pretrain.main, pretraining(dataset_path="nowhere"), "--dataset_path", "nowhere is neither a folder nor")


def test_dataset_folder_empty(refused, work):
    (work / "empty").mkdir()
    refused(pretrain.main, pretraining(dataset_path="empty"), "empty holds no .bin", "preprocess_data_for_megatron.py")


@pytest.mark.parametrize("gone", ["idx", "bin"])
def test_half_a_pair(refused, work, gone):
    megatron_dataset("tokens/other")
    (work / f"tokens/other.{gone}").unlink()
    refused(pretrain.main, pretraining(), "--dataset_path", f"missing tokens/other.{gone}", "preprocess again")


def test_truncated_bin(refused, work):
    os.truncate(work / "tokens/news.bin", 39_998)
    refused(pretrain.main, pretraining(), "tokens/news.bin has 39998 bytes", "40000", "preprocess again")


def test_truncated_idx(refused, work):
    size = (work / "tokens/news.idx").stat().st_size
    os.truncate(work / "tokens/news.idx", size - 8)
    refused(pretrain.main, pretraining(), "tokens/news.idx is truncated", str(size - 8), str(size), "preprocess again")


@pytest.mark.parametrize("content", [b"", b"MMIDIDX\x00\x00", b"no index at all, but long enough for its header"])
def test_not_an_index(refused, work, content):
    (work / "tokens/news.idx").write_bytes(content)
    refused(pretrain.main, pretraining(), "tokens/news.idx is not a Megatron index", "preprocess again")


def test_index_without_documents(refused):
    megatron_dataset("tokens/news", documents=0)
    refused(pretrain.main, pretraining(), "tokens/news.idx holds no documents")


def test_a_share_of_no_documents(refused):
    megatron_dataset("tokens/news", documents=100)
    refused(
        pretrain.main,
        pretraining(split="998,1,0"),
        "--split 998,1,0",
        "validation share",
        "(100 documents)",
        "wait for ever",
        "--split 90,10,0",
    )


def test_a_split_without_validation(refused):
    refused(pretrain.main, pretraining(split="1,0,0"), "--split 1,0,0", "validate", "98,2,0")


@pytest.mark.parametrize("split", ["a,b", "0,0,0", "1,2,3,4", ""])
def test_not_a_split(refused, split):
    refused(pretrain.main, pretraining(split=split), f"--split {split!r}")


def test_seq_length_above_the_tokens(refused):
    megatron_dataset("tokens/news", documents=10, length=5)
    refused(pretrain.main, pretraining(), "--dataset_path", "45 tokens", "--seq_length 64", "shorter --seq_length")


def test_less_than_one_step_and_no_max_steps(refused):
    argv = pretraining(max_steps=None, global_batch_size=1000)
    refused(pretrain.main, argv, "18000 training tokens", "--global_batch_size 1000", "set --max_steps")


# Instruction data.


def test_rows_missing(refused, work):
    said = refused(finetune.main, tuning(dataset_path="nowhere"), "--dataset_path nowhere", "download_split_data.py")
    assert "is not a folder" in said
    (work / "rows/validation.jsonl").unlink()
    refused(finetune.main, tuning(), "rows/validation.jsonl is missing", "download_split_data.py")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"input": "a", "output": ', "is not JSON"),
        ('["a", "b"]', "is not a JSON object"),
        ('{"input": "a"}', "has no text under output"),
        ('{"input": "a", "output": 5}', "has no text under output"),
        ('{"output": "a"}', "has no text under input"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has messages that do not end with an answer"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "has a message 1 of role 'human'"),
    ],
)
def test_broken_row(refused, work, line, message):
    file = work / "rows/training.jsonl"
    rows = file.read_text().splitlines()
    rows[6] = line
    file.write_text("\n".join(rows))
    refused(finetune.main, tuning(), f"--dataset_path: rows/training.jsonl:7 {message}")


def test_empty_rows(refused, work):
    (work / "rows/training.jsonl").write_text("")
    refused(finetune.main, tuning(), "rows/training.jsonl is empty")


def test_validation_rows_below_the_batch(refused):
    argv = tuning(global_batch_size=33, no_packing=True)
    refused(finetune.main, argv, "--global_batch_size 33", "the 32 rows of rows/validation.jsonl", "use a smaller one")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{input} {output}!", "must end with {output}"),
        ("Q {output}", "needs {input} and {output} once each"),
        ("{input} {input} {output}", "needs {input} and {output} once each"),
        ("{input} {topic} {output}", "not {topic}"),
    ],
)
def test_prompt_template(refused, template, message):
    refused(finetune.main, tuning(prompt_template=template), "--prompt_template", message)


def test_system_prompt_without_a_place(refused):
    argv = tuning(prompt_template="{input} {output}", system_prompt="Be brief.")
    refused(finetune.main, argv, "--system_prompt has no effect: --prompt_template has no {system}")


WITHOUT_PACKING = [
    ({"micro_batch_size": 2}, "--micro_batch_size 2: a pack is a micro batch already"),
    ({"accelerator": "gpu", "num_gpus": 2, "context_parallel_size": 2}, "--context_parallel_size above 1"),
    ({"accelerator": "gpu", "num_gpus": 1, "precision": "fp32"}, "--precision fp32 on a GPU"),
]


@pytest.mark.parametrize("changes, message", WITHOUT_PACKING)
def test_packing_by_name_where_it_cannot_be(refused, changes, message):
    refused(finetune.main, tuning(packing=True, **changes), "--packing does not go with", message)
    refused(
        finetune.main, tuning(packed_sequence_size=64, **changes), "--packed_sequence_size does not go with", message
    )


def test_pack_length(refused):
    refused(finetune.main, tuning(packed_sequence_size=100), "--packed_sequence_size 100", "multiple of 16", "use 96")


def test_packing_and_no_packing(refused):
    argv = tuning(packed_sequence_size=64, no_packing=True)
    refused(finetune.main, argv, "--no_packing and --packed_sequence_size exclude one another")


@pytest.mark.parametrize("changes, message", WITHOUT_PACKING)
def test_packing_by_default_goes_where_it_cannot_be(capsys, changes, message):
    with pytest.raises(AssertionError, match="^accepted$"):
        finetune.main(tuning(**changes))
    said = [line for line in capsys.readouterr().out.splitlines() if "packing" in line]
    assert len(said) == 1 and said[0].startswith("packing is off, because of " + message)


def test_gemma_2_is_not_packed(gemma2, refused, capsys):
    argv = tuning(nemo_model=gemma2, seq_length=48)
    with pytest.raises(AssertionError, match="^accepted$"):
        finetune.main(argv)
    assert "packing is off, because of NeMo's Gemma2Model" in capsys.readouterr().out
    refused(finetune.main, [*argv, "--packing"], "--packing does not go with NeMo's Gemma2Model")


def test_packing_is_on_by_default(capsys):
    with pytest.raises(AssertionError, match="^accepted$"):
        finetune.main(tuning())
    assert "packing is off" not in capsys.readouterr().out


# Checkpoints and runs.


@pytest.mark.parametrize(
    "part",
    ["weights/.metadata", "weights/metadata.json", "weights/common.pt", "weights/__0_0.distcp", "context/io.json"],
)
def test_incomplete_checkpoint(refused, work, part):
    (work / "ckpt" / part).unlink()
    name = "*.distcp" if part.endswith("distcp") else part
    refused(pretrain.main, pretraining(), "--nemo_model: ckpt is incomplete", name)
    refused(exporter.main, ["--source", "ckpt", "--output_path", "out"], "--source: ckpt is incomplete", name)


def test_unfinished_checkpoint(refused, work):
    (work / "ckpt-unfinished").touch()
    refused(pretrain.main, pretraining(), "--nemo_model: ckpt is unfinished", "ckpt-unfinished")
    refused(exporter.main, ["--source", "ckpt", "--output_path", "out"], "--source: ckpt is unfinished")
    (work / "link").symlink_to("ckpt")
    refused(exporter.main, ["--source", "link", "--output_path", "out"], "--source: link is unfinished")


def test_checkpoint_missing(refused):
    refused(pretrain.main, pretraining(nemo_model="nowhere"), "--nemo_model: nowhere does not exist")
    refused(pretrain.main, pretraining(nemo_model="hf"), "--nemo_model: hf is not a NeMo 2 checkpoint")
    said = refused(pretrain.main, pretraining(nemo_model="meta-llama/Llama-3.1-8B"), "does not exist")
    assert "convert_from_hf_to_nemo.py" in said


def test_io_json_that_is_none(refused, work):
    (work / "ckpt/context/io.json").write_text("{")
    refused(exporter.main, ["--source", "ckpt", "--output_path", "out"], "--source: ckpt/context/io.json can't be read")


def test_other_nemo_model_class(refused):
    nemo_checkpoint("other", nemo_model="MambaModel")
    refused(exporter.main, ["--source", "other", "--output_path", "out"], "other holds a MambaModel", "LlamaModel")


def test_adapter_is_neither_exported_nor_trained_on(refused):
    nemo_checkpoint("lora", adapter_of="ckpt")
    refused(
        exporter.main, ["--source", "lora", "--output_path", "out"], "--source lora", "merge_lora.py --source 'lora'"
    )
    refused(finetune.main, tuning(nemo_model="lora"), "--nemo_model lora", "finetuning/merge_lora.py")


def test_dora_with_tensor_parallelism(refused):
    argv = tuning(peft="dora", num_gpus=2, tensor_model_parallel_size=2)
    refused(finetune.main, argv, "--peft dora with --tensor_model_parallel_size 2", "--peft lora")


def test_adapter_only(refused):
    nemo_checkpoint("lora", adapter_of="ckpt")
    refused(exporter.main, ["--source", "lora", "--output_path", "out"], "merge it first", "--adapter_only")
    only = ["--output_path", "out", "--adapter_only", "--source"]
    refused(exporter.main, [*only, "ckpt"], "--adapter_only: ckpt is no adapter")
    refused(exporter.main, [*only, "lora", "--max_shard_size", "1GB"], "--max_shard_size 1GB has no effect")
    refused(exporter.main, [*only, "lora", "--verify", "none"], "--verify none is not for --adapter_only")


@pytest.mark.parametrize("size", ["5", "0GB", "-1GB", "five GB", "5 GiB", "1.5GB"])
def test_shard_size(capsys, size):
    with pytest.raises(SystemExit) as stop:
        exporter.main(["--source", "ckpt", "--output_path", "out", f"--max_shard_size={size}"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"--max_shard_size: {size!r} is not a size" in said


def test_merge_wants_an_adapter_and_its_base(refused, work):
    refused(merge_lora.main, ["--source", "ckpt", "--output_path", "out"], "--source ckpt is no LoRA checkpoint")
    lora = nemo_checkpoint("lora", adapter_of=work / "gone" / "weights")
    said = refused(merge_lora.main, ["--source", "lora", "--output_path", "out"], "--source: its base model")
    assert f"{work}/gone does not exist" in said and "--base" in said
    base = ["--source", "lora", "--output_path", "out", "--base"]
    refused(merge_lora.main, [*base, "nowhere"], "--base: nowhere does not exist")
    refused(merge_lora.main, [*base, "lora"], "--base: lora is an adapter itself")
    (lora / "weights/adapter_metadata.json").write_text("{}")
    refused(merge_lora.main, ["--source", "lora", "--output_path", "out"], "lora/weights/adapter_metadata.json")


def test_merge_output_on_its_base(refused):
    nemo_checkpoint("lora", adapter_of="ckpt")
    argv = ["--source", "lora", "--output_path", "ckpt", "--overwrite"]
    refused(merge_lora.main, argv, "--output_path ckpt and the source ckpt lie in one another")


def test_nothing_says_which_model(refused):
    refused(pretrain.main, pretraining(nemo_model=None), "--nemo_model CHECKPOINT", "--hf_model_id FOLDER")
    refused(finetune.main, tuning(nemo_model=None), "results/ holds no complete pretraining checkpoint", "pretrain.py")


def test_hf_model_id_that_is_no_folder(refused):
    argv = pretraining(nemo_model=None, hf_model_id="nowhere")
    refused(pretrain.main, argv, "--hf_model_id nowhere", "hf download nowhere")


def test_another_tokenizer(refused, work):
    (work / "hf/tokenizer.json").write_text('{"model": 1}')
    refused(pretrain.main, pretraining(hf_model_id="hf"), "--hf_model_id hf has another tokenizer than ckpt")


def test_finished_run(work, capsys):
    nemo_checkpoint("results/done/checkpoints/m--step=9-last", data="PreTrainingDataModule")
    with pytest.raises(SystemExit) as exit:
        pretrain.main([str(word) for word in pretraining(experiment="done")])
    said = capsys.readouterr().out
    assert exit.value.code == 0 and "10 of 10; nothing to train" in said and "--max_steps above 10" in said
    with pytest.raises(AssertionError, match="^accepted$"):
        pretrain.main(pretraining(experiment="done", max_steps=11))


def test_run_of_only_unfinished_checkpoints(refused, work):
    nemo_checkpoint("results/cut/checkpoints/m--step=4")
    (work / "results/cut/checkpoints/m--step=4-unfinished").touch()
    refused(pretrain.main, pretraining(experiment="cut"), "--experiment cut", "no complete checkpoint", "remove that")


def test_run_that_began_from_another_model(refused, work):
    nemo_checkpoint("results/run/checkpoints/m--step=4")
    nemo_checkpoint("second")
    (work / "results/run/record").mkdir()
    (work / "results/run/record/run.json").write_text('{"restored_from": "ckpt"}')
    argv = pretraining(experiment="run", nemo_model="second")
    refused(pretrain.main, argv, "--experiment run began from ckpt", "--nemo_model second", "choose another")
    with pytest.raises(AssertionError, match="^accepted$"):
        pretrain.main(pretraining(experiment="run"))


# Converting.


def convert(*more, source="hf", output="out"):
    return ["--source", source, "--output_path", output, *more]


@pytest.mark.parametrize("main, source", [(importer.main, "hf"), (exporter.main, "ckpt")])
def test_output(refused, work, main, source):
    (work / "old").mkdir()
    (work / "old/mine.txt").write_text("kept")
    refused(main, convert(source=source, output="old"), "--output_path old exists", "--overwrite")
    refused(main, convert(source=source, output=f"{source}/out"), f"--output_path {source}/out", "choose a new folder")
    argv = convert("--overwrite", source=source, output=source)
    refused(main, argv, f"--output_path {source} and the source {source} lie in one another")
    refused(main, convert("--overwrite", source=source, output="."), "the current folder", problems=2)
    argv = convert("--overwrite", source=source, output="old/mine.txt")
    refused(main, argv, "--output_path old/mine.txt is a file")


def test_source_is_no_folder(refused):
    refused(importer.main, convert(source="nowhere"), "--source: nowhere is not a folder", "hf download")


@pytest.mark.parametrize(
    "name, message", [("config.json", "has no config.json"), ("tokenizer.json", "has no tokenizer.json")]
)
def test_source_lacks_a_file(refused, work, name, message):
    (work / "hf" / name).unlink()
    refused(importer.main, convert(), "--source: hf", message)


def test_pickles_only(refused, work):
    (work / "hf/model.safetensors").rename(work / "hf/pytorch_model.bin")
    refused(importer.main, convert(), "--source: hf", "*.bin", "run code", "model.safetensors")
    (work / "hf/pytorch_model.bin").unlink()
    refused(importer.main, convert(), "--source: hf holds no *.safetensors")


def test_missing_shard(refused, work):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (work / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    refused(importer.main, convert(), "--source: hf lacks model-2.safetensors;", "download the model again")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", "Supported: LlamaForCausalLM"]),
        ({"architectures": None}, ["no architecture", "Supported: LlamaForCausalLM"]),
        ({"auto_map": {"AutoModel": "evil.Model"}}, ["auto_map", "--trust_remote_code"]),
    ],
)
def test_architecture(refused, changes, parts):
    hf_model("other", **changes)
    refused(importer.main, convert(source="other"), "--source: other/config.json", *parts)
    argv = pretraining(nemo_model=None, hf_model_id="other")
    refused(pretrain.main, argv, "other/config.json", *parts)


def test_config_lacks_a_field(refused, work):
    config = {key: value for key, value in HF_CONFIG.items() if key != "hidden_size"}
    (work / "hf/config.json").write_text(json.dumps(config))
    refused(importer.main, convert(), "hf/config.json has no 'hidden_size'")
    (work / "hf/config.json").write_text("{")
    refused(importer.main, convert(), "hf/config.json can't be read as JSON")


def test_full_disk(refused, monkeypatch):
    usage = preflight.shutil.disk_usage("/")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=5))
    refused(importer.main, convert(), "--output_path out needs", "free")
    refused(exporter.main, convert(source="ckpt"), "--output_path out needs 1.84 MB", "free")


def test_data_of_another_tokenizer(refused, work, capsys):
    """Ids of one vocabulary are other words in another; data without a record, and of the same, are taken."""
    own = {"model": {"vocab": {"a": 0, "b": 1}, "merges": []}}
    tokenizer = work / "ckpt/context/nemo_tokenizer/tokenizer.json"
    tokenizer.write_text(json.dumps(own))
    made = {"tokenizer": {"name": "other/model", "fingerprint": "0"}, "inputs": [{"path": "news.jsonl"}]}
    Path("tokens/news.json").write_text(json.dumps(made))
    command = "--tokenizer_type ckpt/context/nemo_tokenizer --input news.jsonl"
    refused(pretrain.main, pretraining(), "tokens/news holds the tokens of other/model", command)
    made["tokenizer"]["fingerprint"] = tokenization.fingerprint(own)
    Path("tokens/news.json").write_text(json.dumps(made))
    for record in (json.dumps(made), "{}", "no JSON"):
        Path("tokens/news.json").write_text(record)
        with pytest.raises(AssertionError, match="^accepted$"):
            pretrain.main(pretraining())


# Data scripts.


def test_preprocess(refused, work):
    argv = ["--input", "nowhere.jsonl", "--tokenizer_type", "hf", "--output_prefix", "tokens/a", "--append_eod"]
    refused(preprocess.main, argv, "--input nowhere.jsonl: there is no such file", "download_pretrain_data.py")
    (work / "in.jsonl").write_text('{"text": "a"}\n')
    (work / "tokens/a_text_document.idx").touch()
    argv[1] = "in.jsonl"
    refused(preprocess.main, argv, "--output_prefix: tokens/a_text_document.idx exists", "--overwrite")
    argv[3] = "nowhere"
    refused(preprocess.main, [*argv, "--overwrite"], "--tokenizer_type nowhere", "OWNER/MODEL")


def alpaca(file, rows=300):
    lines = [json.dumps({"instruction": f"Q{i}", "input": "x", "output": f"A{i}"}) + "\n" for i in range(rows)]
    Path(file).write_text("".join(lines))


def split_of(folder):
    return {
        name: [json.loads(line) for line in Path(folder, f"{name}.jsonl").read_text().splitlines()]
        for name in ("training", "validation", "test")
    }


def test_split_is_seeded_and_disjoint(work):
    alpaca("qa.jsonl")
    for output, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = ["--dataset", "qa.jsonl", "--ratios", "80,15,5", "--seed", str(seed), "--output_path", output]
        download_split.main(argv)
    a, b, c = split_of("a"), split_of("b"), split_of("c")
    assert a == b and a != c
    assert [len(part) for part in a.values()] == [240, 45, 15]
    questions = [row["input"] for part in a.values() for row in part]
    assert sorted(questions) == sorted(f"Q{i}\nx" for i in range(300))
    assert all(row["output"] == "A" + row["input"][1:-2] for part in a.values() for row in part)
    assert questions[:5] != [f"Q{i}\nx" for i in range(5)]
    assert not list(work.glob(".*"))


def test_repeated_questions_are_left_out(work, capsys):
    alpaca("qa.jsonl", rows=50)
    text = Path("qa.jsonl").read_text()
    Path("qa.jsonl").write_text(text + text.replace('"A', '"B'))
    download_split.main(["--dataset", "qa.jsonl", "--output_path", "out"])
    rows = [row for part in split_of("out").values() for row in part]
    assert len(rows) == len({row["input"] for row in rows}) == 50
    assert all(row["output"].startswith("A") for row in rows)
    assert "50 repeated questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, message", [("{", "is not JSON"), ('{"instruction": "a"}', "Alpaca"), ("[]", "Alpaca"), ("", "is not JSON")]
)
def test_split_of_a_bad_line(refused, work, line, message):
    alpaca("qa.jsonl")
    lines = Path("qa.jsonl").read_text().splitlines()
    lines[41] = line
    Path("qa.jsonl").write_text("\n".join(lines))
    argv = ["--dataset", "qa.jsonl", "--output_path", "out"]
    refused(download_split.main, argv, "qa.jsonl:42 is", message, "nothing was written", code=1)


def test_split_arguments(refused, work):
    argv = ["--dataset", "nowhere.jsonl", "--ratios", "98,0,2", "--output_path", "rows"]
    refused(
        download_split.main,
        argv,
        "--dataset nowhere.jsonl is not a file",
        "--ratios '98,0,2'",
        "98,1,1",
        "--output_path rows exists",
        problems=3,
    )
    alpaca("qa.jsonl", rows=2)
    argv = ["--dataset", "qa.jsonl", "--output_path", "out"]
    refused(download_split.main, argv, "qa.jsonl holds 2 different rows", code=1)


def test_the_fabricated_checkpoint_is_whole():
    assert checkpoints.problem("ckpt") is None

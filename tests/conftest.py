"""Fixtures of all tests: fabricated inputs that are small, and whole as far as the standard library can tell."""

import contextlib
import importlib.util
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from building import build, tuned_stages  # noqa: F401  fixtures
from hub_server import here, server  # noqa: F401  fixtures
from slurm_cluster import cluster  # noqa: F401  a fixture

from nemo_tutorial import preflight

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA31_8B = {
    **TINY,
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}


@contextlib.contextmanager
def own_environment():
    """Undoes what Megatron leaves in this process' environment: its choice of attention, a port, which stays taken."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture(autouse=True)
def environment():
    with own_environment():
        yield


@pytest.fixture(scope="session")
def root():
    """The repository root."""
    return ROOT


@pytest.fixture(scope="session")
def load_script():
    """A script as a module: load_script("pretraining/pretrain.py").parse_args([...])."""
    loaded = {}

    def load(name):
        if name not in loaded:
            spec = importlib.util.spec_from_file_location(Path(name).stem + "_script", ROOT / name)
            loaded[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def tiny():
    """config.json of a tiny Llama."""
    return dict(TINY)


@pytest.fixture(scope="session")
def llama31_8b():
    """The shape of Llama-3.1-8B, as in its config.json."""
    return dict(LLAMA31_8B)


@pytest.fixture(scope="session")
def write_index():
    """Write a Megatron dataset of documents with the given numbers of tokens: PREFIX.bin and PREFIX.idx."""

    def write(prefix, lengths, dtype_code=8):
        width = {8: 2, 4: 4}[dtype_code]  # uint16, int32
        count, pointers, end = len(lengths), [], 0
        for length in lengths:
            pointers.append(end)
            end += length * width
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{prefix}.bin").write_bytes(bytes(end))
        Path(f"{prefix}.idx").write_bytes(
            b"MMIDIDX\x00\x00"
            + struct.pack("<QBQQ", 1, dtype_code, count, count + 1)
            + struct.pack(f"<{count}i", *lengths)
            + struct.pack(f"<{count}q", *pointers)
            + struct.pack(f"<{count + 1}q", *range(count + 1))
        )
        return str(prefix)

    return write


@pytest.fixture(scope="session")
def hf_folder():
    """Make a Hugging Face folder: config.json (fields over the tiny one), a tokenizer.json, one small tensor."""

    def make(path, **fields):
        path = Path(path)
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({**TINY, **fields}))
        (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}}}))
        header = json.dumps({"model.norm.weight": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        return path

    return make


def _fiddle_object(objects, path, module, name, leaves, references):
    """Add a Config, as Fiddle writes it into io.json, to `objects`; return its key."""
    config = {"type": "pyref", "module": "fiddle._src.config", "name": "Config"}
    traverser = {"type": "pyref", "module": "fiddle._src.config", "name": "BuildableTraverserMetadata"}
    number = len(objects)
    tuple_ = {"type": "pyref", "module": "builtins", "name": "tuple"}
    names = {"type": tuple_, "items": [["", key] for key in (*leaves, *references)]}
    objects[f"buildable_traverser_metadata_{number}"] = {
        "type": traverser,
        "items": [["Attr(name='fn_or_cls')", {"type": "pyref", "module": module, "name": name}], ["", names]],
        "metadata": traverser,
    }
    items = [
        [f"Attr(name='{key}')", {"type": "leaf", "value": value, "paths": [f"{path}.{key}"]}]
        for key, value in leaves.items()
    ]
    items += [[f"Attr(name='{key}')", {"type": "ref", "key": target}] for key, target in references.items()]
    objects[f"{name.lower()}_{number}"] = {
        "type": config,
        "items": items,
        "metadata": {"type": "ref", "key": f"buildable_traverser_metadata_{number}"},
        "paths": [path],
    }
    return f"{name.lower()}_{number}"


@pytest.fixture(scope="session")
def nemo_checkpoint():
    """Make the skeleton of a NeMo 2 checkpoint: all that is looked at before NeMo is imported.

    `config` is a config.json's content; `stage` is import, pretraining or finetuning; `base` makes it an adapter.
    A path that ends in "-last" is a link to one without, as NeMo has it.
    """

    def make(path, config=None, stage="import", base=None):
        config, path = config or TINY, Path(path)
        if path.name.endswith("-last"):
            make(path.with_name(path.name.removesuffix("-last")), config, stage, base)
            path.symlink_to(path.name.removesuffix("-last"))
            return path
        (path / "weights").mkdir(parents=True)
        (path / "context" / "nemo_tokenizer").mkdir(parents=True)
        (path / "context" / "nemo_tokenizer" / "config.json").write_text(json.dumps(config))
        for name in (".metadata", "common.pt", "__0_0.distcp"):
            (path / "weights" / name).write_bytes(pickle.dumps({}))
        (path / "weights" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        if base:
            (path / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
        objects, llm = {}, "nemo.collections.llm.gpt"
        fields = {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "ffn_hidden_size": config["intermediate_size"],
            "num_attention_heads": config["num_attention_heads"],
            "num_query_groups": config["num_key_value_heads"],
            "kv_channels": config["head_dim"],
            "vocab_size": config["vocab_size"],
            "seq_length": config["max_position_embeddings"] if stage == "import" else 128,
            "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        }
        model = {
            "config": _fiddle_object(objects, "<root>.model.config", f"{llm}.model.llama", "Llama31Config", fields, {}),
            "tokenizer": _fiddle_object(
                objects,
                "<root>.model.tokenizer",
                "nemo.collections.common.tokenizers.huggingface.auto_tokenizer",
                "AutoTokenizer",
                {"pretrained_model_name": "nemo_tokenizer"},
                {},
            ),
        }
        _fiddle_object(objects, "<root>.model", f"{llm}.model.llama", "LlamaModel", {}, model)
        classes = {
            "pretraining": "pre_training.PreTrainingDataModule",
            "finetuning": "fine_tuning.FineTuningDataModule",
        }
        if stage in classes:
            module, name = f"{llm}.data.{classes[stage]}".rsplit(".", 1)
            _fiddle_object(objects, "<root>.extra['datamodule']", module, name, {"seq_length": 128}, {})
        (path / "context" / "io.json").write_text(json.dumps({"objects": objects, "version": "0.0.1"}))
        return path

    return make


@pytest.fixture(scope="session")
def write_rows():
    """Write instruction data: a folder with training.jsonl and validation.jsonl of that many rows."""

    def write(folder, training, validation):
        Path(folder).mkdir(parents=True)
        row = json.dumps({"input": "台灣最高的山是？", "output": "玉山。"}, ensure_ascii=False) + "\n"
        (Path(folder) / "training.jsonl").write_text(row * training, encoding="utf-8")
        (Path(folder) / "validation.jsonl").write_text(row * validation, encoding="utf-8")
        return Path(folder)

    return write


@contextlib.contextmanager
def touching(path):
    """Gives the list of what this process does with `path` (opens, makes, lists, ...) in the block."""
    touched, watching = [], [True]

    def watch(event, arguments):
        if watching and any(path in str(argument) for argument in arguments):
            touched.append((event, arguments))

    sys.addaudithook(watch)  # can't be taken away again
    try:
        yield touched
    finally:
        watching.clear()


def script(folder, name, *flags, check=True, **env):
    """Run a script of the repository in `folder` as a user does; returns the CompletedProcess (text)."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    result = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=600)
    if check and result.returncode:
        said = f"{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
        raise AssertionError(f"{name} exited with {result.returncode}\n{said}")
    return result


def free_port():
    """A TCP port that is free now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def losses(run):
    """{step: loss} of a run's folder, of the last time that a step was done."""
    lines = (run / "record" / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def on_nodes(folder, name, nodes, *flags, **env):
    """Run a script as so many nodes of one process each, all of them here; returns each one's CompletedProcess."""
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NCCL_SOCKET_IFNAME": "lo"}
    flags = [*flags, "--num_nodes", nodes, "--num_gpus", 1]
    with ThreadPoolExecutor(nodes) as pool:
        # To NCCL a host each: ranks of one host it refuses the same GPU.
        own = [{"NODE_RANK": str(node), "NCCL_HOSTID": str(node)} for node in range(nodes)]
        return list(pool.map(lambda node: script(folder, name, *flags, **env, **node), own))


def on_ranks(folder, name, ranks, *flags, **env):
    """Run a script on so many GPUs, or as many nodes that share this machine's one; returns the first's process."""
    if 0 < preflight.gpus_here() < ranks:
        return on_nodes(folder, name, ranks, *flags, **env)[0]
    return script(folder, name, *flags, "--num_gpus", ranks, **env)


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """hf_model/tiny, nemo_ckpt/tiny and data/pre (the sample, tokenized), made by the scripts, once for all tests."""
    folder = tmp_path_factory.mktemp("stages")
    script(folder, "data/make_tiny_model.py", "--output_path", "hf_model/tiny")
    sample = ["--input", ROOT / "data/sample/corpus.jsonl", "--tokenizer_type", "hf_model/tiny"]
    script(
        folder, "data/preprocess_data_for_megatron.py", *sample, "--output_prefix", "data/pre/sample", "--append_eod"
    )
    script(
        folder,
        "convert_ckpt/convert_from_hf_to_nemo.py",
        "--source",
        "hf_model/tiny",
        "--output_path",
        "nemo_ckpt/tiny",
    )
    return folder

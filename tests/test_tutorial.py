"""The published tutorial's commands, as its readers copied them, planned (--dry_run) on fabricated inputs."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAME = "Llama-3.1-8B-Instruct"
PRETRAINED = (
    "results/llama31_pretraining/checkpoints/model_name=0--val_loss=1.55-step=99-consumed_samples=204800.0-last"
)
TUNED = "results/llama31_finetuning/checkpoints/model_name=0--val_loss=1.55-step=9-consumed_samples=80.0-last"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
NEMO_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 128256,
    "seq_length": 131072,
    "share_embeddings_and_output_weights": False,
}

LLAMA = "nemo.collections.llm.gpt.model.llama"
TOKENIZERS = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer"
DATA = "nemo.collections.llm.gpt.data.pre_training"

IMPORT = r"""
HF_MODEL_ID=Llama-3.1-8B-Instruct
OUTPUT_PATH=nemo_ckpt/Llama-3.1-8B-Instruct

python convert_ckpt/convert_from_hf_to_nemo.py \
  --source ${HF_MODEL_ID} \
  --output_path ${OUTPUT_PATH}
"""
# The one change: the script was NeMo's, under /opt/NeMo/scripts/nlp_language_modeling/, and is ours here.
PREPROCESS = r"""
mkdir -p data/custom_dataset/preprocessed

python data/preprocess_data_for_megatron.py \
    --input=data/custom_dataset/json/wikinews-zhtw.jsonl \
    --json-keys=text \
    --dataset-impl mmap \
    --tokenizer-library=huggingface \
    --tokenizer-type meta-llama/Llama-3.1-8B-Instruct \
    --output-prefix=data/custom_dataset/preprocessed/wikinews \
    --append-eod
"""
PRETRAIN = r"""
JOB_NAME=llama31_pretraining

NUM_NODES=1
NUM_GPUS=8

HF_MODEL_ID=Llama-3.1-8B-Instruct
NEMO_MODEL=nemo_ckpt/${HF_MODEL_ID}
HF_TOKEN=<HF_TOKEN>

TP=2
PP=1
CP=1

GBS=2048
MAX_STEPS=100
DATASET_PATH=data/custom_dataset/preprocessed/

python pretraining/pretrain.py \
    --executor local \
    --experiment ${JOB_NAME} \
    --num_nodes ${NUM_NODES} \
    --num_gpus ${NUM_GPUS} \
    --model_size 8B \
    --hf_model_id meta-llama/${HF_MODEL_ID} \
    --nemo_model ${NEMO_MODEL} \
    --hf_token ${HF_TOKEN} \
    --max_steps ${MAX_STEPS} \
    --global_batch_size ${GBS} \
    --tensor_model_parallel_size ${TP} \
    --pipeline_model_parallel_size ${PP} \
    --context_parallel_size ${CP} \
    --dataset_path ${DATASET_PATH}
"""
FINETUNE = r"""
JOB_NAME=llama31_finetuning

NUM_NODES=1
NUM_GPUS=8

HF_MODEL_ID=meta-llama/Llama-3.1-8B-Instruct
NEMO_MODEL= # [Optional]
HF_TOKEN=<HF_TOKEN>

TP=2
PP=1
CP=1

MAX_STEPS=100
GBS=128
DATASET_PATH=data/alpaca

python finetuning/finetune.py \
    --executor local \
    --experiment ${JOB_NAME} \
    --num_nodes ${NUM_NODES} \
    --num_gpus ${NUM_GPUS} \
    --model_size 8B \
    --hf_model_id ${HF_MODEL_ID} \
    --hf_token ${HF_TOKEN} \
    --nemo_model ${NEMO_MODEL} \
    --max_steps ${MAX_STEPS} \
    --global_batch_size ${GBS} \
    --tensor_model_parallel_size ${TP} \
    --pipeline_model_parallel_size ${PP} \
    --context_parallel_size ${CP} \
    --dataset_path ${DATASET_PATH}
"""
EXPORT = r"""
NEMO_MODEL=results/llama31_finetuning/checkpoints/model_name\=0--val_loss\=1.55-step\=9-consumed_samples\=80.0-last/
OUTPUT_PATH=hf_ckpt

python convert_ckpt/convert_from_nemo_to_hf.py \
  --source ${NEMO_MODEL} \
  --output_path ${OUTPUT_PATH}
"""


def hf_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(LLAMA_8B))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").touch()


def io_json(data_module):
    """A context/io.json of the form that NeMo 2 (Fiddle) writes, with only what is read of it."""
    objects = {}

    def leaf(value):
        return {"type": "leaf", "value": value}

    def add(key, path, cls, items):
        module = {"AutoTokenizer": TOKENIZERS, "LlamaModel": LLAMA, "Llama31Config8B": LLAMA}.get(cls, DATA)
        names = {"type": {"type": "pyref", "module": "builtins", "name": "tuple"}, "items": [["", n] for n in items]}
        objects[f"{key}_cls"] = {
            "type": {"type": "pyref", "module": "fiddle._src.config", "name": "BuildableTraverserMetadata"},
            "items": [["Attr(name='fn_or_cls')", {"type": "pyref", "module": module, "name": cls}], ["", names]],
            "metadata": [],
            "paths": [],
        }
        objects[key] = {
            "type": {"type": "pyref", "module": "fiddle._src.config", "name": "Config"},
            "items": [[f"Attr(name='{name}')", value] for name, value in items.items()],
            "metadata": {"type": "ref", "key": f"{key}_cls"},
            "paths": [path],
        }
        return {"type": "ref", "key": key}

    config = add("config", "<root>.model.config", "Llama31Config8B", {name: leaf(v) for name, v in NEMO_8B.items()})
    tokenizer = add(
        "tokenizer", "<root>.model.tokenizer", "AutoTokenizer", {"pretrained_model_name": leaf("nemo_tokenizer")}
    )
    add("model", "<root>.model", "LlamaModel", {"config": config, "tokenizer": tokenizer})
    if data_module:
        add("data", "<root>.extra['datamodule']", data_module, {"seq_length": leaf(8192)})
    return json.dumps({"objects": objects})


def nemo_checkpoint(path, data_module=None):
    (path / "weights").mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "common.pt", "__0_0.distcp"):
        (path / "weights" / name).write_bytes(pickle.dumps({}))
    (path / "context" / "nemo_tokenizer").mkdir(parents=True)
    (path / "context" / "io.json").write_text(io_json(data_module))
    (path / "context" / "nemo_tokenizer" / "config.json").write_text(json.dumps(LLAMA_8B))
    (path / "context" / "nemo_tokenizer" / "tokenizer.json").write_text("{}")


def megatron_dataset(prefix, documents, tokens):
    """`documents` documents of `tokens` tokens of 4 bytes; the .bin is a hole as long as they would be."""
    prefix.parent.mkdir(parents=True)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, documents, documents + 1))
        file.write(struct.pack(f"<{documents}i", *[tokens] * documents))
        file.write(struct.pack(f"<{documents}q", *range(0, documents * tokens * 4, tokens * 4)))
        file.write(struct.pack(f"<{documents + 1}q", *range(documents + 1)))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(documents * tokens * 4)


def alpaca(path, training, validation):
    path.mkdir(parents=True)
    for name, rows in (("training", training), ("validation", validation)):
        lines = [
            json.dumps({"input": f"問題 {number}", "output": "答案"}, ensure_ascii=False) for number in range(rows)
        ]
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plan(text, folder):
    """Run a block of the tutorial by bash in `folder`, its script with --dry_run: the lines, runs of spaces as one."""
    shell = 'python() { local script=$1; shift; "$PYTHON" "$ROOT/$script" "$@" --dry_run; }\nset -e\n'
    env = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE")}
    env |= {"PYTHON": sys.executable, "ROOT": str(ROOT), "HF_HOME": str(folder / "no_cache")}
    before = sorted(folder.rglob("*"))
    result = subprocess.run(
        ["bash", "-c", shell + text.replace("=<HF_TOKEN>", "='<HF_TOKEN>'")],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    # Nothing is written, but for the folder that the tutorial's own mkdir makes.
    assert not [path for path in folder.rglob("*") if path not in before and "custom_dataset" not in path.parts]
    return [" ".join(line.split()) for line in result.stdout.splitlines()], result.stderr


def test_import(tmp_path):
    hf_folder(tmp_path / NAME)
    lines, _ = plan(IMPORT, tmp_path)
    assert "shape LlamaForCausalLM, 8.03 B parameters" in lines
    assert f"output nemo_ckpt/{NAME}" in lines
    assert "recipe llama31_8b" in lines


def test_preprocess(tmp_path):
    source = tmp_path / "data/custom_dataset/json/wikinews-zhtw.jsonl"
    source.parent.mkdir(parents=True)
    source.write_text('{"text": "台灣"}\n', encoding="utf-8")
    lines, errors = plan(PREPROCESS, tmp_path)
    assert "output data/custom_dataset/preprocessed/wikinews_text_document.bin/.idx" in lines
    assert "end of document appended" in lines
    assert not errors


def test_pretrain(tmp_path):
    nemo_checkpoint(tmp_path / "nemo_ckpt" / NAME)
    megatron_dataset(tmp_path / "data/custom_dataset/preprocessed/wikinews_text_document", 2000, 20000)
    lines, errors = plan(PRETRAIN, tmp_path)
    for line in (
        f"weights nemo_ckpt/{NAME}",
        "shape LlamaForCausalLM, 8.03 B parameters, 32 layers, hidden 4096, vocabulary 128256",
        "recipe llama31_8b",
        "parallel TP 2 x PP 1 x CP 1 x DP 4, sequence parallel",
        "tokens a step 16,777,216 = 2048 samples x 8192; 512 micro batches a GPU",
        "steps 100",
        "learning rate first 9.09e-07, peak 1e-05, half 6.28e-06, last 1e-06",
        "training tokens 39,960,000",  # 1998 of the 2000 documents
        "steps an epoch 2",
        "epochs 41.99",  # 100 steps of 16,777,216 tokens
        "validation 1 batches every 20 steps",
    ):
        assert line in lines
    assert errors.count("warning:") == 1 and "--hf_token" in errors


@pytest.mark.parametrize("named", [False, True])
def test_finetune(tmp_path, named):
    nemo_checkpoint(tmp_path / "nemo_ckpt" / NAME)
    nemo_checkpoint(tmp_path / PRETRAINED, "PreTrainingDataModule")
    alpaca(tmp_path / "data/alpaca", training=1300, validation=128)
    text = FINETUNE.replace("NEMO_MODEL= # [Optional]", f"NEMO_MODEL=nemo_ckpt/{NAME}") if named else FINETUNE
    lines, errors = plan(text, tmp_path)
    restored = f"nemo_ckpt/{NAME}" if named else PRETRAINED
    for line in (
        f"weights {restored}",
        "shape LlamaForCausalLM, 8.03 B parameters, 32 layers, hidden 4096, vocabulary 128256",
        "parallel TP 2 x PP 1 x CP 1 x DP 4, sequence parallel",
        "steps 100",
        "rows 1,300 training, 128 validation",
        "steps an epoch 10",
        "validation 1 batches every 20 steps",
    ):
        assert line in lines
    assert named or lines[0].endswith(f"newest pretraining checkpoint is {PRETRAINED}")
    assert errors.count("warning:") == 1 and "--hf_token" in errors


def test_finetune_goes_on_where_it_stopped(tmp_path):
    nemo_checkpoint(tmp_path / PRETRAINED, "PreTrainingDataModule")
    nemo_checkpoint(tmp_path / TUNED, "FineTuningDataModule")
    alpaca(tmp_path / "data/alpaca", training=1300, validation=128)
    lines, _ = plan(FINETUNE, tmp_path)
    assert f"weights goes on from step 10 of {TUNED}" in lines


@pytest.mark.parametrize("named", ["checkpoint", "run"])
def test_export(tmp_path, named):
    """A checkpoint, or the run's folder: its newest complete checkpoint."""
    older = TUNED.replace("step=9", "step=8")
    for name in (older, TUNED):
        nemo_checkpoint(tmp_path / name.removesuffix("-last"), "FineTuningDataModule")
    (tmp_path / TUNED).symlink_to(Path(TUNED).name.removesuffix("-last"))
    nemo_checkpoint(tmp_path / TUNED.replace("step=9", "step=10"), "FineTuningDataModule")
    (tmp_path / f"{TUNED.replace('step=9', 'step=10')}-unfinished").touch()
    text = EXPORT
    if named == "run":
        text = re.sub("NEMO_MODEL=.*", "NEMO_MODEL=results/llama31_finetuning", EXPORT)
    lines, errors = plan(text, tmp_path)
    assert f"source {TUNED}" in [line.removesuffix("/") for line in lines]
    assert "shape LlamaForCausalLM, 8.03 B parameters" in lines
    assert "config that of the imported model" in lines
    assert "output hf_ckpt" in lines
    assert not errors

"""Every supported family, converted there and back through the real NeMo on the CPU, each with the same checks."""

import json
import shutil

import pytest
from conftest import script

from nemo_tutorial import checkpoints, models

pytestmark = pytest.mark.nemo

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,  # so short that the prompts would show a field that got lost
}
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
EPSILON = {"rms_norm_eps": 0.01}  # so large that the logits would show one that got lost
MORE_ROWS = {"vocab_size": 2085}  # than the tokenizer has entries; odd
NEMOTRON = {"head_dim": 16, "norm_eps": 1e-5}
GEMMA2 = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 5.0,  # so low that the logits would show caps that got lost
    "final_logit_softcapping": 3.0,
}
MIXTRAL = {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}
QWEN3MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 96}
TRAINABLE = {"dtype": "bfloat16", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
CASES = {
    "llama2": ("Llama", UNTIED | {"num_key_value_heads": 4, "rope_theta": 10000.0}),
    "llama3": ("Llama", UNTIED | {"rope_theta": 500000.0}),
    "llama3.1": ("Llama", UNTIED | {"rope_theta": 500000.0, "rope_scaling": LLAMA3} | MORE_ROWS),
    "llama3.2": ("Llama", TIED | {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama-head_dim": ("Llama", UNTIED | EPSILON | {"head_dim": 32}),
    "llama-linear": ("Llama", UNTIED | LINEAR),
    "qwen2": ("Qwen2", UNTIED | MORE_ROWS | {"rope_theta": 1000000.0}),
    "qwen2-tied": ("Qwen2", TIED | EPSILON),
    "qwen2-linear": ("Qwen2", TIED | LINEAR),
    "qwen3": ("Qwen3", UNTIED | EPSILON | {"head_dim": 32}),
    "qwen3-tied": ("Qwen3", TIED | MORE_ROWS | {"head_dim": 16, "rope_theta": 1000000.0}),
    "qwen3-linear": ("Qwen3", UNTIED | LINEAR | {"head_dim": 32}),
    "mistral-window": ("Mistral", UNTIED | {"sliding_window": 3}),
    "mistral-nemo": ("Mistral", UNTIED | EPSILON | MORE_ROWS | {"sliding_window": None, "head_dim": 32}),
    "mistral-tied": ("Mistral", TIED | LINEAR | {"sliding_window": None}),
    "phi3": ("Phi3", UNTIED | {"sliding_window": 3}),
    "phi3-partial": ("Phi3", UNTIED | MORE_ROWS | {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "phi3-tied": ("Phi3", TIED | EPSILON | {"sliding_window": None}),
    "gemma": ("Gemma", TIED | {"head_dim": 32, "rms_norm_eps": 0.5}),
    "gemma-rows": ("Gemma", TIED | MORE_ROWS | LINEAR | {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", TIED | GEMMA2),
    "gemma2-rows": ("Gemma2", TIED | GEMMA2 | MORE_ROWS | LINEAR | {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2-uncapped": ("Gemma2", TIED | GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-epsilon": ("Gemma2", TIED | GEMMA2 | EPSILON | {"sliding_window": 100}),
    "gemma2-float32": ("Gemma2", TIED | GEMMA2 | {"dtype": "float32"}),
    "mixtral": ("Mixtral", UNTIED | MIXTRAL | {"router_jitter_noise": 0.1, "rope_theta": 1000000.0}),
    "mixtral-window": ("Mixtral", UNTIED | MIXTRAL | MORE_ROWS | {"sliding_window": 3, "head_dim": 32}),
    "mixtral-epsilon": ("Mixtral", UNTIED | MIXTRAL | EPSILON),
    "mixtral-tied": ("Mixtral", TIED | MIXTRAL | LINEAR | {"num_experts_per_tok": 3, "dtype": "float32"}),
    "qwen3moe-epsilon": ("Qwen3Moe", UNTIED | QWEN3MOE | EPSILON),
    "qwen3moe": ("Qwen3Moe", UNTIED | QWEN3MOE | {"head_dim": 32}),
    "qwen3moe-norm": ("Qwen3Moe", UNTIED | QWEN3MOE | MORE_ROWS | {"norm_topk_prob": True, "rope_theta": 1000000.0}),
    "qwen3moe-tied": ("Qwen3Moe", TIED | QWEN3MOE | LINEAR | {"num_experts_per_tok": 1, "dtype": "float32"}),
    "nemotron": ("Nemotron", UNTIED | NEMOTRON | {"partial_rotary_factor": 0.5}),
    "nemotron-rows": ("Nemotron", UNTIED | MORE_ROWS | {"head_dim": 32, "norm_eps": 0.01}),
    "nemotron-float32": ("Nemotron", UNTIED | NEMOTRON | {"partial_rotary_factor": 0.5, "dtype": "float32"}),
}
OTHER = {  # another value of one field of a case's config.json, with which transformers' logits must be seen to differ
    "llama3": {"rope_theta": 10000.0},
    "llama3.1": {"rope_scaling": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "llama3.2": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}},
    "llama-linear": {"rope_scaling": None},
    "qwen2": {"rope_theta": 10000.0},
    "qwen2-linear": {"rope_scaling": None},
    "qwen3-tied": {"rope_theta": 100.0},
    "qwen3-linear": {"rope_scaling": None},
    "mistral-window": {"sliding_window": 4},
    "mistral-tied": {"rope_scaling": None},
    "phi3": {"sliding_window": 4},
    "phi3-partial": {"partial_rotary_factor": 1.0},
    "gemma-rows": {"rope_scaling": None},
    "llama-head_dim": {"rms_norm_eps": 1e-6},
    "qwen2-tied": {"rms_norm_eps": 1e-6},
    "qwen3": {"rms_norm_eps": 1e-6},
    "mistral-nemo": {"rms_norm_eps": 1e-6},
    "phi3-tied": {"rms_norm_eps": 1e-6},
    "gemma": {"rms_norm_eps": 1e-6},
    "gemma2-epsilon": {"rms_norm_eps": 1e-6},
    "mixtral-epsilon": {"rms_norm_eps": 1e-6},
    "qwen3moe-epsilon": {"rms_norm_eps": 1e-6},
    "nemotron-rows": {"norm_eps": 1e-6},
    "gemma2": {"attn_logit_softcapping": None},
    "gemma2-rows": {"rope_scaling": None},
    "gemma2-uncapped": {"final_logit_softcapping": 0.5},
    "gemma2-float32": {"query_pre_attn_scalar": 256},
    "mixtral": {"num_experts_per_tok": 1},
    "mixtral-window": {"sliding_window": None},
    "mixtral-tied": {"rope_scaling": None},
    "qwen3moe": {"norm_topk_prob": True},
    "qwen3moe-norm": {"num_experts_per_tok": 2},
    "qwen3moe-tied": {"rope_scaling": None},
    "nemotron-float32": {"partial_rotary_factor": 1.0},
}


# What a model with Transformer Engine's layers saves, where ours are other modules: names, and shapes of all layers.
SAVED = {
    "gemma2": {
        "self_attention.linear_qkv.layer_norm_weight": (2, 64),
        "self_attention.linear_proj.post_layernorm.weight": (2, 64),
        "mlp.linear_fc1.layer_norm_weight": (2, 64),
        "mlp.linear_fc2.post_layernorm.weight": (2, 64),
    },
    "mixtral": {
        "pre_mlp_layernorm.weight": (2, 64),
        "mlp.router.weight": (2, 5, 64),
        "mlp.experts.experts.linear_fc1.weight": (2, 5, 320, 64),
        "mlp.experts.experts.linear_fc2.weight": (2, 5, 64, 160),
    },
    "qwen3moe": {
        "pre_mlp_layernorm.weight": (2, 64),
        "mlp.router.weight": (2, 7, 64),
        "mlp.experts.experts.linear_fc1.weight": (2, 7, 192, 64),
        "mlp.experts.experts.linear_fc2.weight": (2, 7, 64, 96),
    },
}


# Norms of a layer that are modules of their own in Transformer Engine: a GPU asks a checkpoint for their extra state.
NORMS = {
    "Gemma2": {"self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm"},
    "Mixtral": {"pre_mlp_layernorm"},
    "Qwen3": {"self_attention.q_layernorm", "self_attention.k_layernorm"},
    "Qwen3Moe": {"self_attention.q_layernorm", "self_attention.k_layernorm", "pre_mlp_layernorm"},
}


def make_model(folder, family, fields, tokenizer):
    """A tiny random model, no parameter of which is constant, as transformers writes it."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SHAPE | fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    dtype = config.dtype or torch.bfloat16
    # Attention that looks far back shows where a position is lost. (In bfloat16, transformers rounds Nemotron's
    # 1 + weight, so that sharp attention differs by more than what is looked for.)
    sharp = 0.05 if family == "Nemotron" and dtype == torch.bfloat16 else 0.15
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = sharp if "q_proj.w" in name or "k_proj.w" in name or "qkv" in name else 0.05
            if name.endswith(".gate.weight"):
                size = 0.2  # few tokens are near two experts
            if ".experts." in name:
                size = 0.15  # what the experts add counts
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else size))
    model.to(dtype).save_pretrained(folder)
    for file in checkpoints.ASSETS:
        if (tokenizer / file).is_file() and file != "config.json" and file != "generation_config.json":
            shutil.copy(tokenizer / file, folder)
    if family != "Qwen3":  # one family without, as many folders are
        shutil.copy(tokenizer / "generation_config.json", folder)
    else:
        (folder / "generation_config.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    script(folder, "data/make_tiny_model.py", "--output_path", "tiny")
    return folder / "tiny"


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, tokenizer, tmp_path):
    """Equal tensors, bit by bit, and equal papers, with the source folder gone; and the models compute the same."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import FileSystemReader

    from nemo_tutorial import conversion

    family, fields = CASES[case]
    source, moved, nemo, back = (tmp_path / name for name in ("source", "moved", "nemo", "back"))
    make_model(source, family, fields, tokenizer)
    model = models.from_hf(source)
    assert model.family.architecture == f"{family}ForCausalLM"
    conversion.import_model(source, model, nemo)
    tensors = load_file(source / "model.safetensors")
    assert not [name for name, tensor in tensors.items() if (tensor == tensor.flatten()[0]).all()]
    assert conversion.compare(nemo, source) == (len(tensors), [])
    entries = FileSystemReader(nemo / "weights").read_metadata().state_dict_metadata
    for name, shape in SAVED.get(case, {}).items():
        assert tuple(entries[f"module.decoder.layers.{name}"].size) == shape
    norms = {f"layers.{norm}" for norm in NORMS.get(family, ())} | {"final_layernorm"}
    states = {name.partition("._extra_state")[0] for name in entries if "norm" in name and "_extra_state" in name}
    assert states == {f"module.decoder.{norm}" for norm in norms}
    source.rename(moved)
    conversion.export(nemo, back)
    exported = load_file(back / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert exported[name].dtype == tensor.dtype and exported[name].equal(tensor), name
    for file in checkpoints.ASSETS:
        assert (back / file).is_file() == (moved / file).is_file(), file
        if (moved / file).is_file():
            assert (back / file).read_bytes() == (moved / file).read_bytes(), file
    conversion.compare_logits(nemo, back)
    if case in OTHER:
        config = json.loads((back / "config.json").read_text())
        (back / "config.json").write_text(json.dumps(config | OTHER[case]))
        with pytest.raises(ValueError, match="logits differ"):
            conversion.compare_logits(nemo, back)
    read = models.from_nemo(nemo)
    assert {**vars(read), "source": ""} == {**vars(model), "source": ""}
    assert abs(sum(tensor.numel() for tensor in tensors.values()) / model.parameters - 1) < 0.02


TRAINED = {
    "gemma2": ("gemma2", []),
    "gemma2-lora": ("gemma2", ["--peft", "lora", "--lr", "1e-2"]),
    "gemma2-tp": ("gemma2", ["--num_gpus", 2, "--tensor_model_parallel_size", 2]),
    "mixtral-ep": ("mixtral", ["--num_gpus", 2, "--expert_model_parallel_size", 2]),
    "mixtral-tp": ("mixtral", ["--num_gpus", 2, "--tensor_model_parallel_size", 2]),
    "qwen3moe": ("qwen3moe", []),
    "qwen3moe-lora": ("qwen3moe", ["--peft", "lora", "--lr", "1e-2"]),
}


@pytest.mark.full
@pytest.mark.parametrize("case", TRAINED)
def test_trained_without_a_gpu(case, tokenizer, tmp_path):
    """Import, instruction tuning, export: the loss falls, and both models of the result compute the same."""
    name, flags = TRAINED[case]
    family, fields = CASES[name]
    make_model(tmp_path / "model", family, fields | {"num_local_experts": 6} | TRAINABLE, tokenizer)
    (tmp_path / "rows").mkdir()
    rows = [{"input": f"{number} + 1 = ?", "output": str(number + 1)} for number in range(64)]
    for file in ("training", "validation"):
        (tmp_path / "rows" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script(tmp_path, "convert_ckpt/convert_from_hf_to_nemo.py", "--source", "model", "--output_path", "nemo")
    command = "--nemo_model nemo --dataset_path rows --experiment run --seq_length 64 --global_batch_size 8 --lr 1e-3"
    script(tmp_path, "finetuning/finetune.py", *command.split(), "--max_steps", 8, *flags)
    record = (tmp_path / "results/run/record/metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, record) if "loss" in line]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.2, losses
    trained = checkpoints.latest(tmp_path / "results/run").resolve()
    if "--peft" in flags:
        script(tmp_path, "finetuning/merge_lora.py", "--source", trained, "--output_path", "merged")
        trained = "merged"
    flags = ["--source", trained, "--output_path", "back", "--verify", "logits"]
    assert "greedy tokens" in script(tmp_path, "convert_ckpt/convert_from_nemo_to_hf.py", *flags).stdout


def test_recipes_exist():
    """Each family's recipes are NeMo's, for pretraining and finetuning."""
    from nemo.collections import llm

    for family in models.FAMILIES:
        for recipe in family.recipes.values():
            assert hasattr(getattr(llm, recipe), "pretrain_recipe"), recipe
            assert hasattr(getattr(llm, recipe), "finetune_recipe"), recipe

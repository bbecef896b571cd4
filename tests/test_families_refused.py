"""What a config.json may say that NeMo's model would not compute: refused by name, before anything is imported."""

import json

import pytest

from nemo_tutorial import models

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ALL = [family.architecture for family in models.FAMILIES]


def read(folder, architecture, **fields):
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], **SHAPE, **fields}))
    return models.from_config(folder / "config.json")


def refused(folder, architecture, field, value):
    with pytest.raises(ValueError) as error:
        read(folder, architecture, **{field: value})
    assert f"{field} {value!r}" in str(error.value) and "config.json" in str(error.value)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
        ("use_bidirectional_attention", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 4.0}),
        ("rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
    ],
)
def test_refused_of_every_family(tmp_path, architecture, field, value):
    refused(tmp_path, architecture, field, value)


@pytest.mark.parametrize("architecture", [name for name in ALL if name != "LlamaForCausalLM"])
def test_llama3_scaling_is_llamas_alone(tmp_path, architecture):
    refused(tmp_path, architecture, "rope_scaling", LLAMA3)
    read(tmp_path, "LlamaForCausalLM", rope_scaling=LLAMA3)


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "NemotronForCausalLM"])
def test_linear_scaling_where_transformers_has_none(tmp_path, architecture):
    refused(tmp_path, architecture, "rope_scaling", LINEAR)


@pytest.mark.parametrize("architecture", ALL)
def test_partial_rotary(tmp_path, architecture):
    if architecture in ("Phi3ForCausalLM", "NemotronForCausalLM"):
        read(tmp_path, architecture, partial_rotary_factor=0.5)
    else:
        refused(tmp_path, architecture, "partial_rotary_factor", 0.5)


def test_windows_are_carried_where_all_layers_have_them(tmp_path):
    read(tmp_path, "MistralForCausalLM", sliding_window=4096)
    read(tmp_path, "Phi3ForCausalLM", sliding_window=2047)
    read(tmp_path, "Qwen2ForCausalLM", sliding_window=4096, use_sliding_window=False)


def test_gemma_2_alternates(tmp_path):
    read(tmp_path, "Gemma2ForCausalLM", layer_types=["sliding_attention", "full_attention"])
    refused(tmp_path, "Gemma2ForCausalLM", "layer_types", ["sliding_attention", "sliding_attention"])
    refused(tmp_path, "Gemma2ForCausalLM", "layer_types", ["full_attention", "full_attention"])
    refused(tmp_path, "Qwen3MoeForCausalLM", "layer_types", ["sliding_attention", "full_attention"])


def test_experts(tmp_path):
    """One expert a token is carried where its weight is that of all experts' softmax, and refused where it is 1."""
    refused(tmp_path, "MixtralForCausalLM", "num_experts_per_tok", 1)
    refused(tmp_path, "MixtralForCausalLM", "num_local_experts", 0)
    refused(tmp_path, "Qwen3MoeForCausalLM", "num_experts", 0)
    with pytest.raises(ValueError, match="num_experts_per_tok 1"):
        read(tmp_path, "Qwen3MoeForCausalLM", num_experts_per_tok=1, norm_topk_prob=True)
    model = read(tmp_path, "Qwen3MoeForCausalLM", num_experts_per_tok=1, decoder_sparse_step=1, mlp_only_layers=[])
    assert (model.num_experts, model.num_experts_per_tok, model.moe_intermediate_size) == (128, 1, 768)
    model = read(tmp_path, "MixtralForCausalLM", num_local_experts=4, router_jitter_noise=0.1)
    assert (model.num_experts, model.num_experts_per_tok, model.moe_intermediate_size) == (4, 2, 384)


def test_gemmas_newer_name_of_its_activation(tmp_path):
    refused(tmp_path, "GemmaForCausalLM", "hidden_activation", "gelu")
    read(tmp_path, "GemmaForCausalLM", hidden_activation="gelu_pytorch_tanh")
    read(tmp_path, "GemmaForCausalLM", hidden_activation=None)


def test_all_refused_fields_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="attention_bias True, mlp_bias True: NeMo's LlamaModel"):
        read(tmp_path, "LlamaForCausalLM", attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "Qwen2MoeForCausalLM", "PhiMoEForCausalLM"])
def test_other_families_are_refused_with_the_supported_ones(tmp_path, architecture):
    with pytest.raises(ValueError) as error:
        read(tmp_path, architecture)
    assert architecture in str(error.value)
    assert [name for name in ALL if name not in str(error.value)] == []


def test_what_each_family_takes_for_granted(tmp_path):
    gemma = read(tmp_path, "GemmaForCausalLM")
    assert (gemma.head_dim, gemma.num_key_value_heads, gemma.tie_word_embeddings) == (256, 16, True)
    assert read(tmp_path, "Qwen3ForCausalLM").head_dim == 128
    assert read(tmp_path, "MistralForCausalLM").num_key_value_heads == 8


@pytest.mark.parametrize(
    "architecture, fields, billions, recipe",
    [
        ("Qwen2ForCausalLM", (28, 3584, 18944, 28, 4, 128, 152064, False), 7.62, "qwen25_7b"),
        ("Qwen3ForCausalLM", (28, 1024, 3072, 16, 8, 128, 151936, True), 0.6, "qwen3_600m"),
        ("MistralForCausalLM", (40, 5120, 14336, 32, 8, 128, 131072, False), 12.25, "mistral_nemo_12b"),
        ("Phi3ForCausalLM", (32, 3072, 8192, 32, 32, 96, 32064, False), 3.82, "phi3_mini_4k_instruct"),
        ("GemmaForCausalLM", (18, 2048, 16384, 8, 1, 256, 256000, True), 2.51, "gemma_2b"),
        ("Gemma2ForCausalLM", (26, 2304, 9216, 8, 4, 256, 256000, True), 2.61, "gemma2_2b"),
        ("Gemma2ForCausalLM", (46, 4608, 36864, 32, 16, 128, 256000, True), 27.2, "gemma2_27b"),
        ("NemotronForCausalLM", (32, 3072, 9216, 24, 8, 128, 256000, False), 4.19, "nemotron3_4b"),
    ],
)
def test_parameters(tmp_path, architecture, fields, billions, recipe):
    """The published numbers of parameters, and the recipe that they choose."""
    names = (
        "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size "
        "tie_word_embeddings"
    ).split()
    model = read(tmp_path, architecture, **dict(zip(names, fields)))
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.01) and model.recipe == recipe


@pytest.mark.parametrize(
    "architecture, fields, billions, active, recipe",
    [
        ("MixtralForCausalLM", (32, 4096, 14336, 32, 8, 128, 32000, False), 46.7, 12.88, "mixtral_8x7b"),
        ("MixtralForCausalLM", (56, 6144, 16384, 48, 8, 128, 32768, False), 140.6, 39.15, "mixtral_8x22b"),
        ("Qwen3MoeForCausalLM", (48, 2048, 768, 32, 4, 128, 151936, False), 30.53, 3.35, "qwen3_30b_a3b"),
        ("Qwen3MoeForCausalLM", (94, 4096, 1536, 64, 4, 128, 151936, False), 235.09, 22.19, "qwen3_235b_a22b"),
    ],
)
def test_parameters_of_experts(tmp_path, architecture, fields, billions, active, recipe):
    names = (
        "num_hidden_layers hidden_size {} num_attention_heads num_key_value_heads head_dim vocab_size "
        "tie_word_embeddings"
    ).format("intermediate_size" if architecture == "MixtralForCausalLM" else "moe_intermediate_size")
    model = read(tmp_path, architecture, **dict(zip(names.split(), fields)))
    assert model.parameters / 1e9 == pytest.approx(billions, rel=0.001) and model.recipe == recipe
    assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.005)

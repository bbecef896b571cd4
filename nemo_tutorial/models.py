"""What a checkpoint is: read from a Hugging Face `config.json` or a NeMo context, with the standard library only."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """A model family that NeMo and transformers both have."""

    architecture: str  # in config.json
    nemo_model: str  # in nemo.collections.llm
    recipes: dict  # parameters in 10^9 -> recipe in nemo.collections.llm
    hidden_act: str = "silu"
    gated: bool = True  # whether the MLP has a gate
    rope_types: tuple = ("default", "linear")  # what NeMo can compute, of rope_scaling's
    partial_rotary: bool = False  # whether NeMo's model carries partial_rotary_factor
    window: bool = False  # whether sliding_window means all layers, as NeMo's window_size does
    alternating: bool = False  # whether every other layer has the window, beginning with the first
    experts: dict = field(default_factory=dict)  # of a mixture of experts: Model's names of its sizes -> config.json's
    defaults: dict = field(default_factory=dict)  # what transformers takes where config.json says nothing


# Megatron's linear layers of a decoder layer, those that an adapter may change.
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
# NeMo's Gemma 2 has a norm of the output inside these layers, and adds what the adapter says after that norm.
NORM_INSIDE = {"Gemma2ForCausalLM": ("linear_proj", "linear_fc2")}

FAMILIES = [
    Family(
        "LlamaForCausalLM",
        "LlamaModel",
        {1: "llama32_1b", 3: "llama32_3b", 8: "llama31_8b", 70: "llama31_70b", 405: "llama31_405b"},
        rope_types=("default", "linear", "llama3"),
    ),
    Family(
        "Qwen2ForCausalLM",
        "Qwen2Model",
        {
            0.5: "qwen25_500m",
            1.5: "qwen25_1p5b",
            7: "qwen25_7b",
            14: "qwen25_14b",
            32: "qwen25_32b",
            72: "qwen25_72b",
        },
    ),
    Family(
        "Qwen3ForCausalLM",
        "Qwen3Model",
        {0.6: "qwen3_600m", 1.7: "qwen3_1p7b", 4: "qwen3_4b", 8: "qwen3_8b", 14: "qwen3_14b", 32: "qwen3_32b"},
        defaults={"head_dim": 128},
    ),
    Family(
        "MistralForCausalLM",
        "MistralModel",
        {7: "mistral_7b", 12: "mistral_nemo_12b", 24: "mistral_small3_24b"},
        window=True,
        defaults={"num_key_value_heads": 8},
    ),
    Family(
        "Phi3ForCausalLM",
        "Phi3Model",
        {4: "phi3_mini_4k_instruct"},
        rope_types=("default",),
        partial_rotary=True,
        window=True,
    ),
    Family(
        "GemmaForCausalLM",
        "GemmaModel",
        {2: "gemma_2b", 7: "gemma_7b"},
        hidden_act="gelu_pytorch_tanh",
        defaults={"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True},
    ),
    Family(
        "Gemma2ForCausalLM",
        "Gemma2Model",
        {2: "gemma2_2b", 9: "gemma2_9b", 27: "gemma2_27b"},
        hidden_act="gelu_pytorch_tanh",
        alternating=True,
        defaults={"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window": 4096},
    ),
    Family(
        "MixtralForCausalLM",
        "MixtralModel",
        {47: "mixtral_8x7b", 141: "mixtral_8x22b"},
        window=True,
        experts={
            "num_experts": "num_local_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "moe_intermediate_size": "intermediate_size",
        },
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "Qwen3Model",
        {30: "qwen3_30b_a3b", 235: "qwen3_235b_a22b"},
        experts={
            "num_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "moe_intermediate_size": "moe_intermediate_size",
        },
        defaults={
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
        },
    ),
    Family(
        "NemotronForCausalLM",
        "NemotronModel",
        {4: "nemotron3_4b", 8: "nemotron3_8b", 15: "nemotron4_15b", 22: "nemotron3_22b", 340: "nemotron4_340b"},
        hidden_act="relu2",
        gated=False,
        rope_types=("default",),
        partial_rotary=True,
    ),
]
# NeMo names on the left, Hugging Face names on the right.
NEMO_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "seq_length": "max_position_embeddings",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
NEMO_EXPERTS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}


@dataclass(frozen=True)
class Model:
    """The shape of a model, in Hugging Face's names."""

    family: Family
    source: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_experts: int = 0  # of each layer; 0: none
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # of each expert
    sliding_window: int = 0  # where it is of every other layer only; else 0

    @property
    def parameters(self):
        """Number of parameters (embedding, attention, MLP or all experts and the router, the layers' norms, output
        layer; no biases).
        """
        return self._parameters(self.num_experts)

    @property
    def active_parameters(self):
        """Number of parameters that a token passes through: with experts, those that it is routed to."""
        return self._parameters(self.num_experts_per_tok)

    def _parameters(self, experts):
        attention = self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        mlp = (3 if self.family.gated else 2) * self.intermediate_size
        if self.num_experts:
            mlp = 3 * experts * self.moe_intermediate_size + self.num_experts
        layer = self.hidden_size * (attention + mlp + (4 if self.family.alternating else 2))
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size

    @property
    def recipe(self):
        """Name of the NeMo recipe made for the size nearest to this model's."""
        return min(self.family.recipes.items(), key=lambda item: abs(item[0] - self.parameters / 1e9))[1]


def supported():
    """The architectures that can be used, as one phrase."""
    return ", ".join(family.architecture for family in FAMILIES)


def remote_code(folder):
    """The files of a Hugging Face folder that ask to run code of the model's own (auto_map)."""
    found = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            if json.loads((Path(folder) / name).read_text(encoding="utf-8")).get("auto_map"):
                found.append(name)
        except (OSError, ValueError, AttributeError):
            pass
    return found


def tokenizer_code(folder):
    """Whether a folder's tokenizer runs code of its own. Where it does, --trust_remote_code was given on import."""
    return "tokenizer_config.json" in remote_code(folder)


def from_config(path):
    """Read a `config.json`. Raises ValueError in a sentence for a reader if it can't be used."""
    path = Path(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as JSON ({error}); download the model again") from None
    architecture = (config.get("architectures") or ["no architecture"])[0]
    family = next((f for f in FAMILIES if f.architecture == architecture), None)
    if family is None:
        raise ValueError(f"{path} says {architecture}, which can't be converted. Supported: {supported()}")
    refused = _refused(config, family)
    if refused:
        raise ValueError(f"{path} has {', '.join(refused)}: NeMo's {family.nemo_model} would compute something else")
    config = family.defaults | config
    try:
        heads = config["num_attention_heads"]
        return Model(
            family=family,
            source=str(path.parent),
            num_hidden_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            sliding_window=config["sliding_window"] if family.alternating else 0,
            **{name: config[key] for name, key in family.experts.items()},
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]!r}; it is not the config.json of a {architecture}") from None


def _refused(config, family):
    """The fields of a config.json that change what a model computes, and that NeMo's model of it can't have."""
    accepted = {  # the values that NeMo's model stands for; transformers' own default is always one of them
        "hidden_act": (family.hidden_act,),
        "hidden_activation": (family.hidden_act, None),  # Gemma's newer name
        "attention_bias": (False, None),  # the families with biases in their attention have no field for them
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),  # Qwen's windows begin at a layer; NeMo's importers forget them
        "use_bidirectional_attention": (False, None),
        "decoder_sparse_step": (1, None),  # layers without experts among those with
        "mlp_only_layers": ([], None),
        "quantization_config": (None,),
        "rope_parameters": (None,),  # transformers 5's name, of which transformers 4 sees nothing
    }
    if not family.partial_rotary:
        accepted["partial_rotary_factor"] = (1, None)
    refused = [f"{key} {config[key]!r}" for key, values in accepted.items() if config.get(key, values[0]) not in values]
    kinds = ("sliding_attention", "full_attention") if family.alternating else ("full_attention",)
    layers = config.get("layer_types") or ()
    if any(kind != kinds[layer % len(kinds)] for layer, kind in enumerate(layers)):
        refused.append(f"layer_types {layers!r}")
    if family.experts:
        full = family.defaults | config
        if not full[family.experts["num_experts"]]:
            refused.append(f"{family.experts['num_experts']} 0")
        # One expert a token, and its weight made 1: Megatron won't, because such a router learns nothing.
        if full["num_experts_per_tok"] == 1 and full["norm_topk_prob"]:
            refused.append("num_experts_per_tok 1")
    rope = config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in family.rope_types:
        refused.append(f"rope_scaling {rope!r}")
    return refused


def _config_object(objects, path):
    """The (class name, plain values) that a NeMo `io.json` holds at `path`, or None."""
    for item in objects.values():
        if path in item.get("paths", ()):
            values = {key: value["value"] for key, value in _attributes(item) if value.get("type") == "leaf"}
            traverser = dict(_attributes(objects[item["metadata"]["key"]]))
            return traverser["fn_or_cls"]["name"], values
    return None


def _attributes(item):
    for key, value in item["items"]:
        match = re.fullmatch(r"Attr\(name='(\w+)'\)", key)
        if match and isinstance(value, dict):
            yield match.group(1), value


def nemo_context(path):
    """The objects of a NeMo checkpoint's `context/io.json`: {dotted path: (class name, plain values)}.

    Paths: "model", "model.config", "model.tokenizer", "datamodule"; a missing one is None.
    Raises ValueError if the file can't be read.
    """
    file = Path(path) / "context" / "io.json"
    try:
        objects = json.loads(file.read_text(encoding="utf-8"))["objects"]
        paths = {name: f"<root>.{name}" for name in ("model", "model.config", "model.tokenizer")}
        paths["datamodule"] = "<root>.extra['datamodule']"
        return {name: _config_object(objects, path) for name, path in paths.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} can't be read ({error!r}); it is not a whole NeMo 2 checkpoint") from None


def from_nemo(path):
    """Read a NeMo 2 checkpoint's model. Raises ValueError in a sentence for a reader if it can't be used."""
    context = nemo_context(path)
    if context["model"] is None or context["model.config"] is None:
        raise ValueError(f"{path}/context/io.json describes no model; it is not a whole NeMo 2 checkpoint")
    values = context["model.config"][1]
    # Qwen3Model is of two families. NeMo's own importer leaves the number of experts to the config's class.
    experts = bool(values.get("num_moe_experts") or values.get("moe_ffn_hidden_size"))
    families = [f for f in FAMILIES if f.nemo_model == context["model"][0]]
    family = next((f for f in families if bool(f.experts) == experts), families[0] if families else None)
    if family is None:
        known = ", ".join(f.nemo_model for f in FAMILIES)
        raise ValueError(f"{path} holds a {context['model'][0]}, which can't be used. Supported: {known}")
    fields = {name: values.get(nemo) for nemo, name in NEMO_FIELDS.items()}
    if family.experts:
        defaults = {name: family.defaults.get(key) for name, key in family.experts.items()}
        defaults["moe_intermediate_size"] = values.get("ffn_hidden_size")
        fields |= {name: values.get(nemo) or defaults[name] for nemo, name in NEMO_EXPERTS.items()}
    hf_config = tokenizer_folder(path) / "config.json"
    if hf_config.is_file():  # NeMo's seq_length is the run's, not the model's limit
        fields["max_position_embeddings"] = from_config(hf_config).max_position_embeddings
    if family.alternating:
        fields["sliding_window"] = (
            from_config(hf_config).sliding_window if hf_config.is_file() else family.defaults["sliding_window"]
        )
    for nemo, name in NEMO_FIELDS.items():
        if fields[name] is None and name not in ("head_dim", "num_key_value_heads"):
            raise ValueError(f"{path}/context/io.json has no {nemo}; it is not a whole NeMo 2 checkpoint")
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or fields["num_attention_heads"]
    return Model(family=family, source=str(path), **fields)


def tokenizer_folder(path):
    """The folder inside a NeMo checkpoint that holds its tokenizer and, imported by us, its source's config.json."""
    tokenizer = nemo_context(path)["model.tokenizer"]
    name = tokenizer[1].get("pretrained_model_name") if tokenizer else None
    return Path(path) / "context" / (name or "nemo_tokenizer")


def hub_snapshot(repo, revision="main"):
    """The folder where the Hub's cache on this machine holds model `repo`, or None. Nothing is downloaded."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / ("models--" + repo.replace("/", "--"))
    try:
        snapshot = cache / "snapshots" / (cache / "refs" / revision).read_text().strip()
    except OSError:
        snapshot = cache / "snapshots" / revision  # a commit
    return snapshot if (snapshot / "config.json").is_file() else None


def hf_folder(name):
    """The local folder of a Hugging Face model: `name` itself, or its copy in the Hub's cache; None if neither."""
    return Path(name) if Path(name).is_dir() else hub_snapshot(name)


def is_hub_id(name):
    """Whether `name` has the form of a Hub id: owner/model, and is no path that exists."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def from_hf(folder, trust_remote_code=False):
    """Read a local Hugging Face model folder. Raises ValueError in a sentence for a reader if it can't be used."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; download it first: hf download OWNER/MODEL --local-dir {folder}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a Hugging Face model folder")
    model = from_config(folder / "config.json")
    for name in remote_code(folder) if not trust_remote_code else ():
        raise ValueError(
            f"{folder / name} asks to run code of its own (auto_map); read that code, and if you trust it, "
            "import the model with --trust_remote_code"
        )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise ValueError(f"{folder} has no tokenizer.json or tokenizer.model; download the whole model again")
    return model


def weight_files(folder):
    """The safetensors files of a Hugging Face folder. Raises ValueError if there are none, or some are missing."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} can't be read ({error!r}); download the model again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}; download the model again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files and list(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds its weights only as pickles (*.bin), which can run code when opened; "
            "use a revision with model.safetensors, or convert it once with transformers' save_pretrained"
        )
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file; download the whole model again")
    return files


def parse_size(text):
    """'8B' -> 8e9, '135M' -> 1.35e8. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([BM])", text.strip().upper())
    if not match:
        raise ValueError(f"{text!r} is not a size; write it like 8B or 135M")
    return float(match.group(1)) * {"B": 1e9, "M": 1e6}[match.group(2)]

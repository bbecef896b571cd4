"""LoRA and DoRA adapters: merged into the model that they were trained on, or written as `peft` reads them.

Ours, because NeMo exports adapters of Llama only, merges LoRA only, as bfloat16 only, holds the model in memory for it,
and goes by way of a folder in /tmp that all users share. Here a family's export table says where the rows of Megatron's
layers lie in Hugging Face's: those of an adapter's B go with the weight's, and A serves all parts of a fused layer.
"""

import nemo_tutorial.cpu  # noqa: F401  (before NeMo: without a GPU, conversion needs the no-GPU mode)

# isort: split
import shutil
from pathlib import Path

import fiddle as fdl
import torch
from nemo.collections.llm.peft import DoRA, LoRA
from nemo.lightning import io
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from nemo_tutorial import checkpoints, conversion, models, terminal, weights

A, B, MAGNITUDE = "linear_in.weight", "linear_out.weight", "weight_magnitude"  # NeMo's names
PEFT = {A: "lora_A.weight", B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}


class Adapter:
    """The adapter of a NeMo checkpoint: `layers` are the linear layers that it changes, by Megatron's names.

    Raises ValueError for one that can't be expressed as a change of their weights.
    """

    def __init__(self, checkpoint):
        self.checkpoint = Path(checkpoint)
        where = {"path": self.checkpoint / "context", "subpath": "model.model_transform"}
        kind = fdl.get_callable(io.load_context(**where, build=False))
        if kind not in (LoRA, DoRA):
            raise ValueError(f"{checkpoint} holds a {kind.__name__} adapter; only LoRA and DoRA are known here")
        scheme = io.load_context(**where)
        self.rank, self.alpha, self.dropout, self.dora = scheme.dim, scheme.alpha, scheme.dropout, kind is DoRA
        self.weights = weights.Megatron(checkpoint)
        self.family = models.from_nemo(checkpoint).family
        ending = f".adapter.{A}"
        self.layers = [name.removesuffix(ending) for name in self.weights.meta if name.endswith(ending)]
        ranks = [self.weights.pieces(f"{layer}.adapter.{B}") // (1 + ("linear_fc1" in layer)) for layer in self.layers]
        if self.dora and max(ranks) > 1:
            raise ValueError(
                f"{checkpoint} is DoRA with tensor parallelism: NeMo takes the norms of each rank's part there "
                "of linear_proj and linear_fc2 for those of the whole, which no change of their weights does; "
                "train it with --tensor_model_parallel_size 1"
            )
        inside = models.NORM_INSIDE.get(self.family.architecture, ())
        bad = sorted({layer.rpartition(".")[2] for layer in self.layers if layer.endswith(inside)} if inside else ())
        if bad:
            raise ValueError(
                f"{checkpoint} adapts {', '.join(bad)}: NeMo's {self.family.nemo_model} has a norm between them "
                "and what the adapter adds to, so no change of their weights does the same"
            )

    def part(self, layer, name):
        """A (rank x inputs), B (outputs x rank) or MAGNITUDE (outputs) of a layer, its rows as the weight has them."""
        name = f"{layer}.adapter.{name}"
        tensor = self.weights[name]
        if layer.endswith("linear_fc1") and name.endswith(B) and not self.family.gated:
            # NeMo saves it as if it were gated: the first half of every rank's part, then the second halves.
            halves = tensor.chunk(self.weights.pieces(name))
            middle = len(halves) // 2
            tensor = torch.cat([part for pair in zip(halves[:middle], halves[middle:]) for part in pair])
        return tensor


class Merged:
    """A base model's weights with an adapter merged in, in the manner of weights.Megatron."""

    def __init__(self, base, adapter):
        self.base, self.adapter = weights.Megatron(base), adapter
        self.meta = self.base.meta
        missing = [layer for layer in adapter.layers if f"{layer}.weight" not in self.meta]
        if missing:
            raise ValueError(f"{base} has no {', '.join(missing)}, which {adapter.checkpoint} adapts")
        self.layers = set(adapter.layers)

    def __getitem__(self, name):
        layer, _, kind = name.rpartition(".")
        if layer not in self.layers or kind not in ("weight", "bias"):
            return self.base[name]
        if kind == "weight":
            weight, factor = self._weight(layer)
            return (weight * factor[:, None] if self.adapter.dora else weight).to(self.meta[name].dtype)
        if not (self.adapter.dora and layer.endswith("linear_qkv")):  # the one that Megatron adds inside the layer
            return self.base[name]
        return (self.base[name].float() * self._weight(layer)[1]).to(self.meta[name].dtype)

    def _weight(self, layer):
        """The layer's weight with the low-rank part, and DoRA's factor of each row, in float32."""
        low, high = (self.adapter.part(layer, name).float() for name in (A, B))
        weight = self.base[f"{layer}.weight"].float().addmm_(high, low, alpha=self.adapter.alpha / self.adapter.rank)
        if not self.adapter.dora:
            return weight, None
        return weight, self.adapter.part(layer, MAGNITUDE).float() / torch.linalg.norm(weight, dim=1)


def merge(checkpoint, base, output):
    """Merge an adapter checkpoint into its base model: a full NeMo checkpoint in `output`. Rows to show.

    Every tensor is read back from disk and compared with what it should be; raises ValueError if one differs.
    """
    merged = Merged(base, Adapter(checkpoint))
    model = io.load_context(checkpoint / "context", subpath="model")
    model.model_transform = model.__io__.model_transform = None
    dtype = merged.meta["embedding.word_embeddings.weight"].dtype
    model.config.params_dtype, model.config.bf16 = dtype, dtype == torch.bfloat16
    connector = conversion.exporter(checkpoint)
    trainer = connector.nemo_setup(model, conversion.alone(**conversion.SAVING))
    differ = [
        f"{name} {tuple(merged.meta[name].shape) if name in merged.meta else 'missing'}"
        for name, value in conversion.nemo_parameters(model).items()
        if name not in merged.meta or merged.meta[name].shape != value.shape
    ]
    if differ:
        raise ValueError(f"{base} is another model than the adapter's: {', '.join(differ)}")
    conversion.write_nemo(connector, model, trainer, merged.__getitem__, output, "merge")
    folder = models.tokenizer_folder(output)  # NeMo has saved it anew, perhaps
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.copy_assets(models.tokenizer_folder(checkpoint), folder)
    checkpoints.to_disk(output, forget=True)
    expected = ((name, merged[name]) for name in merged.meta)
    with terminal.progress("verify", weights.size(merged.meta)) as progress:
        found = weights.differences(merged.meta, expected, weights.Megatron(output), progress)
    if found:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in found))
    changed = f"{len(merged.layers)} of them with the adapter"
    return [("tensors", f"{len(merged.meta)} read back and compared: all bit-equal, {changed}")]


class Peft:
    """An adapter as `peft` names and orders it: `meta` has the tensors' names, shapes and dtypes.

    `dtype` is that of its tensors, such as "float16"; None: their own. Raises ValueError if peft has no such adapter.
    """

    def __init__(self, adapter, dtype=None):
        self.adapter, self.dtype = adapter, dtype
        connector = conversion.exporter(adapter.checkpoint)
        config = connector.config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).state_dict()
        # The family's own transforms, on weights of one column, which holds the numbers of the rows.
        nemo_config = io.load_context(adapter.checkpoint / "context", subpath="model.config")
        nemo_config.hidden_size = 1
        numbers = {
            f"{layer}.weight": torch.arange(adapter.weights.meta[f"{layer}.adapter.{B}"].shape[0])[:, None]
            for layer in adapter.layers
        }
        shapes = {
            name: weights.like((value.shape[0], 1), torch.int64) for name, value in model.items() if value.dim() == 2
        }
        table = weights.Table(connector, numbers, shapes, nemo_config, config)
        if table.unused:
            raise ValueError(f"the Hugging Face model has no place for the adapter of {', '.join(table.unused)}")
        self.rows, self.meta = {}, {}  # module -> (layer, which of its rows)
        for name, numbered in table.tensors(numbers):
            (source,) = table.maker[name].sources
            module, layer = (text.removesuffix(".weight") for text in (name, source))
            if adapter.dora and layer.endswith("linear_qkv") and f"{module}.bias" in model:
                raise ValueError(
                    f"DoRA scales the bias of {module} in NeMo, and not in peft: merge the adapter instead: "
                    "python finetuning/merge_lora.py"
                )
            self.rows[module] = layer, numbered[:, 0]
        ending = {module.rpartition(".")[2] for module in self.rows}
        linear = {name.removesuffix(".weight") for name in shapes}
        # By the last part of their names, unless another module has it too.
        alike = {module for module in linear if module.rpartition(".")[2] in ending}
        self.targets = sorted(ending if alike == self.rows.keys() else self.rows)
        for name, tensor in self.tensors():
            self.meta[name] = weights.like(tensor.shape, tensor.dtype)

    def tensors(self):
        """All tensors, one after the other: (name, tensor)."""
        for module, (layer, rows) in self.rows.items():
            for part in (A, B, MAGNITUDE) if self.adapter.dora else (A, B):
                tensor = self.adapter.part(layer, part)
                tensor = tensor if part == A else tensor[rows]
                name = f"base_model.model.{module}.{PEFT[part]}"
                yield name, weights.cast(name, tensor, getattr(torch, self.dtype) if self.dtype else tensor.dtype)


def export(checkpoint, output, base, revision=None, dtype=None):
    """Write an adapter checkpoint as a folder that `peft` loads; rows to show. Read back and compared.

    `base` is what the folder names as its base model: a Hub id (at `revision`), a Hugging Face folder, or None.
    """
    adapter = Adapter(checkpoint)
    peft = Peft(adapter, dtype)
    output.mkdir(parents=True)
    with terminal.progress("export", weights.size(peft.meta)) as progress:
        weights.write_safetensors(output, peft.meta, peft.tensors(), "1TB", progress, name="adapter_model")
    LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.dora,
        target_modules=peft.targets,
        inference_mode=True,
    ).save_pretrained(output)
    checkpoints.copy_assets(models.tokenizer_folder(checkpoint), output)
    for name in ("config.json", "generation_config.json"):  # of the base model, which this folder is not
        (output / name).unlink(missing_ok=True)
    checkpoints.to_disk(output, forget=True)
    written = weights.HuggingFace(output, [output / "adapter_model.safetensors"])
    found = weights.differences(peft.meta, peft.tensors(), written, lambda size: None)
    if found:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in found))
    kind = "DoRA" if adapter.dora else "LoRA"
    return [
        ("adapter", f"{kind}, rank {adapter.rank}, alpha {adapter.alpha}, of {len(peft.rows)} layers"),
        ("tensors", f"{len(peft.meta)} read back and compared: all bit-equal"),
    ]

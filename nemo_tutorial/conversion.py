"""Hugging Face <-> NeMo through NeMo's own importers and exporters, corrected where they lose something.

Corrected: the tokenizer's files and config.json are carried through the checkpoint as they are (NeMo writes its
own, with other fields, by way of a folder in /tmp that all users share); outputs are compared before they count.
"""

import nemo_tutorial.cpu  # noqa: F401  (before NeMo: without a GPU, conversion needs the no-GPU mode)

# isort: split
import contextlib
import functools
import gc
import json
import math
import tempfile
from pathlib import Path

import psutil
import torch
import transformers
from nemo.collections import llm
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer as Tokenizer
from nemo.lightning import MegatronStrategy, Trainer, io, teardown
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nemo_tutorial import checkpoints, models, terminal, weights

# As NeMo's connectors have it.
SAVING = {"ckpt_save_optimizer": False, "ckpt_async_save": False, "always_save_context": True}
LOADING = {"ddp": "pytorch", "setup_optimizers": False}


def alone(**strategy):
    """A trainer of this process only, for NeMo's connectors; `strategy` goes to NeMo's MegatronStrategy.

    Theirs opens a port, which another conversion or server may have taken since it was found to be free.
    """
    trainer = Trainer(devices=1, accelerator="cpu", strategy=MegatronStrategy(**strategy))
    trainer.strategy.store = torch.distributed.HashStore()
    return trainer


def importer(folder, model):
    """NeMo's importer for a Hugging Face folder: config and tokenizer files as they are, weights as a stream."""
    own = getattr(llm, model.family.nemo_model).importer(f"hf://{Path(folder).absolute()}")

    class Importer(type(own)):
        trust_remote_code = False  # Qwen's ask for it

        @property
        def config(self):
            with _importers_mended(model.family):
                config = super().config
            return _exact(config, AutoConfig.from_pretrained(folder), model.family)

        def save_hf_tokenizer_assets(self, tokenizer_name_or_path, save_path=None):
            # Stays as long as this importer: NeMo copies it when the checkpoint's context is written.
            self.assets = tempfile.TemporaryDirectory(prefix="nemo_tutorial_")
            checkpoints.copy_assets(tokenizer_name_or_path, Path(self.assets.name) / "nemo_tokenizer")
            return f"{self.assets.name}/nemo_tokenizer"

        @property
        def tokenizer(self):
            # Qwen's importers trust it always, all others never.
            return Tokenizer(self.save_hf_tokenizer_assets(str(self)), trust_remote_code=models.tokenizer_code(folder))

        def apply(self, output_path):
            source, target = weights.HuggingFace(folder), self.init()
            trainer = self.nemo_setup(target, alone(**SAVING))
            shapes = {name: weights.like(value.shape, value.dtype) for name, value in nemo_parameters(target).items()}
            table = weights.Table(self, source.meta, shapes, AutoConfig.from_pretrained(folder), target.config)
            missing = [f"{name}: NeMo's {model.family.nemo_model} has no place for it" for name in table.unused]
            missing += [f"{name}: there is nothing for it in {folder}" for name in table.unmade]
            if missing:
                raise ValueError("; ".join(missing))
            made = functools.partial(table.tensor, source)
            write_nemo(self, target, trainer, made, output_path, "import")
            return output_path

    return Importer(str(own))


@contextlib.contextmanager
def _importers_mended(family):
    """Most of NeMo's importers stop at a folder without a generation_config.json, which many models lack.

    And write a context that can't be loaded if it is one that transformers reads but won't save, as Llama 2's. (The
    file itself is carried as it is.) That of Gemma 2 reads config.json as Gemma's, which knows no defaults of Gemma 2's
    own fields.
    """
    own, gemma = GenerationConfig.from_pretrained, transformers.GemmaConfig

    def read(folder):
        if not (Path(folder.removeprefix("hf://")) / "generation_config.json").is_file():
            return None
        found = own(folder)
        try:
            found.validate(strict=True)
        except ValueError:
            return None
        return found

    GenerationConfig.from_pretrained = read
    if family.nemo_model == "Gemma2Model":
        transformers.GemmaConfig = transformers.Gemma2Config
    try:
        yield
    finally:
        GenerationConfig.from_pretrained, transformers.GemmaConfig = own, gemma


def _exact(config, hf, family):
    """NeMo's config with what its importers leave out or replace."""
    fields = {
        # As many embedding rows as the source has; some importers round up, or take the tokenizer's number of entries.
        "vocab_size": hf.vocab_size,
        "make_vocab_size_divisible_by": math.gcd(hf.vocab_size, 128),
        "share_embeddings_and_output_weights": hf.tie_word_embeddings,
        "num_query_groups": hf.num_key_value_heads,  # Phi3's leaves it out
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "seq_length": hf.max_position_embeddings,  # Mistral's takes the window
        "rotary_base": hf.rope_theta,  # Gemma's and others' leave some of these out
    }
    if family.experts:  # Qwen3's takes its class's numbers
        fields["num_moe_experts"] = getattr(hf, family.experts["num_experts"])
        fields["moe_router_topk"] = hf.num_experts_per_tok
        fields["moe_ffn_hidden_size"] = getattr(hf, family.experts["moe_intermediate_size"])
        # Whether the chosen experts' weights are of all experts' softmax, or add up to 1, as Mixtral's always do.
        fields["moe_router_pre_softmax"] = not getattr(hf, "norm_topk_prob", True)
    if family.partial_rotary:
        fields["rotary_percent"] = hf.partial_rotary_factor
    if family.window:
        # transformers' window counts the token itself, Megatron's does not: NeMo's importer is off by one.
        fields["window_size"] = (hf.sliding_window - 1, 0) if hf.sliding_window else None
        # With context parallelism, Transformer Engine has windows in this kind only.
        fields["cp_comm_type"] = "a2a" if hf.sliding_window else None
    rope = getattr(hf, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "linear":
        fields["seq_len_interpolation_factor"] = rope["factor"]
    if kind == "llama3":
        fields["low_freq_factor"] = rope["low_freq_factor"]
        fields["high_freq_factor"] = rope["high_freq_factor"]
        fields["old_context_len"] = rope["original_max_position_embeddings"]
    for name, value in fields.items():
        setattr(config, name, value)
        if hasattr(config, "__io__"):  # what the checkpoint's context is written from; else, the config itself
            setattr(config.__io__, name, value)
    return config


def nemo_parameters(model):
    """A NeMo model's parameters by their names in NeMo's tables, which know Transformer Engine's layers only."""
    local_names = {} if torch.cuda.is_available() else nemo_tutorial.cpu.LOCAL_NAMES
    found = {}
    for name, parameter in model.named_parameters():
        name = weights.one_by_one(name.removeprefix("module."))
        for te, local in local_names.items():
            # Experts have their norm before them in Transformer Engine's layers too.
            if not (model.config.num_moe_experts and ".mlp." in te):
                name = name.replace(local, te)
        found[name] = parameter
    return found


def write_nemo(connector, model, trainer, tensor, output, what):
    """Write a model that nemo_setup has prepared as the NeMo checkpoint `output`; `tensor` gives values by NeMo's name.

    The model's parameters have no values: nothing but the tensor that is written is in memory.
    """
    parameters = nemo_parameters(model)
    size = weights.size(parameters)
    with terminal.progress(what, size) as progress:
        make = weights.writer(parameters, tensor, progress)
        trainer.strategy.unwrapped_checkpoint_io._save_sharded_strategy = weights.Streamed(make, size)
        connector.nemo_save(output, trainer)
    trainer.strategy._lightning_module = None  # on a GPU's machine it is without values: nothing to move
    teardown(trainer, model)


def exporter(checkpoint, target="hf"):
    """NeMo's exporter for a checkpoint, with the imported model's own config.json if the checkpoint carries it."""
    own = io.load_context(checkpoint / "context", subpath="model").exporter(target, checkpoint)
    folder = models.tokenizer_folder(checkpoint)

    class Exporter(type(own)):
        @property
        def config(self):
            # Else: max_position_embeddings = the run's seq_length, one eos of several, as many embedding rows as
            # the tokenizer has entries. A shape that differs from it is an error on conversion.
            if (folder / "config.json").is_file():
                return AutoConfig.from_pretrained(folder)
            config = super().config
            config.vocab_size = io.load_context(checkpoint / "context", subpath="model.config").vocab_size
            config.architectures = [models.from_nemo(checkpoint).family.architecture]  # Qwen3's names no experts
            return config

    return Exporter(str(checkpoint))


def export_table(checkpoint, dtype=None):
    """How a checkpoint becomes a Hugging Face model: (its weights, the table, the Hugging Face config).

    `dtype` is that of the Hugging Face model, such as "float16"; None: each tensor's own.
    """
    own = exporter(checkpoint)
    source = weights.Megatron(checkpoint)
    nemo_config = io.load_context(checkpoint / "context", subpath="model.config")
    config = own.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = dict(model.state_dict())
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    table = weights.Table(own, source.meta, shapes, nemo_config, config)
    for name, step in table.maker.items():
        own_dtype = source.meta[step.sources[0]].dtype
        shapes[name] = weights.like(shapes[name].shape, getattr(torch, dtype) if dtype else own_dtype)
    missing = [f"{name}: transformers' {type(model).__name__} has no place for it" for name in table.unused]
    missing += [f"{name}: there is nothing for it in {checkpoint}" for name in table.unmade]
    if missing:
        raise ValueError("; ".join(missing))
    return source, table, config


def import_model(folder, model, output):
    """Write the Hugging Face model in `folder` as the NeMo checkpoint `output`."""
    gc.freeze()  # NeMo's teardown looks at every object that Python knows of: only at those of this import
    try:
        importer(folder, model)(output_path=Path(output))
    finally:
        gc.unfreeze()


def verify(checkpoint, folder, how, dtype=None):
    """Check a conversion: rows to show. Raises ValueError naming every tensor that differs.

    `how`: "tensors" compares names, shapes, dtypes and bits, with NeMo's side cast to `dtype` if that is given;
    "logits" also runs both models.
    """
    if how == "none":
        return [("tensors", "not compared (--verify none)")]
    compared, different = compare(checkpoint, folder, dtype)
    if different:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in different))
    rows = [("tensors", f"{compared} read back and compared: all bit-equal" + (f" as {dtype}" if dtype else ""))]
    return rows + (compare_logits(checkpoint, folder) if how == "logits" else [])


def compare(checkpoint, folder, dtype=None):
    """Compare a NeMo checkpoint with a Hugging Face folder: (number of tensors, [(tensor, what differs), ...])."""
    source, table, _ = export_table(Path(checkpoint), dtype)
    with terminal.progress("verify", weights.size(table.target)) as progress:
        found = weights.differences(table.target, table.tensors(source), weights.HuggingFace(folder), progress)
    return len(table.target), found


PROMPTS = ("The capital of Taiwan is", "台灣最高的山是玉山，", "def fibonacci(n):")


def compare_logits(checkpoint, folder):
    """Run NeMo's model and transformers' on three prompts: rows to show. Raises ValueError if they differ.

    Both are whole in memory here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = alone(**LOADING)
    nemo, _ = exporter(Path(checkpoint)).nemo_load(Path(checkpoint), trainer)
    nemo = nemo.eval().to(device)
    # "eager": transformers' faster ways of attention leave out Gemma 2's soft caps.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=models.tokenizer_code(folder))
    largest, agree, count, error, spread = 0.0, 0, 0, 0.0, 0.0
    with torch.no_grad():
        for prompt in PROMPTS:
            tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
            length = tokens.shape[1]
            mask = torch.ones(length, length, device=device).tril().logical_not()[None, None]
            ours = nemo(tokens, torch.arange(length, device=device)[None], attention_mask=mask).float()
            want = theirs(tokens).logits.float()
            ours = ours[..., : want.shape[-1]]
            largest = max(largest, (ours - want).abs().max().item())
            by_token = ((ours - want).square().mean(-1).sqrt() / want.std()).flatten()
            # Rounding sends a token now and then to another expert in one of the two models: there, most tokens count.
            typical = by_token.median() if nemo.config.num_moe_experts else by_token.square().mean().sqrt()
            error, spread = max(error, typical.item()), max(spread, want.std().item())
            agree, count = agree + (ours.argmax(-1) == want.argmax(-1)).sum().item(), count + length
    # By root mean square, as the largest of millions of differences grows with the vocabulary alone. Rounding to bf16
    # adds up with the layers: right models of 2, 16 and 32 differ by up to 1.4, 2.8 and 5.6 % of the spread, and with
    # experts, which rounding may choose otherwise, by twice that.
    if error > (0.03 if nemo.config.num_moe_experts else 0.015) * nemo.config.num_layers**0.5:
        raise ValueError(
            f"NeMo's logits differ from transformers' by {error:.1%} of their spread {spread:.3g} (root mean square), "
            f"and by up to {largest:.3g}"
        )
    return [
        ("logits", f"differ by at most {largest:.2g}, {error:.1%} of the spread {spread:.2g} in the mean"),
        ("greedy tokens", f"{agree} of {count} agree"),
    ]


def sentence(folder, tokens=8):
    """Load a Hugging Face folder as its users do, and let it go on from a prompt: rows to show.

    The weights stay mapped from their files. Raises ValueError if transformers does not find every tensor.
    """
    needed = sum(file.stat().st_size for file in models.weight_files(folder))
    free = psutil.virtual_memory().available
    if needed > free:
        return [
            ("sentence", f"none: {terminal.gigabytes(needed)} of weights, {terminal.gigabytes(free)} of memory free")
        ]
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    lost = {kind: names for kind, names in found.items() if names}
    if lost:
        raise ValueError(f"transformers reads {folder} with {lost}")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=models.tokenizer_code(folder))
    inputs = tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    reply = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return [("sentence", tokenizer.decode(reply[0]))]


def export(checkpoint, output, max_shard_size="5GB", dtype=None):
    """Write `checkpoint` as the Hugging Face folder `output`, with the imported model's own papers."""
    source, table, config = export_table(checkpoint, dtype)
    output.mkdir(parents=True)
    with terminal.progress("export", weights.size(table.target)) as progress:
        weights.write_safetensors(output, table.target, table.tensors(source), max_shard_size, progress)
    assets = models.tokenizer_folder(checkpoint)
    checkpoints.copy_assets(assets, output)
    dtype = str(next(iter(table.target.values())).dtype).removeprefix("torch.")
    if not (assets / "config.json").is_file():  # not imported by us: transformers writes NeMo's idea of it
        config.dtype = dtype
        config.save_pretrained(output)
        return
    own = json.loads((output / "config.json").read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in own else "torch_dtype"
    if own.get(key) != dtype:  # trained in another precision than it was imported in
        own[key] = dtype
        (output / "config.json").write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

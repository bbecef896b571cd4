"""Hugging Face <-> NeMo through NeMo's own importers and exporters, corrected where they lose something.

Corrected: the tokenizer's files and config.json are carried through the checkpoint as they are (NeMo writes its
own, with other fields, by way of a folder in /tmp that all users share); outputs are compared before they count.
"""

import nemo_tutorial.cpu  # noqa: F401  (before NeMo: without a GPU, conversion needs the no-GPU mode)

# isort: split
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from nemo.collections import llm
from nemo.lightning import io, teardown
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nemo_tutorial import checkpoints, models, weights


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
            # Stays until this process ends: NeMo copies it when the checkpoint's context is written.
            self.assets = Path(tempfile.mkdtemp(prefix="nemo_tutorial_")) / "nemo_tokenizer"
            checkpoints.copy_assets(tokenizer_name_or_path, self.assets)
            return str(self.assets)

        def apply(self, output_path):
            source, target = weights.HuggingFace(folder), self.init()
            trainer = self.nemo_setup(target, ckpt_async_save=False)
            parameters = {_nemo_name(name, model): parameter for name, parameter in target.named_parameters()}
            shapes = {name: weights.like(value.shape, value.dtype) for name, value in parameters.items()}
            table = weights.Table(self, source.meta, shapes, AutoConfig.from_pretrained(folder), target.config)
            missing = [f"{name}: NeMo's {model.family.nemo_model} has no place for it" for name in table.unused]
            missing += [f"{name}: there is nothing for it in {folder}" for name in table.unmade]
            if missing:
                raise ValueError("; ".join(missing))
            with _progress("import", source.meta) as progress:
                make = weights.writer(parameters, table, source, progress)
                trainer.strategy.unwrapped_checkpoint_io._save_sharded_strategy = weights.Streamed(make)
                self.nemo_save(output_path, trainer)
            trainer.strategy._lightning_module = None  # on a GPU's machine it is without values: nothing to move
            teardown(trainer, target)
            return output_path

    return Importer(str(own))


@contextlib.contextmanager
def _importers_mended(family):
    """Most of NeMo's importers stop at a folder without a generation_config.json, which many models lack.

    That of Gemma 2 reads config.json as Gemma's, which knows no defaults of Gemma 2's own fields.
    """
    own, gemma = GenerationConfig.from_pretrained, transformers.GemmaConfig
    GenerationConfig.from_pretrained = lambda folder: (
        own(folder) if (Path(folder.removeprefix("hf://")) / "generation_config.json").is_file() else None
    )
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


def _nemo_name(name, model):
    """A parameter's name in NeMo's tables, which know Transformer Engine's layers only."""
    name = weights.one_by_one(name.removeprefix("module."))
    if not torch.cuda.is_available():
        for te, local in nemo_tutorial.cpu.LOCAL_NAMES.items():
            if not (model.num_experts and ".mlp." in te):  # experts have their norm before them there too
                name = name.replace(local, te)
    return name


@contextlib.contextmanager
def _progress(what, tensors):
    """A bar of bytes on a terminal: GB, GB/s and time left; gives the function to call with each number of bytes."""
    total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


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

    `dtype` is that of the Hugging Face model; None: the checkpoint's.
    """
    own = exporter(checkpoint)
    source = weights.Megatron(checkpoint)
    nemo_config = io.load_context(checkpoint / "context", subpath="model.config")
    config = own.config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dtype = dtype or source.meta["embedding.word_embeddings.weight"].dtype
    shapes = {name: weights.like(value.shape, dtype) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    table = weights.Table(own, source.meta, shapes, nemo_config, config)
    missing = [f"{name}: transformers' {type(model).__name__} has no place for it" for name in table.unused]
    missing += [f"{name}: there is nothing for it in {checkpoint}" for name in table.unmade]
    if missing:
        raise ValueError("; ".join(missing))
    return source, table, config


def import_model(folder, model, output):
    """Write the Hugging Face model in `folder` as the NeMo checkpoint `output`."""
    importer(folder, model)(output_path=Path(output))


def verify(checkpoint, folder, written, how):
    """Check a conversion: rows to show. Raises ValueError naming every tensor that differs.

    `written` is the one of the two that was written. `how`: "tensors" compares names, shapes, dtypes and bits as read
    back from disk; "logits" also runs both models.
    """
    if how == "none":
        return [("tensors", "not compared (--verify none)")]
    compared, different = compare(checkpoint, folder, written)
    if different:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in different))
    rows = [("tensors", f"{compared} read back and compared: all bit-equal")]
    return rows + (compare_logits(checkpoint, folder) if how == "logits" else [])


def compare(checkpoint, folder, written=None):
    """Compare a NeMo checkpoint with a Hugging Face folder: (number of tensors, [(tensor, what differs), ...])."""
    for file in Path(written).rglob("*") if written else ():
        if file.is_file():
            with open(file, "rb") as opened:  # what was just written shall come from the disk, not from memory
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    source, table, _ = export_table(Path(checkpoint))
    with _progress("verify", table.target) as progress:
        return len(table.target), weights.differences(table, source, weights.HuggingFace(folder), progress)


PROMPTS = ("The capital of Taiwan is", "台灣最高的山是玉山，", "def fibonacci(n):")


def compare_logits(checkpoint, folder):
    """Run NeMo's model and transformers' on three prompts: rows to show. Raises ValueError if they differ.

    Both are whole in memory here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nemo, _ = exporter(Path(checkpoint)).nemo_load(Path(checkpoint))
    nemo = nemo.eval().to(device)
    # "eager": transformers' faster ways of attention leave out Gemma 2's soft caps.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
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
        reply = theirs.generate(tokens, max_new_tokens=20, do_sample=False)
    # By root mean square: two right bf16 models of 2 to 32 layers differ by 0.01 to 0.05 of the spread, wrong ones by
    # 0.14 and more. The largest of millions of differences grows with the vocabulary alone.
    if error > 0.1:
        raise ValueError(
            f"NeMo's logits differ from transformers' by {error:.1%} of their spread {spread:.3g} (root mean square), "
            f"and by up to {largest:.3g}"
        )
    return [
        ("logits", f"differ by at most {largest:.2g}, {error:.1%} of the spread {spread:.2g} in the mean"),
        ("greedy tokens", f"{agree} of {count} agree"),
        ("sentence", tokenizer.decode(reply[0])),
    ]


def export(checkpoint, output, max_shard_size="5GB"):
    """Write `checkpoint` as the Hugging Face folder `output`, with the imported model's own papers."""
    source, table, config = export_table(checkpoint)
    output.mkdir(parents=True)
    with _progress("export", table.target) as progress:
        weights.write_safetensors(output, table, source, max_shard_size, progress)
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


def merge(adapter, base, output):
    """Merge a LoRA checkpoint into its base model: a full NeMo 2 checkpoint in `output`."""
    with tempfile.TemporaryDirectory() as folder:
        # NeMo looks for the base model where the adapter says: a copy, of links, says where it is now.
        copy = Path(folder) / adapter.name
        (copy / "weights").mkdir(parents=True)
        (copy / "context").symlink_to((adapter / "context").absolute())
        for file in (adapter / "weights").iterdir():
            (copy / "weights" / file.name).symlink_to(file.absolute())
        metadata = json.loads((adapter / "weights" / "adapter_metadata.json").read_text(encoding="utf-8"))
        metadata["model_ckpt_path"] = str(Path(base).absolute())
        (copy / "weights" / "adapter_metadata.json").unlink()
        (copy / "weights" / "adapter_metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
        llm.peft.merge_lora(str(copy), str(output))
    _own_tokenizer(adapter, output)


def _own_tokenizer(source, output):
    """Put the source checkpoint's tokenizer files in place of those that NeMo's merge saved anew."""
    folder = models.tokenizer_folder(output)
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.copy_assets(models.tokenizer_folder(source), folder)

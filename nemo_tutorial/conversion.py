"""Hugging Face <-> NeMo through NeMo's own importers and exporters, corrected where they lose something.

Corrected: the tokenizer's files and config.json are carried through the checkpoint as they are (NeMo writes its
own, with other fields, by way of a folder in /tmp that all users share); outputs are compared before they count.
"""

import nemo_tutorial.cpu  # noqa: F401  (before NeMo: without a GPU, conversion needs the no-GPU mode)

# isort: split
import json
import shutil
import tempfile
from pathlib import Path

import torch
from nemo.collections import llm
from nemo.lightning import io
from safetensors import safe_open

from nemo_tutorial import checkpoints, models


def importer(folder, model):
    """NeMo's importer for a Hugging Face folder, whose tokenizer files go into the checkpoint unchanged."""
    own = getattr(llm, model.family.nemo_model).importer(f"hf://{Path(folder).absolute()}")

    class Importer(type(own)):
        def save_hf_tokenizer_assets(self, tokenizer_name_or_path, save_path=None):
            # Stays until this process ends: NeMo copies it when the checkpoint's context is written.
            self.assets = Path(tempfile.mkdtemp(prefix="nemo_tutorial_")) / "nemo_tokenizer"
            checkpoints.copy_assets(tokenizer_name_or_path, self.assets)
            return str(self.assets)

    return Importer(str(own))


def exporter(checkpoint, target="hf"):
    """NeMo's exporter for a checkpoint, with the imported model's own config.json if the checkpoint carries it."""
    own = io.load_context(checkpoint / "context", subpath="model").exporter(target, checkpoint)
    folder = models.tokenizer_folder(checkpoint)
    if not (folder / "config.json").is_file():
        return own

    class Exporter(type(own)):
        @property
        def config(self):
            # Else: max_position_embeddings = the run's seq_length, one eos of several, as many embedding rows as
            # the tokenizer has entries. A shape that differs from it is an error on conversion.
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(folder)

    return Exporter(str(checkpoint))


def tensors(folder):
    """{name: (file, shape, dtype)} of a Hugging Face folder's safetensors."""
    found = {}
    for file in models.weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                part = weights.get_slice(name)
                found[name] = (file, tuple(part.get_shape()), part.get_dtype())
    return found


def import_and_compare(folder, model, output):
    """Import `folder` to `output`, export that again, and compare every tensor's bits with the source.

    Returns (number of tensors compared, [(tensor, what differs), ...]).
    """
    own = importer(folder, model)
    own(output_path=Path(output))
    with tempfile.TemporaryDirectory(dir=Path(output).parent, prefix=".check.") as check:
        export_weights(Path(output), Path(check) / "hf")
        return compare(folder, Path(check) / "hf")


def compare(source, copy):
    """Compare two Hugging Face folders tensor by tensor: (number compared, [(tensor, what differs), ...])."""
    want, have = tensors(source), tensors(copy)
    different = [(name, "missing") for name in want.keys() - have.keys()]
    different += [(name, "not in the source") for name in have.keys() - want.keys()]
    for name in sorted(want.keys() & have.keys()):
        if want[name][1:] != have[name][1:]:
            different.append((name, f"{want[name][1:]} became {have[name][1:]}"))
            continue
        with safe_open(want[name][0], framework="pt") as a, safe_open(have[name][0], framework="pt") as b:
            if not torch.equal(a.get_tensor(name).view(torch.uint8), b.get_tensor(name).view(torch.uint8)):
                different.append((name, "other values"))
    return len(want.keys() & have.keys()), sorted(different)


def export_weights(checkpoint, output):
    """Write a checkpoint's weights, and NeMo's idea of the rest, as a Hugging Face folder."""
    own = exporter(checkpoint)
    own(output_path=Path(output))


def export(checkpoint, output):
    """Export `checkpoint` to the Hugging Face folder `output` and read it back.

    Returns (number of tensors, [(tensor or file, what is wrong), ...]).
    """
    export_weights(checkpoint, output)
    assets = models.tokenizer_folder(checkpoint)
    written = json.loads((output / "config.json").read_text(encoding="utf-8"))
    if (assets / "config.json").is_file():
        for name in checkpoints.ASSETS:
            (output / name).unlink(missing_ok=True)
        checkpoints.copy_assets(assets, output)
        own = json.loads((output / "config.json").read_text(encoding="utf-8"))
        dtype = written.get("dtype") or written.get("torch_dtype")
        key = "dtype" if "dtype" in own else "torch_dtype"
        if own.get(key) != dtype:  # trained in another precision than it was imported in
            own[key] = dtype
            (output / "config.json").write_text(json.dumps(own, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return check_export(output)


def check_export(output):
    """Load an export as a user will: (number of tensors, [(name, what is wrong), ...])."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = tensors(output)
    model, info = AutoModelForCausalLM.from_pretrained(output, dtype="auto", output_loading_info=True)
    bad = [(name, "missing from the export") for name in info["missing_keys"]]
    bad += [(name, "unknown to transformers") for name in info["unexpected_keys"]]
    bad += [(name, "another shape than config.json says") for name, *_ in info["mismatched_keys"]]
    bad += [(name, "not a finite number") for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if len(AutoTokenizer.from_pretrained(output)) > model.get_input_embeddings().num_embeddings:
        bad.append(("tokenizer.json", "has more entries than the model has embedding rows"))
    return len(found), bad


def merge(adapter, output):
    """Merge a LoRA checkpoint into its base model: a full NeMo 2 checkpoint in `output`."""
    llm.peft.merge_lora(str(adapter), str(output))
    _own_tokenizer(adapter, output)


def _own_tokenizer(source, output):
    """Put the source checkpoint's tokenizer files in place of those that NeMo's merge saved anew."""
    folder = models.tokenizer_folder(output)
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.copy_assets(models.tokenizer_folder(source), folder)

"""Conversion through the real NeMo on the CPU: the same tensors in both formats, ours and stock NeMo's."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from conftest import script

from nemo_tutorial import checkpoints

pytestmark = pytest.mark.nemo


def hf_tensors(folder):
    """{name: tensor} of a Hugging Face folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


def nemo_tensors(checkpoint):
    """{name: tensor} of a NeMo checkpoint, read by torch's own reader."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load

    entries = FileSystemReader(checkpoint / "weights").read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if hasattr(entry, "size")
    }
    load(tensors, storage_reader=FileSystemReader(checkpoint / "weights"), no_dist=True)
    return tensors


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].equal(tensor), name


@pytest.fixture
def imported(stages, tmp_path):
    """A copy of the imported tiny model, to damage."""
    return Path(shutil.copytree(stages / "nemo_ckpt/tiny", tmp_path / "tiny"))


def test_import_then_export_gives_the_same_model(stages, tmp_path):
    """Bit-equal tensors, equal papers, with the source folder gone; and both models compute the same."""
    source = Path(shutil.copytree(stages / "hf_model/tiny", tmp_path / "source"))
    hidden = stages / "hf_model/hidden"
    (stages / "hf_model/tiny").rename(hidden)
    flags = ["--source", "nemo_ckpt/tiny", "--output_path", tmp_path / "export", "--verify", "logits"]
    try:
        output = script(stages, "convert_ckpt/convert_from_nemo_to_hf.py", *flags, "--max_shard_size", "500KB").stdout
    finally:
        hidden.rename(stages / "hf_model/tiny")
    assert "21 read back and compared: all bit-equal" in output and "greedy tokens agree" in output
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 1
    assert_same(hf_tensors(tmp_path / "export"), hf_tensors(source))
    norms = [tensor for name, tensor in hf_tensors(source).items() if "norm" in name]
    assert norms and not any((norm == 1).all() for norm in norms)  # a norm left at its initial value would be seen
    for file in checkpoints.ASSETS:
        if (source / file).is_file():
            assert (tmp_path / "export" / file).read_bytes() == (source / file).read_bytes(), file


def test_import_is_what_stock_nemo_writes(stages, tmp_path):
    """Names, shapes, chunks and values of the checkpoint; stock NeMo exports ours, and we export stock NeMo's."""
    from nemo.collections import llm
    from torch.distributed.checkpoint import FileSystemReader

    from nemo_tutorial import conversion

    ours, stock, source = stages / "nemo_ckpt/tiny", tmp_path / "stock", stages / "hf_model/tiny"
    llm.LlamaModel.importer(f"hf://{source}")(output_path=stock)
    assert_same(nemo_tensors(ours), nemo_tensors(stock))
    entries = [FileSystemReader(path / "weights").read_metadata().state_dict_metadata for path in (ours, stock)]
    assert {k: getattr(v, "chunks", None) for k, v in entries[0].items()} == {
        k: getattr(v, "chunks", None) for k, v in entries[1].items()
    }
    llm.export_ckpt(ours, "hf", output_path=tmp_path / "by_stock")
    assert_same(hf_tensors(tmp_path / "by_stock"), hf_tensors(source))
    conversion.export(stock, tmp_path / "of_stock")
    assert_same(hf_tensors(tmp_path / "of_stock"), hf_tensors(source))


def test_a_changed_weight_shows(stages, imported):
    """One weight changed in the NeMo checkpoint, its checksum too, changes that one tensor of the export."""
    from nemo_tutorial import conversion

    norm = hf_tensors(stages / "hf_model/tiny")["model.norm.weight"]
    other = norm.clone()
    other[0] += 1
    old, new = (bytes(conversion.weights.bits(weight)) for weight in (norm, other))
    (file,) = [file for file in (imported / "weights").glob("*.distcp") if old in file.read_bytes()]
    data = file.read_bytes().replace(old, new)
    file.write_bytes(data.replace(struct.pack("<I", zlib.crc32(old)), struct.pack("<I", zlib.crc32(new))))
    _, different = conversion.compare(imported, stages / "hf_model/tiny")
    assert different == [("model.norm.weight", "other values")]


def test_verification_finds_a_changed_source(stages, tmp_path, imported):
    """Every tensor of the Hugging Face side, one bit flipped in each in turn, is named."""
    from nemo_tutorial import conversion

    source = Path(shutil.copytree(stages / "hf_model/tiny", tmp_path / "source"))
    (file,) = source.glob("*.safetensors")
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, entry in header.items():
        at = 8 + length + entry["data_offsets"][0]
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert conversion.compare(imported, source)[1] == [(name, "other values")]


@pytest.mark.parametrize("what", ["flipped", "truncated", "missing"])
def test_damage_is_named(imported, tmp_path, what):
    """Every file of a checkpoint, damaged in turn: the export is refused, naming it, and nothing is written."""
    from nemo_tutorial import conversion

    files = [file for file in sorted(imported.rglob("*")) if file.is_file() and file.name != checkpoints.MANIFEST]
    assert len(files) > 10
    for file in files:
        data = file.read_bytes()
        if what == "missing":
            file.unlink()
        else:
            middle = len(data) // 2
            file.write_bytes(data[:middle] + (bytes([data[middle] ^ 4]) + data[middle + 1 :]) * (what == "flipped"))
        said = checkpoints.problem(imported)
        if said is None:  # only weights are too large to be hashed every time
            assert file.suffix == ".distcp" and what == "flipped"
            with pytest.raises(ValueError) as error:
                conversion.export(imported, tmp_path / "export")
            said = str(error.value)
            shutil.rmtree(tmp_path / "export", ignore_errors=True)
        assert file.name in said, (file, said)
        file.write_bytes(data)
    assert checkpoints.problem(imported) is None

"""Conversion through the real NeMo on the CPU: the same tensors in both formats, ours and stock NeMo's."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from conftest import ROOT, script

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
    assert "21 read back and compared: all bit-equal" in output and "greedy tokens" in output
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


# Imports NeMo once; each line of its input is then a command, run in a process of its own (fork): a script, its
# flags, after how many seconds it is killed (0: never), the largest file it may write (0: any). Prints the exit codes.
MANY = """
import importlib.util, json, os, resource, signal, sys, time
from nemo_tutorial import conversion
for line in sys.stdin:
    script, flags, seconds, limit = json.loads(line)
    child = os.fork()
    if not child:
        out = os.open("many.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            spec = importlib.util.spec_from_file_location("script", script)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.main(flags)
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(99)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """many(script, flags, seconds=0, limit=0): (exit code, what it said), in a folder of its own: many.folder."""
    folder = tmp_path_factory.mktemp("many")
    process = subprocess.Popen(
        [sys.executable, "-c", MANY],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def call(name, flags, seconds=0.0, limit=0):
        (folder / "many.log").write_text("")
        process.stdin.write(json.dumps([str(ROOT / name), list(map(str, flags)), seconds, limit]) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), (folder / "many.log").read_text()

    call.folder = folder
    yield call
    process.stdin.close()
    process.wait()


def conversions(stages, folder):
    """(script, flags, how to see that the output is whole) of an import and an export."""
    return {
        "import": (
            "convert_ckpt/convert_from_hf_to_nemo.py",
            ["--source", stages / "hf_model/tiny", "--output_path", folder / "import"],
            lambda path: checkpoints.problem(path) is None and checkpoints.damage(path) is None,
        ),
        "export": (
            "convert_ckpt/convert_from_nemo_to_hf.py",
            ["--source", stages / "nemo_ckpt/tiny", "--output_path", folder / "export"],
            lambda path: hf_tensors(path).keys() == hf_tensors(stages / "hf_model/tiny").keys(),
        ),
    }


@pytest.mark.parametrize("what", ["import", "export"])
def test_killed_at_twenty_moments(stages, many, what):
    """SIGKILL, at moments spread over the run: the target is absent or whole, and so is a replaced one."""
    import time

    name, flags, whole = conversions(stages, many.folder)[what]
    target = many.folder / what
    assert many(name, flags)[0] == 0  # the first waits for the import of NeMo
    began = time.monotonic()
    assert many(name, [*flags, "--overwrite"])[0] == 0
    seconds = time.monotonic() - began
    killed = remains = 0
    for moment in range(20):
        if moment % 4 == 1:
            shutil.rmtree(target, ignore_errors=True)
        old = target.exists()
        code, said = many(name, [*flags, "--overwrite"], seconds * (moment + 0.5) / 20)
        killed += code == -9
        remains += "earlier run was killed" in said
        if old or target.exists():
            replaced = target.with_name(f".{target.name}.replaced")
            assert whole(target if target.exists() else replaced), (moment, said)
    assert killed >= 10 and remains >= 3, (killed, remains, seconds)
    code, said = many(name, [*flags, "--overwrite"])
    assert code == 0 and whole(target), said
    assert [path.name for path in many.folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("what", ["import", "export"])
def test_full_disk(stages, many, what):
    """No file may grow beyond 1 MB: exit 1 and the reason; the old output stays, and nothing half-written."""
    name, flags, whole = conversions(stages, many.folder)[what]
    target = many.folder / what
    assert many(name, [*flags, "--overwrite"])[0] == 0
    before = {file: file.read_bytes() for file in target.rglob("*") if file.is_file()}
    code, said = many(name, [*flags, "--overwrite"], limit=1_000_000)
    assert code == 1 and "File too large" in said and "nothing was written" in said, said
    assert {file: file.read_bytes() for file in target.rglob("*") if file.is_file()} == before
    shutil.rmtree(target)
    assert many(name, flags, limit=1_000_000)[0] == 1
    assert not target.exists() and not list(many.folder.glob(".*"))


def test_two_at_once(stages, many):
    """The second of two conversions to one place is refused, and says why; a lock without a holder is no obstacle."""
    name, flags, _ = conversions(stages, many.folder)["import"]
    shutil.rmtree(many.folder / "import", ignore_errors=True)
    with checkpoints.published(many.folder / "import") as partial:
        partial.mkdir()
        code, said = many(name, flags)
        assert code == 1 and "being written by another process" in said
        (partial / "notes.txt").write_text("a stranger's")
    code, said = many(name, [*flags, "--overwrite"])
    assert code == 2 and "choose another" in said
    assert (many.folder / "import/notes.txt").read_text() == "a stranger's"
    shutil.rmtree(many.folder / "import")
    (many.folder / ".import.lock").touch()
    assert many(name, flags)[0] == 0

"""Conversion through the real NeMo on the CPU: the same tensors in both formats, ours and stock NeMo's."""

import gc
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from conftest import ROOT, script, touching

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


def test_four_threads_write_the_same(stages, tmp_path, monkeypatch):
    """As for larger models: the same tensors, in four files; what fails in one of the threads fails the import."""
    from nemo_tutorial import conversion, models, weights

    source = stages / "hf_model/tiny"
    monkeypatch.setattr(weights.Streamed, "SMALL", 0)
    conversion.import_model(source, models.from_hf(source), tmp_path / "four")
    assert len(list((tmp_path / "four/weights").glob("*.distcp"))) == 4
    assert_same(nemo_tensors(tmp_path / "four"), nemo_tensors(stages / "nemo_ckpt/tiny"))
    made = weights.Table.tensor

    def full_disk(table, source, name):
        if name.endswith("layers.1.mlp.linear_fc2.weight"):
            raise OSError(28, "No space left on device")
        return made(table, source, name)

    monkeypatch.setattr(weights.Table, "tensor", full_disk)
    with pytest.raises(OSError, match="No space left"):
        conversion.import_model(source, models.from_hf(source), tmp_path / "failed")


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
    """Every file of a checkpoint, damaged in turn: every later stage's check names it, and the tensor if it is one."""
    from nemo_tutorial import conversion, weights

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
            before_training = weights.problem(imported)
            for sentence in (said, before_training):
                assert "module." in sentence and "its checksum is another" in sentence
            assert file.name in before_training
        assert file.name in said, (file, said)
        file.write_bytes(data)
    assert checkpoints.problem(imported) is None and weights.problem(imported) is None


def test_any_flipped_bit_of_the_weights_shows(imported):
    """At a hundred places of the files of weights, padding and headers too; without a manifest, in any tensor."""
    import random

    from nemo_tutorial import weights

    chosen = random.Random(4)
    (file,) = (imported / "weights").glob("*.distcp")
    data = file.read_bytes()
    for place in [*range(0, 400, 20), *(chosen.randrange(len(data)) for _ in range(80))]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert file.name in weights.problem(imported), place
        with pytest.raises(ValueError, match=file.name), checkpoints.unchanged(imported):
            pass
    (imported / checkpoints.MANIFEST).unlink()
    entries = weights.Megatron(imported)
    for (key, _), info in list(entries._data.items()):
        place = info.offset + info.length // 2
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert key in weights.problem(imported)
    file.write_bytes(data)
    assert weights.problem(imported) is None


@pytest.mark.parametrize("stage", ["pretraining/pretrain.py", "finetuning/finetune.py"])
def test_training_refuses_a_damaged_model(stages, imported, many, write_rows, stage):
    """One flipped bit in the weights: exit 2, with file and tensor, and nothing is started."""
    (file,) = (imported / "weights").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    rows = many.folder / "rows"
    if not rows.exists():
        write_rows(rows, 32, 8)
    flags = ["--nemo_model", imported, "--seq_length", 128, "--global_batch_size", 8, "--max_steps", 2]
    data = ["--split", "90,10,0", "--dataset_path", stages / "data/pre"] if "pre" in stage else ["--dataset_path", rows]
    code, said = many(stage, [*flags, *data, "--experiment", "damaged"])
    assert code == 2 and "nothing was started" in said, said
    assert file.name in said and "module." in said and "its checksum is another" in said
    assert not (many.folder / "results").exists()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_export_in_another_dtype(stages, many, dtype):
    """The weights cast, compared as such, named in config.json; transformers loads it and says a sentence."""
    import torch

    output = many.folder / dtype
    flags = ["--source", stages / "nemo_ckpt/tiny", "--output_path", output, "--dtype", dtype]
    code, said = many("convert_ckpt/convert_from_nemo_to_hf.py", flags)
    assert code == 0 and f"21 read back and compared: all bit-equal as {dtype}" in said, said
    assert "sentence" in said and "The capital of Taiwan is" in said
    source = hf_tensors(stages / "hf_model/tiny")
    assert_same(hf_tensors(output), {name: tensor.to(getattr(torch, dtype)) for name, tensor in source.items()})
    config = json.loads((output / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype


def test_a_cast_that_overflows_is_refused():
    import torch

    from nemo_tutorial import weights

    with pytest.raises(ValueError, match=r"w has values too large for torch.float16, up to 1e\+05"):
        weights.cast("w", torch.tensor([1.0, -1e5]), torch.float16)
    assert weights.cast("w", torch.tensor([1.0, torch.inf]), torch.float16).isinf().any()  # it was infinite before


def test_what_the_config_says_survives_training(stages, tmp_path):
    """Fields that NeMo does not keep, or sets to the run's: the export of a trained checkpoint has the source's."""
    from nemo_tutorial import conversion, models

    source = Path(shutil.copytree(stages / "hf_model/tiny", tmp_path / "source"))
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    fields = {"eos_token_id": [1, 2, 3], "bos_token_id": 0, "max_position_embeddings": 131072, "rope_scaling": rope}
    config = json.loads((source / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3], "temperature": 0.6}))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    conversion.import_model(source, models.from_hf(source), tmp_path / "nemo")
    context = tmp_path / "nemo/context/io.json"
    short = context.read_text().replace("131072", "128")  # as after a run with --seq_length 128
    assert short != context.read_text()
    context.write_text(short)
    conversion.export(tmp_path / "nemo", tmp_path / "back")
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
(Path(__file__).parents[0] / "ran").touch()
Path({log!r}).touch()
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def test_remote_code(stages, many, tmp_path):
    """A model with code of its own is refused, naming the flag; with it, the tokenizer's is run and carried."""
    ran = tmp_path / "ran"
    source = Path(shutil.copytree(stages / "hf_model/tiny", tmp_path / "source"))
    for name, entry in (
        ("config.json", {"AutoModelForCausalLM": "modeling_own.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "tokenization_own.Tokenizer"]}),
    ):
        file = source / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": entry}))
    (source / "tokenization_own.py").write_text(TOKENIZER.format(log=str(ran)))
    (source / "modeling_own.py").write_text("raise RuntimeError('the code of the model')")
    flags = ["--source", source, "--output_path", many.folder / "own"]
    code, said = many("convert_ckpt/convert_from_hf_to_nemo.py", flags)
    assert code == 2 and "auto_map" in said and "--trust_remote_code" in said and not ran.exists(), said
    code, said = many("convert_ckpt/convert_from_hf_to_nemo.py", [*flags, "--trust_remote_code"])
    assert code == 0 and ran.exists(), said
    flags = ["--source", many.folder / "own", "--output_path", many.folder / "own_hf"]
    ran.unlink()
    code, said = many("convert_ckpt/convert_from_nemo_to_hf.py", flags)
    assert code == 2 and "auto_map" in said and "--trust_checkpoint" in said and not ran.exists(), said
    code, said = many("convert_ckpt/convert_from_nemo_to_hf.py", [*flags, "--trust_checkpoint"])
    assert code == 0, said
    assert_same(hf_tensors(many.folder / "own_hf"), hf_tensors(source))
    for name in ("config.json", "tokenizer_config.json", "tokenization_own.py", "modeling_own.py"):
        assert (many.folder / "own_hf" / name).read_bytes() == (source / name).read_bytes(), name


def test_no_shared_folder_is_touched(stages, tmp_path, monkeypatch):
    """/tmp/nemo_tokenizer, where stock NeMo puts everyone's tokenizer, is neither read nor written; nothing stays."""
    from nemo_tutorial import conversion, models

    source = stages / "hf_model/tiny"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # /tmp is also the other test process's
    with touching("/tmp/nemo_tokenizer") as touched:
        conversion.import_model(source, models.from_hf(source), tmp_path / "nemo")
        conversion.export(tmp_path / "nemo", tmp_path / "back")
    assert touched == []
    gc.collect()
    assert not list((tmp_path / "temporary").glob("nemo_tutorial_*"))


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
    seconds, killed, remains = math.inf, 0, 0
    for _ in range(3):
        began = time.monotonic()
        assert many(name, [*flags, "--overwrite"])[0] == 0
        seconds = min(seconds, time.monotonic() - began)  # one alone may have been slow by chance
    for moment in range(20):
        if moment % 4 == 1:
            shutil.rmtree(target, ignore_errors=True)
        old = target.exists()
        began = time.monotonic()
        code, said = many(name, [*flags, "--overwrite"], seconds * (moment + 0.5) / 20)
        if code == 0:  # it was faster still
            seconds = min(seconds, time.monotonic() - began)
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

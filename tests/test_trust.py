"""Checkpoints that would run something: each kind refused by name before anything of it is loaded, and nothing run."""

import contextlib
import copyreg
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict, deque
from pathlib import Path
from random import Random

import pytest
from conftest import script as run_script

from nemo_tutorial import pickles, trust

METADATA, COMMON, IO = "weights/.metadata", "weights/common.pt", "context/io.json"


def text(value):
    """A string in a pickle of protocol 4."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def called(module, name, *args):
    """A pickle that imports a name and calls it with strings."""
    arguments = b"".join(b"X" + len(arg.encode()).to_bytes(4, "little") + arg.encode() for arg in args)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + arguments + b"tR."


def zipped(**files):
    """A zip as torch.save writes it: `data_pkl` is archive/data.pkl."""
    return zip_of({f"archive/{name.replace('_', '.')}": content for name, content in files.items()})


def zip_of(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def pickled(canary):
    """Pickles that touch `canary` when they are loaded: {name: (bytes, what the refusal names)}."""
    touch = f"touch {canary}"
    short = text(touch)
    opened = b"X" + len(touch).to_bytes(4, "little") + touch.encode()
    return {
        "os.system": (called("os", "system", touch), "os.system"),
        "eval": (called("builtins", "eval", f"open({str(canary)!r}, 'w')"), "builtins.eval"),
        "strings from the memo": (
            b"\x80\x04" + text("system") + b"\x94" + text("os") + b"\x940" + b"0h\x01h\x00\x93" + short + b"\x85R.",
            "os.system",
        ),
        "INST": (b"(S'" + touch.encode() + b"'\nios\nsystem\n.", "opcode"),
        "OBJ": (b"\x80\x02(cos\nsystem\n" + opened + b"o.", "OBJ"),
        "protocol 0": (b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.", "STRING"),
        "getattr": (
            b"\x80\x02cbuiltins\ngetattr\n(cimportlib\nimport_module\nX\x02\x00\x00\x00os\x85RX\x06\x00\x00\x00systemtR"
            + opened
            + b"\x85R.",
            "builtins.getattr",
        ),
        "attrgetter": (
            b"\x80\x02coperator\nattrgetter\nX\x06\x00\x00\x00system\x85Rcos\n__builtins__\n0cimportlib\nimport_module\n"
            b"X\x02\x00\x00\x00os\x85R\x85R" + opened + b"\x85R.",
            "operator.attrgetter",
        ),
        "dotted": (
            b"\x80\x04" + text("pathlib") + text("os.system") + b"\x93" + short + b"\x85R.",
            "pathlib.os.system",
        ),
        "another name": (called("pathlib", "os", touch), "pathlib.os"),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n" + b"(" + b"X\x05\x00\x00\x00touch" + b"t\x81.", "subprocess.Popen"),
        "nested": (
            b"\x80\x04c_pickle\nloads\n"
            + b"B"
            + len(called("os", "system", touch)).to_bytes(4, "little")
            + called("os", "system", touch)
            + b"\x85R.",
            "os.system",
        ),
        "state of a class": (
            b"\x80\x02ccollections\nOrderedDict\n}X\x07\x00\x00\x00harmful" + b"K\x01sb.",
            "changes collections.OrderedDict",
        ),
        "what a call returns": (b"\x80\x02ccollections\ndeque\n)R)R.", "what another call returns"),
        "EXT": (b"\x80\x02\x82\xf0" + opened + b"\x85R.", "EXT1"),
        "buffers": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "cut off": (pickle.dumps({"a": list(range(9))}, 2)[:-9], "no whole pickle"),
        # Reading a file, Python's unpickler drops what stands before a frame's end, and takes a name of what follows.
        "frame": (b"\x80\x04\x95\x0c" + bytes(7) + b"cnumpy\nfloat" + b"load\n)R.", "frame"),
    }


RUNS = ("os.system", "eval", "strings from the memo", "INST", "OBJ", "protocol 0", "getattr", "dotted", "nested", "EXT")


@pytest.fixture
def checkpoint(nemo_checkpoint, tmp_path):
    return nemo_checkpoint(tmp_path / "ckpt")


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.mark.parametrize(
    "where", [METADATA, COMMON, "context/f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "weights/a/shard_0.pt"]
)
@pytest.mark.parametrize("kind", pickled("canary"))
def test_pickle(checkpoint, canary, kind, where):
    content, named = pickled(canary)[kind]
    assert trust.problems(checkpoint) == []
    (checkpoint / where).parent.mkdir(exist_ok=True)
    (checkpoint / where).write_bytes(content)
    if where.startswith("context"):  # looked at because it begins as a pickle, or because io.json says that it is one
        refer(checkpoint, Path(where).name)
    (problem, *_) = [said for said in trust.problems(checkpoint) if named in said]
    assert problem.startswith(where) and not canary.exists()


@pytest.mark.parametrize("kind", RUNS)
def test_the_pickles_above_are_real(canary, kind):
    """Python's own unpickler runs them."""
    copyreg.add_extension("os", "system", 0xF0)
    try:
        pickle.loads(pickled(canary)[kind][0])
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert canary.exists()


def test_torch_files(checkpoint, canary):
    """The zips and the older files of torch.save, and what is made to look like one to one reader only."""
    evil, good = called("os", "system", f"touch {canary}"), pickle.dumps({"a": 1}, protocol=2)
    legacy = b"".join(pickle.dumps(v, protocol=2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    state = pickle.dumps({"state": evil}, protocol=4)
    cases = [
        (zipped(data_pkl=evil), "os.system"),
        (zip_of({"a/data.pkl": good, "b/data.pkl": evil}), "b/data.pkl"),
        (zip_of({"a/data.pkl": good, "a/DATA.PKL": evil}), "DATA.PKL"),
        (zip_of({"a/data.pkl": good, "a/constants.pkl": good}), "constants.pkl"),
        (zip_of({"a/data.pkl": good, "a/code/m.py": b"import os"}), "code/m.py"),
        (zip_of({"a/data.pkl": good, "a/data/0": evil}), "os.system"),
        (zip_of({"a/data.pkl": good, "a/byteorder": b"big"}), "swapped"),
        (zipped(data_pkl=good) + zipped(data_pkl=evil), "zip"),
        (zipped(data_pkl=good)[:-30], "zip"),
        (zipped(data_pkl=state), "os.system"),
        (legacy + evil + pickle.dumps([]), "os.system"),
        (legacy + good + pickle.dumps([]), None),
        (zipped(data_pkl=good, version=b"3\n", byteorder=b"little"), None),
    ]
    for content, named in cases:
        (checkpoint / COMMON).write_bytes(content)
        found = trust.problems(checkpoint)
        assert (found == []) if named is None else any(said.startswith(COMMON) and named in said for said in found), (
            named
        )
    with zipfile.ZipFile(checkpoint / COMMON, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", good * 50)
    assert "zip" in trust.problems(checkpoint)[0]
    assert not canary.exists()


def edit(checkpoint, change):
    content = json.loads((checkpoint / IO).read_text())
    change(content["objects"])
    (checkpoint / IO).write_text(json.dumps(content))


def pyref(module, name):
    return {"type": "pyref", "module": module, "name": name}


def refer(checkpoint, file):
    """An object as NeMo has one that it pickled: its only value is the name of the file."""
    kind = pyref("nemo.utils.exp_manager", "TimingCallback")
    edit(checkpoint, lambda o: o.update(t={"type": kind, "items": [["IdentityElement()", file]], "metadata": None}))


@pytest.mark.parametrize(
    "pair",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "os.system"),
        ("torch", "load"),
        ("nemo.collections.llm.gpt.model.llama", "os.system"),
        ("nemo.collections.llm.gpt.model.llama", "LlamaConfig.__init__.__globals__"),
        ("nemo.collections.common.tokenizers.tabular_tokenizer", "TabularTokenizer"),
        ("nemo.collections.llm.gpt.data.hf_dataset", "HFDatasetDataModule"),
        ("nemo_tutorial.prompts", "Chat"),
        ("nemo_tutorial.callbacks", "Metrics.open"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("transformers", "AutoModel.from_pretrained"),
        ("collections\n", "OrderedDict"),
    ],
)
@pytest.mark.parametrize("place", ["called", "value", "type", "unused"])
def test_name_in_io_json(checkpoint, pair, place):
    """Wherever it stands: called, only referred to, a type, or in an object that nothing uses."""

    def change(objects):
        key = next(key for key in objects if key.startswith("llamamodel"))
        if place == "called":
            objects[objects[key]["metadata"]["key"]]["items"][0][1] = pyref(*pair)
        elif place == "value":
            objects[key]["items"][0][1] = pyref(*pair)
        elif place == "type":
            objects[key]["type"] = pyref(*pair)
        else:
            objects["other"] = {"type": pyref(*pair), "items": [], "metadata": None, "paths": []}

    edit(checkpoint, change)
    problem = trust.problems(checkpoint)[0]
    assert problem.startswith(IO) and pair[1] in problem and "\n" not in problem


def test_other_ways_in_io_json(checkpoint, canary, tmp_path):
    """A pickle elsewhere, one with a harmless name, and a tokenizer's code, whatever the labels of items say."""
    evil = called("os", "system", f"touch {canary}")
    (tmp_path / "evil.txt").write_bytes(evil)
    for file in ("../../evil.txt", str(tmp_path / "evil.txt"), "no-such-file"):
        refer(checkpoint, file)
        assert file in trust.problems(checkpoint)[0]
    (checkpoint / "context/nemo_tokenizer/vocab.txt").write_bytes(evil[2:])  # no pickle's first bytes
    refer(checkpoint, "nemo_tokenizer/vocab.txt")
    assert trust.problems(checkpoint) == ["context/nemo_tokenizer/vocab.txt names os.system"]
    edit(checkpoint, lambda objects: objects.pop("t"))

    def tokenizer(*values):
        def change(objects):
            key = next(key for key in objects if key.startswith("autotokenizer"))
            names = objects[objects[key]["metadata"]["key"]]["items"][1][1]
            names["items"] = [["", "pretrained_model_name"], ["", "trust_remote_code"]]
            objects[key]["items"] = [["Attr(name='use_fast')", value] for value in values]

        edit(checkpoint, change)
        return trust.problems(checkpoint)

    assert tokenizer("owner/model", False) == [] == tokenizer("nemo_tokenizer", {"type": "leaf", "value": True})
    assert "owner/model" in tokenizer("owner/model", {"type": "leaf", "value": True})[0]
    assert "evil" in tokenizer("../../evil", True)[0]
    before = (checkpoint / IO).read_text()
    for hidden in ("type", "names"):  # what stands for the metadata gives the names in another way

        def hide(objects, hidden=hidden):
            key = next(key for key in objects if key.startswith("autotokenizer"))
            metadata = objects[objects[key]["metadata"]["key"]]
            if hidden == "type":
                metadata["type"] = pyref("fiddle._src.config", "Config")
            else:
                metadata["items"][1][1] = {"type": "leaf", "value": "ab"}

        edit(checkpoint, hide)
        assert trust.problems(checkpoint)[0].startswith(IO)
        (checkpoint / IO).write_text(before)
    config = checkpoint / "context/nemo_tokenizer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": "own.Own"}}))
    assert "nemo_tokenizer" in tokenizer("nemo_tokenizer", True)[0]
    assert tokenizer("nemo_tokenizer", False) == []  # transformers has a class of its own for it
    (config.parent / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}}')
    assert "auto_map" in tokenizer("nemo_tokenizer", False)[0]


def test_links_and_other_files(checkpoint, tmp_path):
    """Links out of the checkpoint, what is no file, and tags of YAML; a link within it is fine."""
    (tmp_path / "elsewhere").mkdir()
    shutil.move(checkpoint / COMMON, tmp_path / "elsewhere/common.pt")
    (checkpoint / COMMON).symlink_to(tmp_path / "elsewhere/common.pt")
    (checkpoint / "context/more").symlink_to("../../elsewhere")
    os.mkfifo(checkpoint / "context/pipe.pkl")
    (checkpoint / "context/link.json").symlink_to("io.json")
    (checkpoint / "context/model.yaml").write_text("config:\n  a: !!python/object/apply:os.system ['true']\n")
    (checkpoint / "context/other.yaml").write_text("%TAG !p! tag:yaml.org,2002:\n---\na: !p!python/name:os.system\n")
    found = trust.problems(checkpoint)
    for name, reason in [
        ("weights/common.pt", "leads out"),
        ("context/more", "leads out"),
        ("context/pipe.pkl", "neither"),
        ("context/model.yaml", "python/object/apply"),
        ("context/other.yaml", "TAG"),
    ]:
        assert any(said.startswith(name) and reason in said for said in found), (name, found)
    assert len(found) == 5


@pytest.mark.parametrize("flag", [[], ["--trust_checkpoint"]], ids=["", "trusted"])
def test_every_script_that_loads_one(nemo_checkpoint, write_rows, write_index, canary, tmp_path, flag):
    """Refused in one sentence with file, name and flag, before anything is started; with the flag, warned about."""
    good, evil = nemo_checkpoint(tmp_path / "good"), nemo_checkpoint(tmp_path / "evil")
    run = nemo_checkpoint(tmp_path / "results/resumed/checkpoints/m--val_loss=1.00-step=1-consumed_samples=2.0")
    adapters = [nemo_checkpoint(tmp_path / f"lora_of_{base.name}", base=base) for base in (good, evil)]
    adapters.append(nemo_checkpoint(tmp_path / "evil_lora", base=good))
    for path in (evil, run, adapters[2]):
        (path / METADATA).write_bytes(called("os", "system", f"touch {canary}"))
    rows, data = write_rows(tmp_path / "rows", 50, 50), write_index(tmp_path / "pre/text_document", [100] * 500)
    layout = ["--num_gpus", "1", "--global_batch_size", "2", "--seq_length", "128", "--max_steps", "9", "--dry_run"]
    pretrain = ["pretraining/pretrain.py", "--dataset_path", data, "--split", "9,1,0", *layout]
    commands = [
        [*pretrain, "--nemo_model", evil],
        [*pretrain, "--experiment", "resumed"],
        ["finetuning/finetune.py", "--dataset_path", rows, *layout, "--nemo_model", evil],
        ["convert_ckpt/convert_from_nemo_to_hf.py", "--source", evil, "--output_path", "out", "--dry_run"],
        ["finetuning/merge_lora.py", "--source", adapters[1], "--output_path", "out", "--dry_run"],
        ["finetuning/merge_lora.py", "--source", adapters[2], "--output_path", "out", "--dry_run"],
    ]
    for command in commands:
        done = run_script(tmp_path, *command, *flag, check=False)
        assert done.returncode == (0 if flag else 2), done.stderr
        assert "weights/.metadata names os.system" in done.stderr and "--trust_checkpoint" in done.stderr
        assert ("warning" if flag else "1 problem") in done.stderr
    assert not canary.exists()
    for command in (["--nemo_model", good], ["--nemo_model", good, "--trust_checkpoint"]):
        done = run_script(tmp_path, *pretrain, *command)
        assert "would run" not in done.stderr


def test_advisories(monkeypatch):
    """One line, of the versions that lack a fix only; the latest fix is named first, as that has the others too."""
    versions = {"nemo_toolkit": "3.0.0", "megatron-core": "0.17.1"}
    monkeypatch.setattr("importlib.metadata.version", versions.__getitem__)
    assert trust.advisories() is None
    versions |= {"nemo_toolkit": "2.6.2"}
    said = trust.advisories()
    assert "2.6.2" in said and "CVE-2026-65178" in said and "CVE-2026-24228" in said and "2.7.3" in said
    assert "CVE-2026-24157" not in said and "megatron" not in said
    versions |= {"nemo_toolkit": "2.3.1rc0+abc", "megatron-core": "0.15.3"}
    said = trust.advisories()
    assert "\n" not in said and "CVE-2026-65110" in said and "CVE-2026-24152" not in said
    assert len(said) < 700


def metadata_of(entries, stored, kind="state"):
    """A .metadata, by opcodes: names, then the objects as torch makes them, or (`kind`) in a way that hides some."""
    package = "torch.distributed.checkpoint"
    kinds = {
        "Tensor": (f"{package}.metadata", "TensorStorageMetadata"),
        "Bytes": (f"{package}.metadata", "BytesStorageMetadata"),
    }

    def value(thing):
        return re.sub(rb"q[\x00-\x02]", b"", pickle.dumps(thing, protocol=2)[2:-1])

    def made(name, **state):
        items = b"".join(value(key) + (it if isinstance(it, bytes) else value(it)) for key, it in state.items())
        return b"c" + "\n".join(name).encode() + b"\n)\x81}(" + items + b"ub"

    first = b"".join(value(key) + made(kinds[entry]) for key, entry in entries)
    second = b""
    for key, offset, place in stored:
        index = made((f"{package}.metadata", "MetadataIndex"), fqn=key, **({"offset": (0,)} if offset else {}))
        info = dict(zip(("relative_path", "offset", "length"), place))
        second += index + made((f"{package}.filesystem", "_StorageInfo"), **info)
    first, second = b"}(" + first + b"u", b"}(" + second + b"u"
    name = (f"{package}.metadata", "Metadata")
    if kind == "arguments":
        return b"\x80\x02c" + "\n".join(name).encode() + b"\n(" + first + b"N" + second + b"t\x81."
    whole = b"\x80\x02" + made(name, state_dict_metadata=first, storage_data=second)
    return whole + (b"}X\x04\x00\x00\x00moreK\x01sb." if kind == "set twice" else b".")


def test_objects_hidden_in_metadata(checkpoint, canary):
    """However .metadata says that an object, not a tensor, lies in a *.distcp file: it is looked at, or refused."""
    evil = zipped(data_pkl=called("os", "system", f"touch {canary}"))
    (checkpoint / "weights/__0_0.distcp").write_bytes(evil)
    place = ("__0_0.distcp", 0, len(evil))
    for entries, stored, kind, named in [
        ([("a", "Tensor")], [("a", True, place)], "state", None),  # torch's own unpickler reads it, of tensors only
        ([("a", "Bytes")], [("a", False, place)], "state", "os.system"),
        ([("a", "Tensor"), ("a", "Bytes")], [("a", True, place)], "state", "os.system"),
        ([("a", "Tensor")], [("a", False, place)], "state", "os.system"),
        ([], [("a", True, place)], "state", "os.system"),
        ([("a", "Bytes")], [("a", False, place)], "set twice", "os.system"),
        ([("a", "Bytes")], [("a", False, place)], "arguments", "another way"),
        ([("a", "Bytes")], [("a", False, ("../../evil", 0, 9))], "state", "../../evil"),
        ([("a", "Bytes")], [("a", False, ("missing", 0, 9))], "state", "missing"),
    ]:
        (checkpoint / METADATA).write_bytes(metadata_of(entries, stored, kind))
        found = trust.problems(checkpoint)
        assert (found == []) if named is None else (found and named in found[0]), (entries, kind, found)
    assert not canary.exists()


def test_bytes_of_transformer_engine(checkpoint, canary):
    """What it unpickles once more must be there as it is, not put together or encoded when it is loaded."""
    evil = called("os", "system", f"touch {canary}")[2:]  # without a pickle's first bytes
    numbers = b"(" + b"".join(b"K" + bytes([byte]) for byte in evil) + b"l"
    inside = {
        "bytes": b"C" + bytes([len(evil)]) + evil,
        "latin1": b"c_codecs\nencode\nX" + len(evil).to_bytes(4, "little") + evil + b"X\x06\x00\x00\x00latin1\x86R",
        "another encoding": b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf16\x86R",
        "put together": b"cbuiltins\nbytearray\n" + numbers + b"\x85R",
    }
    for kind, content in inside.items():
        for end in (content + b"\x85R.", b")\x81" + content + b"K\x00N\x87b."):
            saved = b"\x80\x04c_io\nBytesIO\n" + end
            whole = zipped(data_pkl=saved)
            (checkpoint / "weights/__0_0.distcp").write_bytes(whole)
            key = "module.layer._extra_state/shard_0_1"
            stored = [(key, False, ("__0_0.distcp", 0, len(whole)))]
            (checkpoint / METADATA).write_bytes(metadata_of([(key, "Bytes")], stored))
            assert trust.problems(checkpoint), kind
    empty = zipped(data_pkl=b"\x80\x04c_io\nBytesIO\n)\x81C\x00K\x00N\x87b.")
    (checkpoint / "weights/__0_0.distcp").write_bytes(empty)
    stored = [(key, False, ("__0_0.distcp", 0, len(empty)))]
    (checkpoint / METADATA).write_bytes(metadata_of([(key, "Bytes")], stored))
    assert trust.problems(checkpoint) == []


def test_a_name_across_the_end_of_a_frame():
    """Why that is refused: Python's unpickler asks for another name than the one that stands there."""
    asking = Asking(io.BytesIO(pickled("canary")["frame"][0]))
    with contextlib.suppress(pickle.UnpicklingError):  # a Python that sees through it is welcome
        asking.load()
    assert asking.names <= {("numpy", "load")} and ("numpy", "floatload") in trust.PICKLED


class Stub:
    """What Python's unpickler is given for every name, so that nothing is imported."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args):
        return self

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass


class Asking(pickle.Unpickler):
    """Python's unpickler, which notes the names that it asks for. It reads opcodes by frames, as files are read."""

    def __init__(self, file):
        super().__init__(file)
        self.names = set()

    def find_class(self, module, name):
        self.names.add((module, name))
        return Stub

    def persistent_load(self, key):
        return Stub()


def test_no_pickle_asks_for_a_name_that_is_not_told():
    """Twenty thousand broken pickles: what Python's unpickler asks for before it stops is told, or the file refused."""
    random = Random(1)
    values = [
        1,
        2.5,
        None,
        True,
        b"x" * 300,
        "台灣",
        2**70,
        Path("x"),
        OrderedDict(a={1, 2}),
        deque([3]),
        {"a": (1, [])},
    ]
    whole = [pickle.dumps([value, values], protocol) for value in values for protocol in range(6)]
    whole += [content for content, _ in pickled("canary").values()]
    told = refused = 0
    for _ in range(20_000):
        data = bytearray(random.choice(whole))
        for _ in range(random.randint(1, 6)):
            at, kind = random.randrange(len(data)), random.random()
            if kind < 0.4:
                data[at] = random.choice(b"\x80\x93\x94hqjrR(tu012be.cio}]\x81\x85\x86\x8c" + random.randbytes(1))
            elif kind < 0.6:
                del data[at : at + random.randint(1, 4)]
            else:
                other = random.choice(whole)
                start = random.randrange(len(other))
                data[at:at] = other[start : start + random.randint(1, 40)]
            data = data.replace(b"r", b"q") or bytearray(b".")  # LONG_BINPUT can take all memory, in Python's
        file = io.BytesIO(data)  # torch's own; a BufferedReader, which has more methods, is what open() gives
        asking, scan = Asking(random.choice([file, io.BufferedReader(file)])), pickles.Scan()
        try:
            asking.load()
        except Exception:  # any, from broken pickles
            pass
        try:
            scan.file(bytes(data))
        except pickles.Unreadable:
            refused += 1
            continue
        told += 1
        assert asking.names <= scan.names.keys(), bytes(data)
    assert told > 1000 and refused > 1000

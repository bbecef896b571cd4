"""data/preprocess_data_for_megatron.py: the bytes of NeMo's script, from any input, whatever happens on the way."""

import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zoo
from conftest import ROOT

from nemo_tutorial import dataset_report, dataset_writer, documents, megatron_data, tokenization, workers

SCRIPT = "data/preprocess_data_for_megatron.py"
TEXTS = [
    "玉山是台灣最高的山。",
    "a\tb  c\n\nd",
    "",
    "<|eot_id|> x<|begin_of_text|>",
    " lead and trail ",
    "I'm 12345 é 🇹🇼",
    "\u0000",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return zoo.make("llama3", tmp_path_factory.mktemp("zoo") / "llama3")


@pytest.fixture
def preprocess(load_script, tmp_path, tokenizer, monkeypatch):
    """Run the script in `tmp_path`, here: the bytes of its .bin and .idx. `code` is the exit code that must come."""
    monkeypatch.chdir(tmp_path)

    def run(inputs, *flags, prefix="out/a", name=tokenizer, code=0):
        argv = ["--input", *map(str, inputs), "--tokenizer_type", str(name), "--output_prefix", prefix, "--append_eod"]
        try:
            load_script(SCRIPT).main([*argv, *flags])
        except SystemExit as stop:
            assert stop.code == code
        else:
            assert code == 0
        return dataset(prefix) if code == 0 else None

    return run


def dataset(prefix, key="text"):
    stem = dataset_writer.final(prefix, key)
    return Path(f"{stem}.bin").read_bytes(), Path(f"{stem}.idx").read_bytes()


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def large(path, megabytes):
    """JSON lines of that size, no document twice."""
    texts = list(zoo.made_tiny().sample_texts())
    generator = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6:
            words = " ".join(generator.choice(texts) for _ in range(20))
            file.write(json.dumps({"text": f"{generator.random()} {words}"}, ensure_ascii=False) + "\n")
    return path


# The bytes.


def peers_files(folder, name, texts, add_bos):
    """What NeMo's script writes, and with `add_bos` Megatron-LM's: their loops, NeMo's tokenizer, Megatron's files."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from nemo.collections.common.tokenizers import AutoTokenizer

    tokenizer = AutoTokenizer(str(name), use_fast=True, include_special_tokens=add_bos)
    builder = IndexedDatasetBuilder(str(folder / "peer.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        ids = tokenizer.text_to_ids(text)
        if ids:
            builder.add_item(torch.IntTensor([*ids, tokenizer.eos_id]))
        if ids or add_bos:
            builder.end_document()
    builder.finalize(str(folder / "peer.idx"))
    return (folder / "peer.bin").read_bytes(), (folder / "peer.idx").read_bytes()


@pytest.mark.nemo
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_bytes_are_the_peers(kind, preprocess, tmp_path, capfd):
    name = zoo.make(kind, tmp_path / kind)
    special = ["[CLS] a [SEP]", "<s> a </s><unk>", "<|endoftext|>x", "[INST] [MASK] <pad> 玉山 whole wholesome"]
    texts = [*TEXTS, *tokenization.AWKWARD, *special, *list(zoo.made_tiny().sample_texts())[:50], "   "]
    lines = write_lines(tmp_path / "in.jsonl", texts)
    assert preprocess([lines], name=name) == peers_files(tmp_path, name, texts, add_bos=False)
    assert preprocess([lines], "--add_bos", "--overwrite", name=name) == peers_files(
        tmp_path, name, texts, add_bos=True
    )
    assert ("fastokens does not read this tokenizer" in capfd.readouterr().err) == (
        kind in ("bert", "t5", "normalized")
    )


def test_every_form_and_several_inputs_give_the_same(preprocess, tmp_path):
    import datasets
    import pyarrow
    from pyarrow import parquet

    texts = [text for text in zoo.made_tiny().sample_texts() if "\n" not in text and text.strip() == text][:200]
    lines = write_lines(tmp_path / "a.jsonl", texts)
    expected = preprocess([lines], prefix="out/lines")
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress(lines.read_bytes()[:5000]) + gzip.compress(lines.read_bytes()[5000:])
    )
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(lines.read_bytes())
    table = pyarrow.table({"other": range(200), "text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    (tmp_path / "a.txt").write_text("\r\n".join(f"  {text} " for text in texts) + "\n\n", encoding="utf-8", newline="")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "saved"):
        assert preprocess([tmp_path / name], prefix=f"out/{name}") == expected, name
        record = json.loads(Path(f"out/{name}_text_document.json").read_text())
        assert record["documents"] == 200 and record["inputs"][0]["lines"] >= 200
    (tmp_path / "parts").mkdir()
    for number in range(4):
        write_lines(tmp_path / f"parts/{number}.jsonl", texts[50 * number : 50 * number + 50])
    assert preprocess(["parts/0.jsonl", "parts/[123].jsonl"], "--workers", "3", prefix="out/globs") == expected
    with parquet.ParquetFile(tmp_path / "a.parquet") as file:
        assert file.metadata.num_row_groups == 3


def test_a_file_pair_for_each_key(preprocess, tmp_path):
    rows = [{"text": f"台灣 {i}", "title": f"title {i}"} for i in range(9)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess(["in.jsonl"], "--json-keys", "title", "text", prefix="both")
    for key in ("title", "text"):
        write_lines(tmp_path / "one.jsonl", [row[key] for row in rows])
        assert preprocess(["one.jsonl"], "--overwrite", prefix="one") == dataset("both", key)


def test_report(preprocess, tmp_path, capfd):
    lines = write_lines(tmp_path / "in.jsonl", ["a b c", "d", "a b c", "", "a b c", "玉山" * 500])
    lines.write_text(lines.read_text(encoding="utf-8") + "\n   \n", encoding="utf-8")
    preprocess([lines])
    said = " ".join(capfd.readouterr().out.split())
    for part in ("documents 5 ", "duplicates 2 documents", "empty 2 lines, 1 documents", "by fastokens", "50 % 4,"):
        assert part in said, part
    record = json.loads(Path("out/a_text_document.json").read_text())
    assert record == megatron_data.record("out/a_text_document")
    index = megatron_data.read_index("out/a_text_document")
    assert (record["documents"], record["tokens"]) == (index.documents, index.tokens)
    assert Path("out/a_text_document.png").read_bytes().startswith(b"\x89PNG")
    assert record["inputs"][0]["lines"] == 8 and record["tokenizer"]["entries"] == 2048
    import xxhash

    assert record["inputs"][0]["xxh3_128_of_text"] == xxhash.xxh3_128_hexdigest(lines.read_bytes())
    assert not Path("out/a.partial").exists()


def test_numbers_too_many_for_memory_are_counted_in_slices(tmp_path, monkeypatch):
    import numpy

    generator = numpy.random.default_rng(0)
    hashes = generator.integers(0, 500, 3001).astype(numpy.uint64)
    lengths = generator.integers(0, 90, 3001).astype(numpy.int32)
    hashes.tofile(tmp_path / "hashes")
    lengths.tofile(tmp_path / "lengths")
    for size in (97, 4_000_000):
        monkeypatch.setattr(dataset_report, "SLICE", size)
        assert dataset_report.duplicates(tmp_path / "hashes") == 3001 - len(numpy.unique(hashes))
        values, counts = dataset_report.lengths_of(tmp_path / "lengths")
        assert (numpy.repeat(values, counts) == numpy.sort(lengths[lengths > 0])).all()
        for share in (0, 5, 50, 99, 100):
            expected = numpy.percentile(lengths[lengths > 0], share, method="inverted_cdf")
            assert dataset_report.percentile(values, counts, share) == expected


# The tokenizer.


def test_without_fastokens(preprocess, tmp_path, monkeypatch, capfd):
    lines = write_lines(tmp_path / "in.jsonl", TEXTS)
    expected = preprocess([lines])
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert preprocess([lines], prefix="out/b") == expected
    assert "fastokens is not installed here" in capfd.readouterr().err


def test_a_library_with_other_ids_is_not_used(preprocess, tmp_path, monkeypatch, capfd):
    """One wrong id in one text of the sample is seen, and said."""
    texts = [f"document {i}" for i in range(50)]
    lines = write_lines(tmp_path / "in.jsonl", texts)
    expected = preprocess([lines])
    load = tokenization.load

    def wrong(library, reference):
        encode = load(library, reference)

        def encode_wrongly(texts):
            ids, lengths = encode(texts)
            ids = ids.copy()
            ids[lengths[: texts.index("document 7")].sum() if "document 7" in texts else 0] += 1
            return ids, lengths

        return encode_wrongly if library == "fastokens" else encode

    monkeypatch.setattr(tokenization, "load", wrong)
    assert preprocess([lines], prefix="out/b") == expected
    assert "fastokens gives other ids than Hugging Face's tokenizer" in capfd.readouterr().err


def test_an_id_that_does_not_fit_is_an_error(preprocess, tmp_path, tokenizer, capfd):
    """A vocabulary of less than 65,500 entries is written in two bytes; NeMo's script wraps a larger id around."""
    shutil.copytree(tokenizer, tmp_path / "gap")
    parts = json.loads((tmp_path / "gap/tokenizer.json").read_text())
    token = next(token for token in parts["model"]["vocab"] if token.startswith("Ġthe"))
    parts["model"]["vocab"][token] = 70_000
    (tmp_path / "gap/tokenizer.json").write_text(json.dumps(parts))
    lines = write_lines(tmp_path / "in.jsonl", ["fine", "fine", " the"])
    preprocess([lines], name=tmp_path / "gap", code=1)
    assert f"{lines}:3 has the token 70000, which does not fit into the 2 bytes" in capfd.readouterr().err
    assert not list((tmp_path / "out").glob("*.bin"))


def test_the_fingerprint_is_of_what_the_ids_mean(tokenizer, tmp_path):
    own = tokenization.folder_fingerprint(tokenizer)
    shutil.copytree(tokenizer, tmp_path / "same")
    parts = json.loads((tmp_path / "same/tokenizer.json").read_text())
    parts["model"]["merges"] = [" ".join(merge) for merge in parts["model"]["merges"]]  # as older versions write them
    parts["truncation"] = {"max_length": 5}
    (tmp_path / "same/tokenizer.json").write_text(json.dumps(parts, indent=1))
    assert tokenization.folder_fingerprint(tmp_path / "same") == own
    first, second = list(parts["model"]["vocab"])[300:302]
    vocabulary = parts["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "same/tokenizer.json").write_text(json.dumps(parts))
    assert tokenization.folder_fingerprint(tmp_path / "same") != own
    assert tokenization.folder_fingerprint(tmp_path) is None


# Lines.


def read(path, keys=("text",)):
    """All rows of an input: {number: text, None for a blank line, or a ValueError}."""
    spool = (f"{path}.spool-{number}" for number in range(10**6))
    found = {}
    for piece in documents.pieces(str(path), list(keys), spool):
        for number, row, problem in documents.rows(piece, list(keys)):
            assert number not in found
            found[number] = ValueError(problem) if problem else row and row[0]
        piece.remove()
    return found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"[1]", "is not a JSON object"),
        (b'{"text": 5}', "has no text under text"),
        (b'{"text": null}', "has no text under text"),
        (b'{"txt": "a"}', "has no text under text"),
        (b'{"text": "a"', "is not JSON (Expecting ',' delimiter at character 13)"),
        (b'{"text": "a\x00"}', "is not JSON (Invalid control character"),
        (b'{"text": "\xe5\xb1"}', "is not UTF-8 (invalid continuation byte at byte 11)"),
        (b'{"text": "a\\ud800b"}', "holds half of a surrogate pair (character 2)"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ("is nested too deeply", "has no text")),
        (b'{"n": ' + b"1" * 5000 + b', "text": "a"}', "is not read (Exceeds the limit"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_line(line, said, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}')
    found = read(path)
    assert (found[1], found[2], found[4]) == ("first", None, "last") and len(found) == 4
    assert any(one in str(found[3]) for one in ([said] if isinstance(said, str) else said)), found[3]


def test_odd_lines_that_are_fine(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "bom"}\r\n{"text": "\\ud83c\\uddf9 \\u0000"}\r{"text": "a\xe2\x80\xa8b", "text": "c"}'
    )
    assert read(path) == {1: "bom", 2: "\U0001f1f9 \0", 3: "c"}
    path.write_bytes(b"")
    assert read(path) == {}


def test_a_line_longer_than_a_piece(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 3 * documents.PIECE}) + '\n{"text": "c"}\n')
    assert [len(text) for text in read(path).values()] == [1, 3 * documents.PIECE, 1]


def test_line_numbers_over_pieces(tmp_path, monkeypatch):
    import pyarrow

    monkeypatch.setattr(documents, "PIECE", 100)
    path = write_lines(tmp_path / "in.jsonl", [str(i) for i in range(1, 200)])
    assert read(path) == {i: str(i) for i in range(1, 200)}
    squeezed = tmp_path / "in.jsonl.gz"
    squeezed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(squeezed) == read(path)
    with pyarrow.CompressedOutputStream(str(tmp_path / "in.jsonl.zst"), "zstd") as file:
        file.write(path.read_bytes())
    assert read(tmp_path / "in.jsonl.zst") == read(path)
    for name in ("in.jsonl.gz", "in.jsonl.zst"):
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[:-100], whole[:100] + b"\0\xff\0\xff" + whole[104:], b"no archive"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(documents.Unreadable, match=rf"{name}:\d+ can't be read on .*cut short or damaged"):
                read(tmp_path / name)


def test_a_bad_line_stops_the_run_or_is_skipped(preprocess, tmp_path, capfd):
    lines = write_lines(tmp_path / "in.jsonl", ["one", "two", "three"])
    expected = preprocess([lines], prefix="out/good")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{"text": "two"}\n{"text"\n{"text": "three"}\n')
    preprocess([bad], code=1)
    said = capfd.readouterr().err
    assert f"{bad}:3 is not JSON" in said and "--on_error skip" in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("a")] == ["a.partial"]
    assert preprocess([bad], "--on_error", "skip") == expected
    captured = capfd.readouterr()
    assert f"skipped: {bad}:3 is not JSON" in captured.err and "1 bad lines" in captured.out
    assert json.loads(Path("out/a_text_document.json").read_text())["skipped_lines"] == 1


def test_inputs_that_are_none(preprocess, tmp_path, capfd):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    for name in ("empty.jsonl", "blank.jsonl"):
        preprocess([name], code=1)
        assert "holds no text" in capfd.readouterr().err
        assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "data.csv").touch()
    preprocess(["folder", "data.csv", "no*.jsonl", "empty.jsonl", "./empty.jsonl"], code=2)
    said = capfd.readouterr().err
    for part in ("folder is none of", "FOLDER/*.jsonl", "data.csv is none of", "no*.jsonl: there is", "is named twice"):
        assert part in said, part
    assert not list((tmp_path / "out").glob("*.bin"))


# Processes.


def test_results_come_in_order():
    done = list(workers.ordered(lambda number: (time.sleep(0.02 * (number % 3)), number)[1], range(40), 3))
    assert done == list(range(40))
    assert list(workers.ordered(str, [], 2)) == []


def test_what_a_worker_raises_is_raised_here():
    with pytest.raises(ZeroDivisionError):
        list(workers.ordered(lambda number: 1 // (number - 5), range(40), 2))


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_worker_ends_the_run_at_once(death):
    def work(number):
        if number == 7:
            os.kill(os.getpid(), death)
        return number

    began = time.monotonic()
    with pytest.raises(workers.Died, match=f"signal {int(death)}|signal 9"):
        list(workers.ordered(work, range(1000), 2))
    assert time.monotonic() - began < 5


def test_aside():
    """It runs while the block does; its death and what it raises are found where its result is asked for."""
    began = time.monotonic()
    with workers.aside(lambda: (time.sleep(0.5), os.getpid())[1]) as asked:
        time.sleep(0.5)
        assert asked() != os.getpid() and time.monotonic() - began < 0.9
    with workers.aside(lambda: 1 // 0) as asked, pytest.raises(ZeroDivisionError):
        asked()
    with workers.aside(lambda: os.kill(os.getpid(), signal.SIGKILL)) as asked:
        with pytest.raises(workers.Died, match="killed"):
            asked()
    with workers.aside(lambda: time.sleep(60)):
        pass  # not waited for
    assert time.monotonic() - began < 5


def test_aside_ends_with_its_parent():
    """A result longer than a pipe holds does not keep it alive when nobody is left to read it."""
    code = "import os, time; from nemo_tutorial import workers\n"
    code += "with workers.aside(lambda: print(os.getpid(), flush=True) or bytes(1 << 20)):\n"
    code += "    time.sleep(0.5), os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.returncode == -signal.SIGKILL
    child, began = int(done.stdout), time.monotonic()
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - began < 5
        time.sleep(0.05)


def start(folder, argv):
    return subprocess.Popen(
        [sys.executable, ROOT / SCRIPT, *map(str, argv)], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def wait_for_pieces(process, folder, count):
    journal = folder / "a.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > count):
        time.sleep(0.005)


@pytest.fixture
def long_run(tmp_path, tokenizer, preprocess):
    """(command line of a run of many pieces, what it writes)."""
    lines = large(tmp_path / "in.jsonl", 25)
    expected = preprocess([lines], prefix="good")
    return ["--input", lines, "--tokenizer_type", tokenizer, "--output_prefix", "a", "--append_eod"], expected


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_killed_and_run_again(long_run, tmp_path, preprocess, capfd):
    argv, expected = long_run
    process = start(tmp_path, argv)
    wait_for_pieces(process, tmp_path, 3)
    inherited = children(process)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("a_text*")), "nothing under the final name"
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in inherited) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in inherited if Path(f"/proc/{pid}").exists()], "workers end with their parent"
    assert preprocess([argv[1]], prefix="a") == expected
    assert "goes on from" in capfd.readouterr().out


def test_a_worker_is_killed(long_run, tmp_path, preprocess):
    argv, expected = long_run
    process = start(tmp_path, argv)
    wait_for_pieces(process, tmp_path, 3)
    began = time.monotonic()
    os.kill(children(process)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 5 and process.returncode == 1
    assert b"was killed (signal 9), as the kernel does when memory runs out" in said and b"Traceback" not in said
    assert preprocess([argv[1]], prefix="a") == expected


def test_no_room(long_run, tmp_path, preprocess):
    argv, expected = long_run
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000))  # noqa: E731
    command = [sys.executable, ROOT / SCRIPT, *map(str, argv)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "make room, and the same command goes on" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "--output_prefix a: File too large" in done.stderr
    assert not list(tmp_path.glob("a_text*"))
    assert preprocess([argv[1]], prefix="a") == expected


def interrupted(monkeypatch, after):
    """Ctrl-C after so many pieces."""
    append, seen = dataset_writer.Writer.append, []

    def stop(self, line):
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append(line)
        append(self, line)

    monkeypatch.setattr(dataset_writer.Writer, "append", stop)


def test_what_changed_meanwhile_is_not_taken_over(preprocess, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(documents, "PIECE", 20_000)
    lines = large(tmp_path / "in.jsonl", 0.3)
    with monkeypatch.context() as patch:
        interrupted(patch, after=8)
        preprocess([lines], code=130)
    rows = lines.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(
        number for number in range(len(rows)) if len("".join(rows[:number]).encode()) > 70_000
    )  # the fourth piece
    rows[at] = json.dumps({"text": "changed"}) + "\n"
    lines.write_text("".join(rows), encoding="utf-8")
    result = preprocess([lines])
    captured = capfd.readouterr()
    assert "in.jsonl has changed since the run that was stopped" in captured.err and "from 8 finished" in captured.out
    assert result == preprocess([lines], prefix="fresh")
    # Other flags: nothing is taken over. A damaged file: only what lies before the damage.
    for damage, said in (("flags", "was begun with another tokenizer or other flags"), ("bytes", "goes on from 2 ")):
        with monkeypatch.context() as patch:
            interrupted(patch, after=8)
            preprocess([lines], *(["--add_bos"] if damage == "flags" else []), prefix=damage, code=130)
        if damage == "bytes":
            journal = Path("bytes.partial/journal.jsonl").read_text().splitlines()[1:]
            first = sum(json.loads(line)["keys"]["text"]["bin"] for line in journal[:2])
            with open("bytes.partial/text.bin", "r+b") as file:
                file.seek(first + 10)
                file.write(b"\xff")
        capfd.readouterr()
        assert preprocess([lines], prefix=damage) == result
        captured = capfd.readouterr()
        assert said in captured.err + captured.out


def test_killed_while_files_are_renamed(preprocess, tmp_path, monkeypatch, capfd):
    lines = write_lines(tmp_path / "in.jsonl", TEXTS)
    expected = preprocess([lines])
    old = preprocess([write_lines(tmp_path / "old.jsonl", ["old"])], prefix="b")
    for after in range(5):
        replace, calls = os.replace, []

        def stop(*names, calls=calls, replace=replace, after=after):
            if len(calls) == after:
                raise KeyboardInterrupt
            calls.append(names)
            replace(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            preprocess([lines], "--overwrite", prefix="b", code=130 if after < 4 else 0)
        pair = [Path(f"b_text_document{suffix}") for suffix in (".bin", ".idx")]
        assert not all(path.exists() for path in pair) or dataset("b") in (old, expected), "never a mixed pair"
        if after < 4:
            assert dataset_writer.interrupted_publishing("b")
            preprocess([lines], prefix="b")  # no --overwrite: the same command ends what was begun
        assert dataset("b") == expected and not Path("b.partial").exists()


def test_two_runs_at_once(preprocess, tmp_path, capfd):
    lines = write_lines(tmp_path / "in.jsonl", TEXTS)
    writer = dataset_writer.Writer("out/a", ["text"], 2, 8)
    preprocess([lines], code=1)
    assert "another process is writing out/a" in capfd.readouterr().err
    writer.lock.close()
    preprocess([lines])


@pytest.mark.full
def test_killed_at_20_random_moments(long_run, tmp_path, preprocess):
    argv, expected = long_run
    began = time.monotonic()
    process = start(tmp_path, argv)
    process.communicate()
    seconds = time.monotonic() - began
    generator, killed = random.Random(time.time()), 0
    while killed < 20:
        for path in tmp_path.glob("a_text*"):
            path.unlink()
        if killed % 4 == 0:  # else it goes on from the last kill, and is killed there
            shutil.rmtree(tmp_path / "a.partial", ignore_errors=True)
        process = start(tmp_path, argv)
        try:
            process.communicate(timeout=generator.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            index, prefix = tmp_path / "a_text_document.idx", str(tmp_path / "a")
            if index.exists() and not dataset_writer.interrupted_publishing(prefix):
                assert dataset(prefix) == expected  # killed after all was done, before it ended
        if killed % 4 == 3 or killed == 20:
            if not (tmp_path / "a_text_document.idx").exists() or (tmp_path / "a.partial").exists():
                preprocess([argv[1]], prefix="a")
            assert dataset(str(tmp_path / "a")) == expected


# Fuzz.

BITS = [
    b"\x00", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n", b"\\ud800", b"\\ud83d\\ude00", b"\\u0000", b"\xff\xfe",
    b"\xed\xa0\x80", b"\xe2\x80\xa8", b'"', b"\\", b"{", b"}", b"[" * 2000, b"NaN", b"1e999", b"null", b"<|eot_id|>",
    "e\u0301".encode(), b" ", "\U0001f468\u200d\U0001f469".encode(), "玉山".encode("big5"), "玉山".encode("utf-16"),
    b'{"text": "x"}', b"9" * 5000, b"\t",
]  # fmt: skip


def mutated(generator, texts):
    """A file of a few JSON lines with some damage."""
    lines = [
        json.dumps({"text": generator.choice(texts)[:200]}, ensure_ascii=generator.random() < 0.5).encode()
        for _ in range(generator.randint(0, 6))
    ]
    data = generator.choice([b"\n", b"\r\n", b"\n\n"]).join(lines)
    for _ in range(generator.randint(0, 4)):
        at = generator.randint(0, len(data))
        what = generator.random()
        if what < 0.6:
            data = data[:at] + generator.choice(BITS) + data[at:]
        elif what < 0.8:
            data = data[:at] + data[at + generator.randint(1, 20) :]
        else:
            data = data[:at] + bytes([generator.randrange(256)]) + data[at + 1 :]
    return data


def plain_reading(data):
    """The same file read as simply as can be: {number: text, None if blank, ValueError}."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    found = {}
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        try:
            text = line.decode()
            found[number] = json.loads(text)["text"] if text.strip() else None
            if text.strip():
                found[number].encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            found[number] = ValueError(str(error))
    return found


def fuzz(count, tokenizer, folder, seed):
    generator, texts = random.Random(seed), [*zoo.made_tiny().sample_texts(), *TEXTS, *tokenization.AWKWARD]
    fast, slow = tokenizers_of(tokenizer)
    kept, bad = [], 0
    for number in range(count):
        data = mutated(generator, texts)
        squeezed = number % 5 == 0
        path = folder / ("in.jsonl.gz" if squeezed else "in.jsonl")
        whole = gzip.compress(data, 1) if squeezed else data
        cut = squeezed and generator.random() < 0.5
        path.write_bytes(whole[: generator.randrange(len(whole))] if cut else whole)
        signal.alarm(20)  # a hang ends the test
        try:
            found = read(path)
        except documents.Unreadable as error:
            assert squeezed and f"{path}:" in str(error), str(error)
            bad += 1
            continue
        finally:
            signal.alarm(0)
        expected = plain_reading(data)
        if cut and found != expected:  # cut to nothing, which is an empty file
            assert found == {} and path.stat().st_size == 0
            continue
        assert {n: v for n, v in found.items() if not isinstance(v, ValueError)} == {
            n: v for n, v in expected.items() if not isinstance(v, ValueError)
        }, data
        bad += sum(isinstance(value, ValueError) for value in found.values())
        kept += [value for value in found.values() if isinstance(value, str)]
        if len(kept) > 2000 or number == count - 1:
            (ids, lengths), (right, sizes) = fast(kept), slow(kept)
            assert ids.tolist() == right.tolist() and lengths.tolist() == sizes.tolist()
            kept = []
    assert bad > count / 4, "the damage is seen"


def tokenizers_of(folder):
    """texts -> ids by fastokens, and by Hugging Face."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    reference, _, _ = tokenization.reference(str(folder), False, [])
    return tokenization.load("fastokens", reference), tokenization.load("tokenizers", reference)


def test_fuzz(tokenizer, tmp_path):
    fuzz(500, tokenizer, tmp_path, seed=0)


@pytest.mark.full
def test_fuzz_10_000(tokenizer, tmp_path):
    fuzz(10_000, tokenizer, tmp_path, seed=time.time())


@pytest.mark.full
def test_fuzz_of_the_whole_script(preprocess, tmp_path, capfd):
    """Damaged files through the real thing: it ends, with a whole dataset or with file:line."""
    generator, texts = random.Random(1), [*zoo.made_tiny().sample_texts(), *TEXTS]
    for number in range(40):
        path = tmp_path / f"{number}.jsonl"
        data = b"\n".join(mutated(generator, texts) for _ in range(30))
        path.write_bytes(data)
        good = [value for value in plain_reading(data).values() if isinstance(value, str)]
        result = preprocess([path], "--on_error", "skip", prefix=f"out/{number}")
        assert result == preprocess([write_lines(tmp_path / "good.jsonl", good)], "--overwrite", prefix="out/good")
        preprocess([path], prefix=f"out/stop{number}", code=1)
        assert f"{path}:" in capfd.readouterr().err


@pytest.mark.full
def test_lines_of_50_megabytes(preprocess, tmp_path, capfd):
    """Long documents, of words and of no words at all, give Hugging Face's ids, here and after a bad one."""
    texts = ["玉山 mountain, 3952 m. " * 1_600_000, "a" * 3_000_000, "\n" * 3_000_000, "!?" * 1_000_000]
    lines = write_lines(tmp_path / "in.jsonl", texts)
    with open(lines, "ab") as file:
        file.write(b'{"text": "' + b"x" * 50_000_000 + b"\n")
        file.write(b"[" * 50_000_000 + b"\n")
    result = preprocess([lines], "--on_error", "skip")
    assert json.loads(Path("out/a_text_document.json").read_text())["skipped_lines"] == 2
    assert f"{lines}:5 is not JSON" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "out")
    sys.modules["fastokens"] = None
    try:
        assert preprocess([write_lines(lines, texts)]) == result
    finally:
        del sys.modules["fastokens"]


@pytest.mark.full
def test_every_character_of_unicode(tokenizer):
    """Libraries disagree on letters when Unicode grows: every code point beside letters, digits and spaces."""
    fast, slow = tokenizers_of(tokenizer)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000 and (c < 0x34000 or 0xE0000 <= c < 0xE0200)]
    for begin in range(0, len(points), 20_000):
        texts = [f"a{chr(c)}1{chr(c)} {chr(c)}\n{chr(c)}{chr(c)}'s" for c in points[begin : begin + 20_000]]
        (ids, lengths), (right, sizes) = fast(texts), slow(texts)
        assert lengths.tolist() == sizes.tolist() and ids.tolist() == right.tolist()

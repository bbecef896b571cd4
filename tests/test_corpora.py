"""Datasets down, of our own Hub on loopback and of local files: every form, every failure, whole or not at all."""

import gzip
import itertools
import json
import re
import types
from pathlib import Path

import pytest
from conftest import script
from hub_server import TOKEN, Answer, environment

from nemo_tutorial import corpora

TEXTS = [f"第 {number} 篇：{'山' * (number % 7 + 1)}\n\nline two" for number in range(300)]
DOWNLOAD, SPLIT = "data/download_pretrain_data.py", "finetuning/download_split_data.py"


def parquet(path, rows, **options):
    import pyarrow
    from pyarrow import parquet

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def news(folder, name="data/train-0000{}-of-00003.parquet"):
    """A dataset of three parquet files, several row groups each, with a column beside the text, and a card."""
    for number in range(3):
        rows = [{"id": i, "text": TEXTS[i]} for i in range(number * 100, number * 100 + 100)]
        parquet(folder / name.format(number), rows, row_group_size=20)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# News\n")
    return folder


@pytest.fixture
def hub_of_datasets(server, here, monkeypatch):
    """The server as the Hub of `datasets` too, which waits for nothing."""
    import datasets
    from huggingface_hub.utils import _http

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(
        datasets.config, "HUB_DATASETS_URL", server.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
    )
    for name in ("READ_RETRY", "READ_SERVER_UNAVAILABLE_RETRY", "READ_RATE_LIMIT_RETRY", "OPEN_RETRY"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_INTERVAL", 0, raising=False)
    for name in ("READ", "OPEN"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_MAX_RETRIES", 2)
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    return server


@pytest.fixture
def run(load_script, capsys, tmp_path, monkeypatch):
    """Run a script in this process, in a folder of its own: (exit code, everything that it said)."""
    if not Path.cwd().is_relative_to(tmp_path):  # `here` has gone to a folder in it
        monkeypatch.chdir(tmp_path)

    def call(name, *argv):
        code = 0
        try:
            load_script(name).main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
        said = "".join(capsys.readouterr())
        assert TOKEN not in said and "Traceback" not in said, said
        assert not list(Path.cwd().rglob(".*.partial")) and not list(Path.cwd().rglob(".*.lock"))
        return code, said

    return call


def texts(path):
    return [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def refused(call, name, *argv, code=1):
    """One problem, nothing written: the sentence."""
    before = sorted(path for path in Path.cwd().rglob("*"))
    got, said = call(name, *argv)
    assert got == code and "error: 1 problem" in said, said
    left = [path for path in Path.cwd().rglob("*") if path not in before and path.is_file()]
    assert left == [], left
    (sentence,) = said.split("\n  - ")[1:]
    assert sentence.strip().count("\n") == 0, sentence
    return sentence.strip()


# The Hub.


def test_the_documented_dataset(hub_of_datasets, run, tmp_path):
    """No arguments at all: the tutorial's news, from a Hub that serves parquet, into the tutorial's file."""
    hub_of_datasets.add("datasets/erhwenkuo/wikinews-zhtw", news(tmp_path / "news"))
    code, said = run(DOWNLOAD)
    assert code == 0, said
    assert texts("data/custom_dataset/json/wikinews-zhtw.jsonl") == TEXTS
    assert "documents  300" in said


def test_only_what_is_read_is_downloaded(hub_of_datasets, run, tmp_path):
    hub_of_datasets.add("datasets/o/news", news(tmp_path / "news"))
    code, said = run(DOWNLOAD, "--dataset", "o/news", "--limit", 30, "--output_path", "out.jsonl")
    assert code == 0 and texts("out.jsonl") == TEXTS[:30], said
    asked = {path for method, path, *_ in hub_of_datasets.log if method == "GET" and path.endswith(".parquet")}
    assert {path[-22:] for path in asked} == {"train-00000-of-00003.parquet"[-22:]}
    assert not list(tmp_path.rglob("cache/**/*.parquet")), "nothing but the output is kept"


def test_splits_subsets_and_revisions(hub_of_datasets, run, tmp_path):
    folder = tmp_path / "many"
    for name, words in (("zh/train", "中"), ("zh/test", "文"), ("en/train", "a")):
        parquet(folder / f"{name}-00000-of-00001.parquet", [{"body": words * number} for number in (1, 2)])
    zh = "".join(f"  - split: {split}\n    path: zh/{split}-*\n" for split in ("train", "test"))
    configs = f"- config_name: zh\n  data_files:\n{zh}- config_name: en\n  data_files: en/train-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    first = hub_of_datasets.add("datasets/o/many", folder)
    hub_of_datasets.repos["datasets/o/many"]["refs"]["v1"] = first
    base = ("--dataset", "o/many", "--text_column", "body", "--output_path", "out.jsonl", "--overwrite")
    assert "name one of zh, en with --subset" in refused(run, DOWNLOAD, *base)
    assert "name one of zh, en with --subset" in refused(run, DOWNLOAD, *base, "--subset", "fr")
    assert run(DOWNLOAD, *base, "--subset", "zh", "--split", "test")[0] == 0
    assert texts("out.jsonl") == ["文", "文文"]
    Path("out.jsonl").unlink()
    assert "--split dev: o/many has train, test" in refused(run, DOWNLOAD, *base, "--subset", "zh", "--split", "dev")
    said = refused(run, DOWNLOAD, *base, "--subset", "en", "--text_column", "txt")
    assert "--text_column txt: o/many has body" in said
    parquet(folder / "en/train-00000-of-00001.parquet", [{"body": "new"}])
    hub_of_datasets.add("datasets/o/many", folder)
    assert run(DOWNLOAD, *base, "--subset", "en")[0] == 0 and texts("out.jsonl") == ["new"]
    assert run(DOWNLOAD, *base, "--subset", "en", "--revision", "v1")[0] == 0 and texts("out.jsonl") == ["a", "aa"]
    Path("out.jsonl").unlink()
    assert "o/many has no revision v9" in refused(run, DOWNLOAD, *base, "--subset", "en", "--revision", "v9")


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(
    "pattern",
    ["api/datasets/o/news/revision", "tree|paths-info", "GET .*README", "GET .*00001-of-.*parquet$", "stored"],
)
def test_a_busy_hub_is_asked_again(hub_of_datasets, run, tmp_path, status, pattern):
    hub_of_datasets.add("datasets/o/news", news(tmp_path / "news"))
    hub_of_datasets.failures = [(pattern, 2, status, {})]
    code, said = run(DOWNLOAD, "--dataset", "o/news", "--output_path", "out.jsonl")
    assert code == 0 and texts("out.jsonl") == TEXTS, said


@pytest.mark.parametrize("cut, failures", [(8, 1), (0, 14), (20, 14)])
def test_a_stream_that_breaks_goes_on_with_the_next_row(hub_of_datasets, run, tmp_path, cut, failures):
    """Longer than `datasets` itself would try, when two of three files are read: no row is lost, none comes twice."""
    hub_of_datasets.add("datasets/o/news", news(tmp_path / "news"))
    hub_of_datasets.failures = [("GET .*00002-of-.*parquet$", failures, 500, {})]
    hub_of_datasets.cut = cut
    code, said = run(DOWNLOAD, "--dataset", "o/news", "--output_path", "out.jsonl")
    assert code == 0 and texts("out.jsonl") == TEXTS, said


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt"])
def test_half_of_a_text_is_not_the_whole(hub_of_datasets, run, tmp_path, name):
    """Formats that have no end to check: a stream that breaks off does not pass for a shorter file."""
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / name, name[2:])
    hub_of_datasets.add("datasets/o/texts", tmp_path / "texts")
    wanted = [text.replace("\n", " ") for text in TEXTS] if name == "x.txt" else TEXTS
    base = ("--dataset", "o/texts", "--output_path", "out.jsonl")
    hub_of_datasets.cut = 9999
    assert re.search("broke off|can't be reached", refused(run, DOWNLOAD, *base))
    hub_of_datasets.cut = 3
    code, said = run(DOWNLOAD, *base)
    assert code == 0 and texts("out.jsonl") == wanted, said


def test_a_hub_that_stays_broken(hub_of_datasets, run, tmp_path):
    hub_of_datasets.add("datasets/o/news", news(tmp_path / "news"))
    base = ("--dataset", "o/news", "--output_path", "out.jsonl")
    hub_of_datasets.failures = [("GET .*00002-of-.*parquet$", 999, 503, {})]
    assert re.search(r"fails \(503\)|can't be reached|broke off", refused(run, DOWNLOAD, *base))
    hub_of_datasets.failures, hub_of_datasets.cut = [], 9999
    assert re.search("broke off|can't be reached", refused(run, DOWNLOAD, *base))
    hub_of_datasets.cut = 0
    assert run(DOWNLOAD, *base)[0] == 0 and texts("out.jsonl") == TEXTS


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("name", [DOWNLOAD, SPLIT])
def test_gated_private_and_misspelt(hub_of_datasets, run, tmp_path, monkeypatch, token, name):
    if token:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_of_datasets.add("datasets/o/gated", news(tmp_path / "news"), gated=True)
    said = refused(run, name, "--dataset", "o/gated", "--output_path", "out")
    assert f"o/gated is gated ({403 if token else 401})" in said and f"{hub_of_datasets.url}/datasets/o/gated" in said
    assert ("an account that has not" in said) == token and ("hf auth login" in said) != token
    said = refused(run, name, "--dataset", "o/nws", "--output_path", "out")
    assert "shows no dataset o/nws (404)" in said and "check the spelling" in said and "nothing was written" in said
    hub_of_datasets.failures = [("api/datasets", 99, 403, {})]
    assert "denies access to o/gated (403)" in refused(run, name, "--dataset", "o/gated", "--output_path", "out")


def test_no_network(hub_of_datasets, run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refused(run, DOWNLOAD, "--dataset", "o/news", "--output_path", "out.jsonl")
    assert "http://127.0.0.1:9 can't be reached" in said and "copy the dataset here" in said


def test_a_dataset_made_by_a_program(hub_of_datasets, run, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/code.py").write_text("print('run me')")
    hub_of_datasets.add("datasets/o/code", tmp_path / "code")
    said = refused(run, DOWNLOAD, "--dataset", "o/code", "--output_path", "out.jsonl")
    assert "o/code can't be read" in said and "scripts are no longer supported" in said


def test_dry_run_asks_nothing(hub_of_datasets, run):
    for name in (DOWNLOAD, SPLIT):
        code, said = run(name, "--dataset", "o/news", "--output_path", "out", "--dry_run")
        assert code == 0 and "o/news" in said
    assert hub_of_datasets.log == [] and not Path("out").exists()


def test_the_real_thing(server, tmp_path):
    """As users start it: a process of its own, with a limit, which ends without a crash and without its token."""
    server.add("datasets/o/news", news(tmp_path / "news"))
    work = tmp_path / "work"
    work.mkdir()
    env = environment(server, tmp_path)
    done = script(work, DOWNLOAD, "--dataset", "o/news", "--limit", 150, "--output_path", "out.jsonl", **env)
    assert texts(work / "out.jsonl") == TEXTS[:150] and TOKEN not in done.stdout + done.stderr
    others = [token for _, path, _, token in server.log if not path.startswith("/stored")]
    assert others and all(token == f"Bearer {TOKEN}" for token in others)
    assert all(token is None for _, path, _, token in server.log if path.startswith("/stored"))


# Local files.


def write(path, form, rows=None):
    """The texts as a file or folder of one form."""
    rows = rows or [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if form == "parquet":
        parquet(path, rows)
    elif form in ("jsonl", "jsonl.gz"):
        (gzip.open if form.endswith("gz") else open)(path, "wt", encoding="utf-8").write(lines)
    elif form == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif form == "csv":
        import csv

        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif form == "txt":
        path.write_text("".join(row["text"].replace("\n", " ") + "\n" for row in rows), encoding="utf-8")
    else:
        import datasets

        found = datasets.Dataset.from_list(rows)
        found = datasets.DatasetDict(train=found, test=found.select([0])) if form == "saved_dict" else found
        found.save_to_disk(str(path))
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "json", "csv", "txt", "saved", "saved_dict"])
@pytest.mark.parametrize("inside", [False, True], ids=["file", "folder"])
def test_local(run, tmp_path, form, inside):
    if inside and form.startswith("saved"):
        pytest.skip("is a folder itself")
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / f"x.{form}", form)
    code, said = run(DOWNLOAD, "--dataset", path.parent if inside else path, "--output_path", "out.jsonl")
    assert code == 0, said
    wanted = [text.replace("\n", " ") for text in TEXTS] if form == "txt" else TEXTS
    assert texts("out.jsonl") == wanted


def test_several_files(run, tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.jsonl", "jsonl", [{"text": f"a{number}"}, {"text": f"b{number}"}])
    assert run(DOWNLOAD, "--dataset", "1.jsonl", "0.jsonl", "--output_path", "out.jsonl", "--limit", 3)[0] == 0
    assert texts("out.jsonl") == ["a1", "b1", "a0"]


def test_texts_that_are_none(run, tmp_path):
    write(tmp_path / "x.jsonl", "jsonl", [{"text": "a"}, {"text": None}, {"text": " \n"}, {"text": "b"}])
    code, said = run(DOWNLOAD, "--dataset", "x.jsonl", "--output_path", "out.jsonl")
    assert code == 0 and texts("out.jsonl") == ["a", "b"] and "2 without text" in said


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "x.jsonl:3 is not JSON"),
        ("[1]", "x.jsonl:3 has no columns"),
        ('{"txt": "a"}', "--text_column text: x.jsonl:3 has txt"),
        ('{"text": 5}', "x.jsonl:3 has a int under text"),
        ('{"text": "\\ud800"}', "x.jsonl:3 has half a character"),
        ("[" * 100_000, "x.jsonl:3 is not JSON"),
        (b"\xff\xfe", "x.jsonl:3 is not JSON"),
    ],
)
def test_a_bad_line_is_named(run, tmp_path, line, said):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\n' + line + b"\n")
    assert said in refused(run, DOWNLOAD, "--dataset", "x.jsonl", "--output_path", "out.jsonl")


def test_half_a_file(run, tmp_path):
    whole = write(tmp_path / "x.jsonl.gz", "jsonl.gz").read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "can't be read" in refused(run, DOWNLOAD, "--dataset", "x.jsonl.gz", "--output_path", "out.jsonl")
    whole = write(tmp_path / "x.parquet", "parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole[: len(whole) // 2])
    assert "x.parquet can't be read" in refused(run, DOWNLOAD, "--dataset", "x.parquet", "--output_path", "out.jsonl")


def test_names_that_are_refused(run, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "empty").mkdir()
    for form in ("jsonl", "parquet"):
        write(tmp_path / f"mixed/x.{form}", form)
    (tmp_path / "x.docx").touch()
    out = ("--output_path", "out.jsonl")
    assert "is not a file or folder here" in refused(run, DOWNLOAD, "--dataset", "gone.jsonl", *out, code=2)
    assert "nor a Hub id" in refused(run, DOWNLOAD, "--dataset", "a/b/c", *out, code=2)
    assert "x.docx is none of .parquet" in refused(run, DOWNLOAD, "--dataset", "x.docx", *out, code=2)
    assert "empty holds no .parquet" in refused(run, DOWNLOAD, "--dataset", "empty", *out, code=2)
    assert "mixed holds .jsonl and .parquet" in refused(run, DOWNLOAD, "--dataset", "mixed", *out, code=2)
    file = tmp_path / "mixed/x.jsonl"
    assert "--revision v1 is for the Hub" in refused(run, DOWNLOAD, "--dataset", file, "--revision", "v1", *out, code=2)
    assert "--subset zh has no effect" in refused(run, DOWNLOAD, "--dataset", file, "--subset", "zh", *out, code=2)
    assert "the dataset itself" in refused(
        run, DOWNLOAD, "--dataset", file, "--output_path", file, "--overwrite", code=2
    )


def test_an_existing_file_is_not_touched(run, tmp_path):
    write(tmp_path / "x.jsonl", "jsonl", [{"text": "new"}])
    (tmp_path / "out.jsonl").write_text("old")
    base = ("--dataset", "x.jsonl", "--output_path", "out.jsonl")
    assert "out.jsonl exists" in refused(run, DOWNLOAD, *base, code=2)
    assert "--text_column txt" in refused(run, DOWNLOAD, *base, "--overwrite", "--text_column", "txt")
    assert Path("out.jsonl").read_text() == "old"
    assert run(DOWNLOAD, *base, "--overwrite")[0] == 0 and texts("out.jsonl") == ["new"]


def test_full_disk(run, tmp_path, monkeypatch):
    import os

    def full(number):
        raise OSError(28, "No space left on device")

    write(tmp_path / "x.jsonl", "jsonl")
    monkeypatch.setattr(os, "fsync", full)
    said = refused(run, DOWNLOAD, "--dataset", "x.jsonl", "--output_path", "out.jsonl")
    assert "--output_path out.jsonl" in said and "No space left" in said


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_memory_does_not_grow(tmp_path, form):
    """A dataset ten times as large needs as much memory, as the system counts the peak of a process."""
    import subprocess
    import sys

    from conftest import ROOT

    peaks = []
    for size in (5, 50):  # MB
        rows = [{"text": f"{number} " * 1000} for number in range(size * 200)]
        if form == "parquet":
            parquet(tmp_path / f"{size}.parquet", rows, row_group_size=500, compression="none", use_dictionary=False)
        else:
            write(tmp_path / f"{size}.jsonl", form, rows)
        code = (
            "import re, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
            "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()).group(1)) / 1024)"
        )
        argv = [ROOT / DOWNLOAD, "--dataset", f"{size}.{form}", "--output_path", f"out{size}.jsonl"]
        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 30, peaks


# Instruction data.


def chat(*texts, keys=("role", "content"), roles=("user", "assistant")):
    return [dict(zip(keys, turn)) for turn in zip(itertools.cycle(roles), texts)]


SHAREGPT = {"keys": ("from", "value"), "roles": ("human", "gpt")}


def rows_of(folder="out"):
    return {
        name: [json.loads(line) for line in Path(folder, f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("training", "validation", "test")
    }


def every(folder="out"):
    return sorted((row for part in rows_of(folder).values() for row in part), key=json.dumps)


FORMS = {  # rows of a form -> what becomes of them
    "Alpaca": (
        lambda i: {"instruction": f"問{i}", "input": "", "output": f"答{i}"},
        lambda i: {"input": f"問{i}", "output": f"答{i}"},
    ),
    "Alpaca (": (
        lambda i: {"instruction": f"Q{i}", "input": "of this", "output": "A", "system": "Be kind."},
        lambda i: {"system": "Be kind.", "input": f"Q{i}\nof this", "output": "A"},
    ),
    "ShareGPT": (
        lambda i: {"conversations": chat(f"Q{i}", "A", **SHAREGPT)},
        lambda i: {"input": f"Q{i}", "output": "A"},
    ),
    "ShareGPT (": (
        lambda i: {"conversations": chat(f"Q{i}", "A", "more?", "B", **SHAREGPT), "system": "S"},
        lambda i: {"messages": [{"role": "system", "content": "S"}, *chat(f"Q{i}", "A", "more?", "B")]},
    ),
    "messages": (
        lambda i: {"messages": [{"role": "system", "content": "S"}, *chat(f"Q{i}", "A")], "id": i},
        lambda i: {"system": "S", "input": f"Q{i}", "output": "A"},
    ),
    "messages (": (
        lambda i: {"messages": chat(f"Q{i}", "A", "more?", "B")},
        lambda i: {"messages": chat(f"Q{i}", "A", "more?", "B")},
    ),
    "prompt and completion": (
        lambda i: {"prompt": f"Q{i}", "completion": "A"},
        lambda i: {"input": f"Q{i}", "output": "A"},
    ),
    "prompt and": (
        lambda i: {"prompt": chat(f"Q{i}"), "completion": chat("A", roles=["assistant"])},
        lambda i: {"input": f"Q{i}", "output": "A"},
    ),
    "input and output": (
        lambda i: {"input": f"Q{i}", "output": "A"},
        lambda i: {"input": f"Q{i}", "output": "A"},
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(run, tmp_path, form, kind):
    make, wanted = FORMS[form]
    write(tmp_path / f"x.{kind}", kind, [make(i) for i in range(100)])
    code, said = run(SPLIT, "--dataset", f"x.{kind}", "--output_path", "out", "--ratios", "80,10,10")
    assert code == 0, said
    assert re.search(rf"form +.*{re.escape(form)}", said), said
    assert every() == sorted((wanted(i) for i in range(100)), key=json.dumps)
    assert [len(part) for part in rows_of().values()] == [80, 10, 10]


def test_the_documented_instructions(hub_of_datasets, run, tmp_path):
    """No arguments at all: the tutorial's Alpaca data, from a Hub that serves parquet."""
    rows = [{"instruction": f"問{i}", "input": "", "output": f"答{i}"} for i in range(200)]
    parquet(tmp_path / "alpaca/data/train-00000-of-00002.parquet", rows[:90])
    parquet(tmp_path / "alpaca/data/train-00001-of-00002.parquet", rows[90:])
    hub_of_datasets.add("datasets/erhwenkuo/alpaca-data-gpt4-chinese-zhtw", tmp_path / "alpaca")
    code, said = run(SPLIT)
    assert code == 0 and "Alpaca" in said, said
    assert [len(part) for part in rows_of("data/alpaca").values()] == [196, 2, 2]
    assert every("data/alpaca") == sorted(({"input": f"問{i}", "output": f"答{i}"} for i in range(200)), key=json.dumps)


def test_no_question_in_two_splits(run, tmp_path):
    """Repeated questions, spaces aside, are left out and counted; a chat's question is all but its last answer."""
    rows = [{"messages": chat(f"Q{i}", f"A{i}", "and?", "B")} for i in range(60)]
    rows += [{"messages": chat(f" Q{i}\n", f"A{i}", "and?", "another B")} for i in range(0, 60, 2)]
    rows += [{"messages": chat("Q0", "A0")}]  # begins as the first does, and asks something else
    write(tmp_path / "x.jsonl", "jsonl", rows)
    code, said = run(SPLIT, "--dataset", "x.jsonl", "--output_path", "out", "--ratios", "50,30,20")
    assert code == 0 and "30 repeated questions (first: x.jsonl:61)" in said, said
    rows = every()
    assert len(rows) == 61 and all(row.get("messages", [{"content": "B"}])[-1]["content"] == "B" for row in rows)


def test_rows_that_can_not_be_used_are_counted(run, tmp_path):
    rows = [{"messages": chat(f"Q{i}", "A")} for i in range(10)]
    bad = {
        "no answer": [chat("Q"), []],
        "do not alternate": [
            chat("A", "Q", roles=("assistant", "user"))[:1],
            chat("a", "b", roles=["user"])[:2] + chat("c", roles=["assistant"]),
        ],
        "a turn of 'tool'": [chat("Q") + [{"role": "tool", "content": "x"}] + chat("A", roles=["assistant"])],
        "an empty turn": [chat("Q", " "), chat("Q", None), chat(["image"], "A")],
        "a turn that is none": [["Q", "A"]],
        "lone surrogate": [chat("Q\ud800", "A")],
    }
    rows += [{"messages": turns} for several in bad.values() for turns in several]
    rows.append({"messages": chat("last", "A", "unanswered")})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said = run(SPLIT, "--dataset", "x.jsonl", "--output_path", "out")
    assert code == 0, said
    for reason, several in bad.items():
        assert re.search(rf"left out +{len(several)} [^\n]*{re.escape(reason)}[^\n]*\(first: x.jsonl:\d+\)", said), said
    assert len(every()) == 11 and {"input": "last", "output": "A"} in every()


def test_alpaca_with_history(run, tmp_path):
    rows = [{"instruction": f"Q{i}", "output": "A", "history": [["before", "said"]]} for i in range(5)]
    write(tmp_path / "x.jsonl", "jsonl", rows)
    assert run(SPLIT, "--dataset", "x.jsonl", "--output_path", "out")[0] == 0
    assert {"messages": chat("before", "said", "Q3", "A")} in every()


def test_no_form(run, tmp_path):
    write(tmp_path / "x.jsonl", "jsonl", [{"text": "a", "id": 1}])
    said = refused(run, SPLIT, "--dataset", "x.jsonl", "--output_path", "out")
    assert "x.jsonl:1 has text, id" in said and "Alpaca, ShareGPT, messages, prompt/completion" in said


@pytest.mark.parametrize("method", ["stored", "tree", "info"])
def test_a_server_that_hangs_up(hub_of_datasets, run, tmp_path, monkeypatch, method):
    """The connection ends without an answer, twice."""
    hub_of_datasets.add("datasets/o/news", news(tmp_path / "news"))
    real, left = getattr(Answer, method), [2]

    def hang_up(self, *args):
        left[0] -= 1
        if left[0] >= 0:
            self.close_connection = True
            return None
        return real(self, *args)

    monkeypatch.setattr(Answer, method, hang_up)
    code, said = run(DOWNLOAD, "--dataset", "o/news", "--output_path", "out.jsonl")
    assert code == 0 and texts("out.jsonl") == TEXTS, said


def test_the_waits_are_bounded():
    assert sum(corpora.WAITS) < 120

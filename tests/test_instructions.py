"""Preparing instruction data: what training reads, the cache, rows that are too long, and faults."""

import argparse
import json
import os

import numpy as np
import pytest
from conftest import ROOT

from nemo_tutorial import instructions, prompts

DEFAULTS = {
    "prompt_template": None,
    "system_prompt": None,
    "seq_length": 256,
    "overlong": "drop",
    "packing": True,
    "packed_sequence_size": None,
    "longest_pack": 256,
    "global_batch_size": 8,
    "micro_batch_size": 1,
    "seed": 1,
    "num_nodes": 1,
    "num_gpus": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "show_samples": 0,
}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, load_script):
    """The tiny model's tokenizer: Llama 3's special tokens and chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "tokenizer"
    load_script("data/make_tiny_model.py").make_tokenizer(2048).save_pretrained(folder)
    return folder


def rows(count, start=0):
    return [
        {"input": f"台灣第 {n} 個問題是什麼？" * (n % 4 + 1), "output": f"第 {n} 個答案。" * (n % 3 + 1)}
        for n in range(start, start + count)
    ]


def write(folder, name, found):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def dataset(tmp_path):
    write(tmp_path / "rows", "training", rows(100))
    write(tmp_path / "rows", "validation", rows(30, 1000))
    return tmp_path / "rows"


@pytest.fixture
def prepare(dataset, tokenizer_folder):
    def run(folder=None, **changes):
        args = argparse.Namespace(dataset_path=str(dataset), **(DEFAULTS | changes))
        return instructions.prepare(args, folder or tokenizer_folder)

    return run


def read(prepared, name="training"):
    """What training reads: {line: (ids, loss)}, and the samples."""
    samples = np.load(prepared.folder / f"{name}.npy", allow_pickle=True)
    return {line: (ids, loss) for sample in samples for line, ids, loss in instructions._rows_of(sample)}, samples


@pytest.mark.parametrize("packing", [True, False])
def test_every_row_as_serving_renders_it(prepare, dataset, packing):
    """Packed and not, the same tokens and losses, in the order that NeMo's dataset wants."""
    prepared = prepare(packing=packing)
    found, samples = read(prepared)
    assert sorted(found) == list(range(1, 101))
    for line, row in enumerate(rows(100), 1):
        ids, loss = found[line]
        (sample,) = prepared.chat.samples([prompts.messages(row)])
        assert ids == prepared.chat.tokenizer.apply_chat_template(prompts.messages(row)) == sample.ids
        assert loss == list(map(bool, sample.loss))
    assert len(samples) == 100 if not packing else len(samples) < 50
    for sample in samples:
        places = len(sample["input_ids"]) - len(sample["lines"])  # a row's last token is only predicted
        assert places <= (prepared.pack_size or 256)
        assert len(sample["loss_mask"]) == len(sample["input_ids"])
    if packing:
        assert prepared.facts["training"]["fill"] > 0.9
        assert prepared.rows_a_step == pytest.approx(8, rel=0.2)
        assert (
            len(read(prepared, "validation")[0]) == 30 and prepared.facts["validation"]["samples"] % prepared.batch == 0
        )


def test_cache(prepare, dataset):
    """The same again reads what is there; whatever changes, nothing stale is read."""
    first = prepare()
    written = {file: file.stat().st_mtime_ns for file in (dataset / "prepared").rglob("*") if file.is_file()}
    assert prepare().folder == first.folder
    assert written == {file: file.stat().st_mtime_ns for file in (dataset / "prepared").rglob("*") if file.is_file()}
    folders = {first.folder}
    for changes in (
        {"seq_length": 200},
        {"overlong": "truncate"},
        {"packing": False},
        {"packed_sequence_size": 240},
        {"seed": 2},
        {"global_batch_size": 16},
        {"num_gpus": 2},
        {"system_prompt": "簡短。"},
        {"prompt_template": "{input}\n{output}"},
        {"prompt_template": "{input}\n\n{output}"},
    ):
        folders.add(prepare(**changes).folder)
        assert prepare().folder == first.folder
    assert len(folders) == 11


def test_a_changed_row_or_tokenizer(prepare, dataset, tokenizer_folder, tmp_path):
    before = prepare()
    changed = rows(100)
    changed[3]["output"] = "第 4 個答案。"
    for name, found in (("training", changed), ("validation", rows(30, 2000))):
        write(dataset, name, found)
        after = prepare()
        assert after.folder.parent != before.folder.parent
        assert read(after)[0][4][0] == after.chat.tokenizer.apply_chat_template(prompts.messages(changed[3]))
        before = after
    other = prompts.write_tokenizer(
        tokenizer_folder, tmp_path / "other", prepare().chat.tokenizer.chat_template.replace("\n\n", "\n")
    )
    assert prepare(other).folder.parent != before.folder.parent
    assert len(read(prepare(other))[0][4][0]) < len(read(prepare())[0][4][0])


def test_prepared_rows_that_are_not_those_of_the_template(prepare):
    """Whatever put them there: the check at the start of a run finds it."""
    prepared = prepare(packing=False)
    file = prepared.folder / "training.npy"
    good = np.load(file, allow_pickle=True)
    for change, said in (
        (lambda sample: sample["input_ids"].__setitem__(5, 7), "are not those that the chat template renders"),
        (
            lambda sample: sample["loss_mask"].__setitem__(len(sample["loss_mask"]) - 2, False),
            "the end token is not in",
        ),
    ):
        np.save(file, good)
        samples = np.load(file, allow_pickle=True)
        for sample in samples:
            change(sample)
        np.save(file, samples)
        with pytest.raises(ValueError, match=rf"training.jsonl:\d+: .*{said}"):
            prepare(packing=False)
    np.save(file, good)
    assert prepare(packing=False)


def test_overlong(prepare, dataset, capsys):
    """Left out or cut, with the numbers printed, or refused with the first line."""
    found = rows(100)
    for line in (7, 90):
        found[line - 1]["output"] = "很長的答案。" * 100
    found[49]["input"] = "很長的問題。" * 100
    write(dataset, "training", found)
    kept, _ = read(prepare(overlong="drop", seq_length=128))
    assert sorted(kept) == [line for line in range(1, 101) if line not in (7, 50, 90)]
    said = capsys.readouterr().err
    assert "training.jsonl: 3 of 100 rows have more than 128 tokens (--overlong drop): 3 are left out, 0 cut" in said
    for packing in (True, False):
        prepared = prepare(overlong="truncate", packing=packing, seq_length=128)
        kept, _ = read(prepared)
        assert sorted(kept) == [line for line in range(1, 101) if line != 50], "nothing of its answer would be left"
        whole = prepared.chat.tokenizer.apply_chat_template(prompts.messages(found[6]))
        assert kept[7][0] == whole[:128] and kept[7][1][-1]
        assert "(--overlong truncate): 1 are left out, 2 cut, and their answers do not end" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match="--overlong error: 3 rows of training.jsonl have more than 128 tokens, the first in line 7"
    ):
        prepare(overlong="error", seq_length=128)
    with pytest.raises(ValueError, match="--seq_length 8: every row of training.jsonl has more than 8 tokens"):
        prepare(seq_length=8)


def test_a_row_that_the_template_refuses(prepare, dataset):
    found = rows(100)
    found[41] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system": "s"}
    write(dataset, "training", found)
    with pytest.raises(ValueError, match=r"--dataset_path: training.jsonl:42: the chat template refuses it: it has no"):
        prepare(prompt_template="{input}\n{output}")
    assert not list((dataset / "prepared").glob("*"))


def test_what_is_doubtful_is_counted(prepare, dataset, capsys):
    found = rows(100)
    found[0]["input"] = "what does <|eot_id|> mean?"
    write(dataset, "training", found)
    prepare()
    assert "training.jsonl: 1 rows have a special token written out" in capsys.readouterr().err
    prepare(num_gpus=8, global_batch_size=8)
    said = capsys.readouterr().err
    assert "--global_batch_size 8: a step has" in said and "--no_packing trains on 8" in said


def test_too_few_validation_rows(prepare, dataset):
    write(dataset, "validation", rows(3))
    with pytest.raises(
        ValueError, match="--global_batch_size 8 is 8 rows a step, which the 3 rows of validation.jsonl"
    ):
        prepare(packing=False)


def test_samples_shown(prepare, capsys):
    prepare(show_samples=2)
    said = capsys.readouterr().out
    assert "training.jsonl:1: " in said and "training.jsonl:2: " in said and "training.jsonl:3" not in said
    assert "⟦第 0 個答案。<|eot_id|>⟧" in said


@pytest.fixture
def many(dataset):
    """So many rows that processes share them."""
    write(dataset, "training", rows(4 * instructions.CHUNK + 300))
    return dataset


def test_many_processes_give_what_one_does(prepare, many, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    shared = prepare(packing=False)
    assert "preparing training.jsonl in 2 processes" in capsys.readouterr().out
    found = read(shared)[0]
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    (many / "prepared").rename(many / "before")
    assert read(prepare(packing=False))[0] == found


def _die(*args):
    os._exit(9)


def test_a_process_that_dies_ends_it(prepare, many, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(instructions, "_work", _die)
    with pytest.raises(ValueError, match="a process that prepared training.jsonl was killed"):
        prepare()
    assert not list((many / "prepared").glob("*"))


def test_a_folder_that_cannot_be_written(prepare, dataset):
    (dataset / "prepared").write_text("in the way")
    with pytest.raises(ValueError, match="the prepared rows are kept in .*prepared, which can't be written"):
        prepare()


def test_waits_for_another_process(prepare, dataset, tokenizer_folder, tmp_path):
    """Two launches at once, as of two nodes: one prepares, both read the same."""
    import subprocess
    import sys

    code = (
        "import argparse, sys; sys.path.insert(0, sys.argv[1]); from nemo_tutorial import instructions; "
        "args = argparse.Namespace(**eval(sys.argv[2])); print('IN', instructions.prepare(args, sys.argv[3]).folder)"
    )
    values = repr(DEFAULTS | {"dataset_path": str(dataset)})
    command = [sys.executable, "-c", code, str(ROOT), values, str(tokenizer_folder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len({[line for line in text.splitlines() if line.startswith("IN")][0] for text in said}) == 1

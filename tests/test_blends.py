"""Blends for pretraining: what --dataset_path may say, Megatron's arithmetic, and the index that is built once."""

import json
import os
import random
import re
import types
from pathlib import Path

import pytest
from conftest import ROOT, script

from nemo_tutorial import blends, megatron_data

BLEND = """\
train:
  a: 70
  b: 30
validation: held
"""


@pytest.fixture
def here(tmp_path, monkeypatch, write_index):
    """A folder with four sources: a (1000 tokens), b (600), held (300), and more/c and more/d (900 and 100)."""
    monkeypatch.chdir(tmp_path)
    lengths = {"a": [10] * 100, "b": [20] * 30, "held": [30] * 10, "more/c": [9] * 100, "more/d": [10] * 10}
    for name, documents in lengths.items():
        write_index(name, documents)
    return tmp_path


def flags(**changes):
    defaults = {"seq_length": 8, "global_batch_size": 4, "max_steps": 20, "val_check_interval": 5, "seed": 1234}
    return types.SimpleNamespace(**(defaults | {"limit_val_batches": 2} | changes))


def sources(blend, number=0):
    return {part.prefix: part.weight for part in blend.parts[number]}


def problems(words, split=None):
    with pytest.raises(ValueError) as error:
        blends.read(words, split)
    assert isinstance(error.value.args[0], list)
    return "\n".join(error.value.args[0])


@pytest.mark.parametrize(
    "words, weights",
    [
        (["a"], {"a": 900.0}),
        (["a.bin"], {"a": 900.0}),
        (["a", "b"], {"a": 900.0, "b": 540.0}),  # no weights: the training tokens
        (["more"], {"more/c": 810.0, "more/d": 90.0}),
        (["a", "more"], {"a": 900.0, "more/c": 810.0, "more/d": 90.0}),
        (["0.7", "a", "0.3", "b"], {"a": 0.7, "b": 0.3}),
        (["7", "a", "2", "more"], {"a": 7.0, "more/c": 1.8, "more/d": 0.2}),  # a folder's weight, by tokens
    ],
)
def test_sources_of_the_command_line(here, words, weights):
    blend = blends.read(words, "90,10,0")
    assert sources(blend) == pytest.approx(weights)
    assert list(sources(blend, 1)) == list(weights) and blend.parts[2] == []


@pytest.mark.parametrize(
    "text",
    [
        BLEND,
        "{train: [70, a, 30, b], validation: [held]}",  # as on Megatron's command line
        json.dumps({"train": ["70", "a", "30", "b"], "valid": ["held"], "test": None}),  # Megatron's own file
        "train: {a: 7e1, b: 3e+1}\nvalidation:\n- held\n",
    ],
)
def test_blend_files(here, text):
    Path("blend.yaml").write_text(text)
    blend = blends.read(["blend.yaml"], None)
    assert sources(blend) == {"a": 70.0, "b": 30.0}
    assert list(sources(blend, 1)) == ["held"] and blend.parts[2] == [] and blend.split is None
    held = str(here / "held")
    assert blend.paths() == {
        "train": ["70.0", str(here / "a"), "30.0", str(here / "b")],
        "validation": [held],
        "test": [held],
    }


def test_blend_file_without_validation(here):
    Path("blend.yml").write_text("train:\n  a: 1\n  b: 3\n")
    blend = blends.read(["blend.yml"], "80,20,0")
    assert blend.split == "80,20,0" and blend.paths() == ["1.0", str(here / "a"), "3.0", str(here / "b")]
    assert [part.documents for part in blend.parts[1]] == [20, 6]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "needs `train:`"),
        ("- a", "needs `train:`"),
        ("train: {", "is not YAML"),
        ("trian: a", "'trian' is none of train, validation, test: train?"),
        ("validation: a", "has no `train:`"),
        ("train: a\ntest: b", "`test:` and no `validation:`"),
        ("train: a\ntraining: b", "training is there under another name already"),
        ("train: {a: 0}", "the weight 0 is not a number above 0"),
        ("train: {a: -1, b: 1}", "the weight -1 is not"),
        ("train: {a: .nan, b: 1}", "the weight nan is not"),
        ("train: {a: , b: 1}", "its weight, a number above 0"),
        ("train: {a: {x: 1}}", "its weight, a number above 0"),
        ("train: {a: much}", "much is neither a folder nor"),
        ("train: []", "sources are a path"),
        ("train:\n  a: 1\n  a: 2\n", "blend.yaml:3: a is there twice"),
        ("train: [1, a, b]", "1 a b are not weights and sources in turn"),
        ("train: [nowhere, gone]", "gone is neither a folder nor"),
        ("train: a\nvalidation: a", "a is named twice"),
        ("train: [more, more/c]", "more/c is named twice"),
    ],
)
def test_not_a_blend(here, text, said):
    Path("blend.yaml").write_text(text)
    found = problems(["blend.yaml"])
    assert said in found and "--dataset_path blend.yaml" in found


def test_every_missing_source_is_named(here):
    found = problems(["x", "a", "y"])
    assert "x is neither" in found and "y is neither" in found and found.count("\n") == 1


def test_split_beside_a_validation_set(here):
    Path("blend.yaml").write_text(BLEND)
    assert "--split 90,10,0 has no effect" in problems(["blend.yaml"], "90,10,0")


def test_a_weight_too_many(here):
    assert "70 a 30 are not weights and sources in turn" in problems(["70", "a", "30"])
    assert "a 0.3 b c are not weights" in problems(["a", "0.3", "b", "c"])


def test_splits_that_would_hang(here, write_index):
    Path("blend.yaml").write_text("train: a\nvalidation: empty")
    write_index("empty", [0, 0])
    (said,) = blends.split_problems(blends.read(["blend.yaml"], None), 8)
    assert "validation source empty has only empty documents" in said and "preprocess more" in said
    said = blends.split_problems(blends.read(["a", "b"], "99,1,0"), 8)  # 0.3 of b's 30 documents
    assert len(said) == 1 and "validation share of b (30 documents) rounds to none" in said[0] and "90,10,0" in said[0]
    said = blends.split_problems(blends.read(["a", "b"], "90,10,0"), 2000)
    assert [re.search(r"(\w) has (\d+) tokens to train on", line).groups() for line in said] == [
        ("a", "900"),
        ("b", "540"),
    ]
    assert blends.split_problems(blends.read(["a"], "90,9,1"), 8) == []


def test_a_validation_share_below_one_sample(here, capsys):
    blend, args = blends.read(["a"], "97,3,0"), flags(seq_length=64)
    assert blends.split_problems(blend, 64) == blends.plan(blend, args) == []
    blends.describe(blend, args)
    assert "validation share of a has 30 tokens: they are repeated in each sample" in capsys.readouterr().err


def test_a_source_that_is_read_a_million_times(here, write_index):
    Path("blend.yaml").write_text("train: a\nvalidation: dot")
    write_index("dot", [1])
    blend = blends.read(["blend.yaml"], None)
    (said,) = blends.plan(blend, flags(seq_length=8192, max_steps=1000, val_check_interval=10))
    assert "dot has 1 tokens" in said and "times before the first step" in said


def test_what_is_printed(here, capsys):
    Path("blend.yaml").write_text(BLEND)
    args = flags()
    blend = blends.read(["blend.yaml"], None)
    assert blends.plan(blend, args) == []
    blends.describe(blend, args)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "training a 100 1,000 70.00% 56 448 0.45",  # 20 steps x 4 samples x 8 tokens = 640
        "training b 30 600 30.00% 24 192 0.32",
        "training all 130 1,600 80 640 0.40",
        "validation held 10 300 100.00% 8 64 0.21",
    ):
        assert line in lines, lines


def test_index_folder_follows_data_and_order(here, write_index):
    """Equal runs share an index; any change of data, order or length gives another."""
    Path("blend.yaml").write_text(BLEND)
    folder = blends.index_folder(blends.read(["blend.yaml"], None), flags())
    assert folder == blends.index_folder(blends.read(["blend.yaml"], None), flags())
    others = [
        blends.index_folder(blends.read(["blend.yaml"], None), flags(**change))
        for change in (
            {"seed": 1},
            {"max_steps": 21},
            {"seq_length": 16},
            {"val_check_interval": 6},
            {"limit_val_batches": 1},
        )
    ]
    Path("blend.yaml").write_text(BLEND.replace("70", "60"))
    others.append(blends.index_folder(blends.read(["blend.yaml"], None), flags()))
    Path("blend.yaml").write_text(BLEND)
    os.utime("b.bin", ns=(1, 1))  # as large as before, but written anew
    others.append(blends.index_folder(blends.read(["blend.yaml"], None), flags()))
    assert len({folder, *others}) == len(others) + 1


# Against Megatron-Core itself.


class Tokenizer:
    """What Megatron's datasets ask of a tokenizer."""

    eod, unique_identifiers = 0, {"class": "test"}


def build(blend, args, folder):
    """The data module that a rank would build, of NeMo, with Megatron's datasets."""
    from megatron.core import parallel_state
    from nemo.collections import llm
    from torch import distributed

    data = llm.PreTrainingDataModule(
        paths=blend.paths(),
        split=blend.split,
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        micro_batch_size=1,
        seed=args.seed,
        tokenizer=Tokenizer(),
        index_mapping_dir=str(folder),
    )
    if distributed.is_initialized():  # a test of another file has loaded a model in this process
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        data.build(args.max_steps, args.val_check_interval, args.limit_val_batches, 0)
    finally:
        distributed.destroy_process_group()
    return data


def assert_as_planned(blend, args, data):
    """Each dataset's length, and the samples of each source that the run reads, counted from Megatron's own index."""
    import numpy

    read_samples = (args.max_steps * args.global_batch_size, args.limit_val_batches * args.global_batch_size)
    for parts, dataset, samples in zip(blend.parts, (data._train_ds, data._validation_ds), read_samples):
        assert len(dataset) >= samples
        sets = getattr(dataset, "datasets", [dataset])
        index = getattr(dataset, "dataset_index", numpy.zeros(len(dataset), int))[:samples]
        assert numpy.bincount(index, minlength=len(parts)).tolist() == [part.samples for part in parts]
        for part, one in zip(parts, sets):
            assert (one.dataset_path, len(one.indices)) == (str(Path(part.prefix).absolute()), part.documents)
            epochs = blends.epochs_built(part.tokens, one.num_samples, args.seq_length)
            assert len(one) == (epochs * part.tokens - 1) // args.seq_length
            assert one.document_index.size == epochs * part.documents


@pytest.mark.nemo
@pytest.mark.parametrize(
    "words, split, steps",
    [
        (["a"], "90,10,0", 20),
        (["a"], "90,5,5", 300),  # eleven epochs
        (["a", "b"], "90,10,0", 45),  # one epoch
        (["a", "b", "more"], "80,20,0", 500),
        (["0.7", "a", "0.3", "b"], "90,10,0", 33),
        (["1", "a", "1", "b", "1", "held", "2", "more"], "80,20,0", 77),
        (["0.001", "a", "10", "b"], "90,10,0", 50),
        ("train: {a: 0.55, b: 0.45}\nvalidation: {held: 1, more/d: 2}\ntest: more/c", None, 64),
        ("train: more\nvalidation: [held, a]", None, 10),
    ],
)
def test_megatron_reads_what_is_printed(here, words, split, steps):
    if isinstance(words, str):
        Path("blend.yaml").write_text(words)
        words = ["blend.yaml"]
    blend, args = blends.read(words, split), flags(max_steps=steps)
    assert blends.plan(blend, args) == []
    assert_as_planned(blend, args, build(blend, args, here / "index"))


@pytest.mark.nemo
def test_a_blend_that_megatron_stops_at(here, write_index):
    """Sources are rounded up, so the blend is longer than asked for: a source that ends just there lacks samples."""
    sources = {"w": (0.1, 214), "x": (1, 135), "y": (7.5, 85), "z": (0.1, 340)}
    words = [word for name, (weight, tokens) in sources.items() for word in (weight, write_index(name, [tokens]))]
    Path("blend.json").write_text(json.dumps({"train": words, "validation": "held"}))
    blend, args = blends.read(["blend.json"], None), flags(max_steps=12, global_batch_size=8, val_check_interval=1)
    (said,) = blends.plan(blend, args)
    assert "the training source y is a few samples too short" in said and "change its weight or --max_steps" in said
    with pytest.raises(IndexError, match="oversamples"):
        build(blend, args, here / "index")


@pytest.mark.nemo
def test_random_blends_are_as_planned(here, write_index):
    """Forty blends of two to seven sources, by a seed; those that are refused, Megatron refuses as well."""
    choose, refused = random.Random(4), 0
    for number in range(40):
        several = choose.randint(2, 7)
        names = []
        for source in range(several):
            lengths = [choose.randint(1, 60) for _ in range(choose.randint(20, 80))]
            names.append(write_index(f"random/{number}/{source}", lengths))
        words = [word for name in names for word in (str(choose.choice([1, 2, 0.1, 7.5, choose.random()])), name)]
        args = flags(max_steps=choose.randint(1, 40), global_batch_size=choose.choice([1, 8, 64]))
        args.val_check_interval = choose.randint(1, args.max_steps)
        blend = blends.read(words if choose.random() < 0.7 else names, "70,30,0")
        assert blends.split_problems(blend, args.seq_length) == []
        if blends.plan(blend, args):
            refused += 1
            with pytest.raises(IndexError, match="oversamples"):
                build(blend, args, here / f"index{number}")
        else:
            assert_as_planned(blend, args, build(blend, args, here / f"index{number}"))
    assert refused < 20


@pytest.mark.nemo
def test_turns_are_megatrons():
    """The order of a blend, far beyond what is played out turn by turn."""
    import numpy
    from megatron.core.datasets import helpers

    choose = random.Random(0)
    cases = [([0.7, 0.3], 50_000_000), ([0.1, 0.2, 0.3, 0.4], 20_000_003), ([2.0, 1.0, 1.0], 10_000_001)]
    for _ in range(60):
        scale = choose.choice([1, 20, 10**9])
        weights = [choose.uniform(0.01, 1) * scale for _ in range(choose.randint(2, 9))]
        cases.append(([round(weight, 2) for weight in weights], choose.choice([1, 2, 17, 1000, 100_000])))
    for weights, samples in cases:
        index, position = numpy.zeros(samples, numpy.int16), numpy.zeros(samples, numpy.int64)
        normal = blends.normalize(blends.normalize(weights))
        helpers.build_blending_indices(index, position, normal, len(weights), samples, False)
        assert blends.turns(weights, samples) == numpy.bincount(index, minlength=len(weights)).tolist(), weights
    samples, weights = 7_000_000, [0.123456789, 0.987654321, 0.55555]  # no period in reach: by the weights alone
    index, position = numpy.zeros(samples, numpy.int16), numpy.zeros(samples, numpy.int64)
    helpers.build_blending_indices(index, position, blends.normalize(weights), 3, samples, False)
    assert numpy.abs(numpy.bincount(index) - blends.turns(weights, samples)).max() <= 3


@pytest.mark.nemo
def test_a_run_on_a_blend(stages):
    """Two sources by weight and a validation set of its own, on two processes; the index is built before they start.

    The ranks build nothing, and neither does a second run of the same.
    """
    lines = (ROOT / "data/sample/corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("first", lines[:90]), ("second", lines[90:180]), ("held", lines[180:])):
        (stages / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
        out = ["--output_prefix", f"data/blend/{name}", "--append_eod", "--tokenizer_type", "hf_model/tiny"]
        script(stages, "data/preprocess_data_for_megatron.py", "--input", f"{name}.jsonl", *out)
    place = "data/blend/{}_text_document"
    text = {"train": {place.format("first"): 0.75, place.format("second"): 0.25}, "validation": place.format("held")}
    (stages / "blend.yaml").write_text(json.dumps(text))

    def run(name):
        begun = "--nemo_model nemo_ckpt/tiny --dataset_path blend.yaml --seq_length 128 --global_batch_size 8"
        more = "--micro_batch_size 4 --num_gpus 2 --max_steps 6 --val_check_interval 3 --num_workers 0 --lr 6e-3"
        done = script(stages, "pretraining/pretrain.py", "--experiment", name, *begun.split(), *more.split())
        return done, next((stages / "experiments" / name).rglob("combined.log")).read_text()

    root = stages / "results/.index_mapping"
    before = set(root.iterdir()) if root.is_dir() else set()
    done, log = run("blend1")
    said = " ".join(done.stdout.split())
    assert "75.00% 36 4,608" in said and "25.00% 12 1,536" in said, said[:4000]
    (folder,) = set(root.iterdir()) - before
    built = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")}
    assert sum("BlendedDataset-train-dataset_index.npy" in file.name for file in built) == 1
    record = (stages / "results/blend1/record/run.json").stat().st_mtime_ns
    assert max(time for time, _ in built.values()) < record, "the index is there before the ranks"
    assert "Build and save" not in log

    import numpy

    index = numpy.load(next(file for file in built if file.name.endswith("BlendedDataset-train-dataset_index.npy")))
    assert numpy.bincount(index[:48]).tolist() == [36, 12]
    metrics = [json.loads(line) for line in (stages / "results/blend1/record/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert sum("val_loss" in line for line in metrics) >= 2

    run("blend2")
    assert set(root.iterdir()) - before == {folder}
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*")} == built


def test_prefix_or_folder(here):
    assert megatron_data.is_there("a") and megatron_data.is_there("more") and not megatron_data.is_there("c")

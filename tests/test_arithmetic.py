"""Numbers that the scripts derive, against ones worked out by hand; and which checkpoint is the newest."""

import json
import os
import struct
from pathlib import Path

import pytest

from nemo_tutorial import checkpoints, megatron_data, models, schedule

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_1B = LLAMA_8B | {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def dataset(prefix, documents, code=8, width=2, version=1):
    """Write PREFIX.bin and .idx; a document is a list of its sequences' lengths in tokens."""
    lengths = [length for document in documents for length in document]
    starts = [width * sum(lengths[:i]) for i in range(len(lengths))]
    bounds = [sum(len(document) for document in documents[:i]) for i in range(len(documents) + 1)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, len(lengths), len(bounds))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(starts)}q", *starts)
    index += struct.pack(f"<{len(bounds)}q", *bounds)
    Path(f"{prefix}.bin").write_bytes(bytes(width * sum(lengths)))
    Path(f"{prefix}.idx").write_bytes(index)
    return str(prefix)


# Megatron's data.


@pytest.mark.parametrize("code, width", [(8, 2), (4, 4), (1, 1), (5, 8)])
def test_tokens_are_counted_in_their_width(tmp_path, code, width):
    index = megatron_data.read_index(dataset(tmp_path / "d", [[7], [11], [2]], code, width))
    assert (index.token_bytes, index.sequences, index.documents, index.tokens) == (width, 3, 3, 20)
    assert [index.tokens_before(i) for i in range(4)] == [0, 7, 18, 20]


def test_documents_of_several_sequences(tmp_path):
    index = megatron_data.read_index(dataset(tmp_path / "d", [[3, 4], [5], [1, 1, 1]], 4, 4))
    assert (index.sequences, index.documents, index.tokens) == (6, 3, 15)
    assert [index.tokens_before(i) for i in range(7)] == [0, 3, 7, 12, 13, 14, 15]


def test_a_wrong_width_is_noticed(tmp_path):
    prefix = dataset(tmp_path / "d", [[7], [11]], code=4, width=2)
    with pytest.raises(ValueError, match="truncated or changed"):
        megatron_data.read_index(prefix)


@pytest.mark.parametrize("code, version", [(8, 2), (9, 1), (6, 1)])
def test_unknown_version_or_type(tmp_path, code, version):
    with pytest.raises(ValueError, match=f"version {version} and token type {code}"):
        megatron_data.read_index(dataset(tmp_path / "d", [[7]], code, version=version))


@pytest.mark.parametrize(
    "documents, split, spans",
    [
        (1000, "998,1,1", [(0, 998), (998, 999), (999, 1000)]),
        (100, "998,1,0", [(0, 100), (100, 100), None]),
        (200, "90,10,0", [(0, 180), (180, 200), None]),
        (5, "50,50", [(0, 2), (2, 5), None]),  # 2.5 goes to the even number
        (7, "50,50", [(0, 4), (4, 7), None]),  # and so does 3.5
        (10, "1", [(0, 10), None, None]),
        (10, "0.9, 0.1", [(0, 9), (9, 10), None]),
        (10, "0,5,5", [None, (0, 5), (5, 10)]),
    ],
)
def test_split_spans(documents, split, spans):
    assert megatron_data.split_sequences(documents, split) == spans


@pytest.mark.parametrize("split", ["", "a", "1,,2", "1,2,3,4", "-1,2", "0,0", "1;2"])
def test_not_a_split(split):
    with pytest.raises(ValueError, match="--split"):
        megatron_data.split_sequences(10, split)


def test_tokens_of_each_share(tmp_path):
    index = megatron_data.read_index(dataset(tmp_path / "d", [[10 * (i + 1)] for i in range(10)]))  # 550 tokens
    assert megatron_data.split_tokens(index, "80,10,10") == [360, 90, 100]
    assert megatron_data.split_tokens(index, "80,20,0") == [360, 190, 0]


@pytest.mark.parametrize(
    "tokens, seq_length, batch, steps",
    [(6401, 64, 10, 10), (6400, 64, 10, 9), (65, 64, 1, 1), (64, 64, 1, 0), (0, 64, 1, 0), (20000, 100, 7, 28)],
)
def test_steps_per_epoch(tokens, seq_length, batch, steps):
    assert megatron_data.steps_per_epoch(tokens, seq_length, batch) == steps


def test_prefixes(tmp_path):
    for name in ("b", "a.v1"):
        dataset(tmp_path / name, [[1]])
    (tmp_path / "notes.txt").touch()
    both = [str(tmp_path / "a.v1"), str(tmp_path / "b")]
    assert megatron_data.prefixes(tmp_path) == both
    assert megatron_data.prefixes(both[0]) == both[:1]
    (tmp_path / "b.idx").unlink()
    (tmp_path / "a.v1.bin").unlink()
    with pytest.raises(ValueError, match=r"a\.v1\.bin, .*b\.idx"):
        megatron_data.prefixes(tmp_path)


# The learning rate.


@pytest.mark.parametrize("steps, warmup", [(9, 0), (10, 1), (100, 10), (20_000, 2000), (10**6, 2000)])
def test_warmup(steps, warmup):
    assert schedule.warmup_steps(steps) == warmup


@pytest.mark.parametrize("steps, warmup", [(100, 10), (1000, 0), (50, 49)])
def test_learning_rate(steps, warmup):
    lr, low = 1e-4, 1e-5
    rates = [schedule.learning_rate(step, lr, low, warmup, steps) for step in range(steps + 3)]
    assert rates[0] == pytest.approx(lr / (warmup + 1))
    assert rates[warmup] == pytest.approx(lr) and max(rates) == pytest.approx(lr)
    rising, falling = rates[: warmup + 1], rates[warmup : steps + 1]
    assert all(a < b for a, b in zip(rising, rising[1:]))
    assert all(a > b for a, b in zip(falling, falling[1:]))
    assert rates[steps:] == pytest.approx([low] * 3)


def test_learning_rate_by_hand():
    rates = [schedule.learning_rate(step, 1.0, 0.2, 4, 12) for step in (0, 3, 4, 6, 8, 12)]
    assert rates == pytest.approx([0.2, 0.8, 1.0, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2])
    assert schedule.learning_rate(99, 1.0, 0.0, 10, 100) < 0.001


# Models.


@pytest.mark.parametrize(
    "config, parameters, recipe",
    [(LLAMA_8B, 8_030_261_248, "llama31_8b"), (LLAMA_1B, 1_235_814_400, "llama32_1b")],
)
def test_parameters(tmp_path, config, parameters, recipe):
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = models.from_config(tmp_path / "config.json")
    assert (model.parameters, model.recipe) == (parameters, recipe)


def test_what_config_json_may_leave_out(tmp_path):
    config = {
        key: value for key, value in LLAMA_8B.items() if key not in ("num_key_value_heads", "tie_word_embeddings")
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": None}))
    model = models.from_config(tmp_path / "config.json")
    assert (model.num_key_value_heads, model.head_dim, model.tie_word_embeddings) == (32, 128, False)


@pytest.mark.parametrize("text, size", [("8B", 8e9), ("135M", 1.35e8), ("0.5b", 5e8), (" 70B ", 7e10)])
def test_parse_size(text, size):
    assert models.parse_size(text) == pytest.approx(size)


@pytest.mark.parametrize("text", ["8", "B", "8 B", "8GB", "-8B", "", "8x7B"])
def test_not_a_size(text):
    with pytest.raises(ValueError, match="8B or 135M"):
        models.parse_size(text)


def test_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--o--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc\n")
    assert models.hub_snapshot("o/m") is None
    (snapshot / "config.json").touch()
    assert models.hub_snapshot("o/m") == models.hf_folder("o/m") == snapshot
    assert models.hub_snapshot("o/other") is None


# Checkpoints.


def checkpoint(path, data="PreTrainingDataModule", adapter=False):
    path = Path(path)
    (path / "weights").mkdir(parents=True)
    (path / "context").mkdir()
    for name in ("metadata.json", ".metadata", "common.pt", "__0_0.distcp"):
        (path / "weights" / name).touch()
    module = {"items": [], "paths": ["<root>.extra['datamodule']"], "metadata": {"type": "ref", "key": "class"}}
    name = {"items": [["Attr(name='fn_or_cls')", {"type": "pyref", "name": data}]]}
    (path / "context/io.json").write_text(json.dumps({"objects": {"data": module, "class": name}}))
    if adapter:
        (path / "weights/adapter_metadata.json").write_text("{}")
    return path


@pytest.mark.parametrize(
    "name, step",
    [
        ("llama--reduced_train_loss=7.61-step=9-consumed_samples=80.0", 10),
        ("llama--reduced_train_loss=7.61-step=19-consumed_samples=160.0-last", 20),
        ("m--step=0", 1),
        ("tiny", 0),
    ],
)
def test_step(name, step):
    assert checkpoints.step(Path("results/run/checkpoints") / name) == step


def test_latest_by_number_and_not_by_name_or_age(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    newest = checkpoint(tmp_path / "checkpoints/m--step=19")
    checkpoint(tmp_path / "checkpoints/m--step=9")
    checkpoint(tmp_path / "checkpoints/m--step=9-last")
    assert checkpoints.latest(tmp_path) == newest


def test_latest_prefers_last_and_follows_links(tmp_path):
    real = checkpoint(tmp_path / "checkpoints/m--step=19")
    link = tmp_path / "checkpoints/m--step=19-last"
    link.symlink_to(real.name)
    assert checkpoints.latest(tmp_path) == link
    Path(f"{real}-unfinished").touch()  # the marker is beside the link's target
    assert checkpoints.latest(tmp_path) is None


def test_a_broken_link_is_passed_over(tmp_path):
    older = checkpoint(tmp_path / "checkpoints/m--step=9")
    (tmp_path / "checkpoints/m--step=19-last").symlink_to("m--step=19")
    assert checkpoints.latest(tmp_path) == older


def test_unfinished_and_incomplete_are_never_the_latest(tmp_path):
    older = checkpoint(tmp_path / "checkpoints/m--step=9")
    unfinished = checkpoint(tmp_path / "checkpoints/m--step=19")
    Path(f"{unfinished}-unfinished").touch()
    (checkpoint(tmp_path / "checkpoints/m--step=29") / "weights/.metadata").unlink()
    assert checkpoints.latest(tmp_path) == older
    Path(f"{unfinished}-unfinished").unlink()
    assert checkpoints.latest(tmp_path) == unfinished


def test_newest_pretraining(tmp_path):
    def aged(path, age, **kwargs):
        path = checkpoint(tmp_path / path, **kwargs)
        os.utime(path, (10**9 - age, 10**9 - age))
        return path

    assert checkpoints.newest_pretraining(tmp_path) is None
    aged("old/checkpoints/m--step=99", age=9)
    aged("new/checkpoints/m--step=9", age=4)
    newest = aged("new/checkpoints/m--step=19", age=5)
    aged("tuned/checkpoints/m--step=9", age=2, data="FineTuningDataModule")
    aged("lora/checkpoints/m--step=9", age=1, adapter=True)
    unfinished = aged("cut/checkpoints/m--step=9", age=0)
    Path(f"{unfinished}-unfinished").touch()
    assert checkpoints.newest_pretraining(tmp_path) == newest


# Outputs, whole or not at all.


def test_published_whole(tmp_path):
    output = tmp_path / "deep/out"
    with checkpoints.published(output) as partial:
        partial.mkdir()
        (partial / "a").write_text("new")
        assert not output.exists() and partial.parent == output.parent
    assert (output / "a").read_text() == "new"
    assert os.listdir(output.parent) == ["out"]


def test_published_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoints.published(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "a").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_old_output_stays_when_the_new_one_fails(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")
    with pytest.raises(error), checkpoints.published(tmp_path / "out", overwrite=True) as partial:
        partial.mkdir()
        assert (tmp_path / "out/a").read_text() == "old"
        raise error(1)
    assert (tmp_path / "out/a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_replaces_all_of_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")
    with checkpoints.published(tmp_path / "out", overwrite=True) as partial:
        partial.mkdir()
        (partial / "b").write_text("new")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["b"]


def test_an_output_that_appeared_meanwhile_stays(tmp_path):
    with pytest.raises(FileExistsError), checkpoints.published(tmp_path / "out") as partial:
        partial.mkdir()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/a").write_text("another's")
    assert (tmp_path / "out/a").read_text() == "another's"
    assert os.listdir(tmp_path) == ["out"]

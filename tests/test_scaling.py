"""slurm/SCALING.md: every command is accepted, derives what the page says, and fits; its table is of its commands."""

import importlib.util
import re
import struct

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)
TEXT = scaling.PAGE.read_text(encoding="utf-8")
COMMANDS = scaling.commands(TEXT)
ROWS = re.findall(r"^\| (\d+) (\S+) \| (.*) \|$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, nemo_checkpoint, write_rows):
    """A folder in which the page's commands can be planned: models of these shapes, and enough data."""
    folder = tmp_path_factory.mktemp("cluster")
    scaling.make_models(folder)
    for name, model in [("8b", "Llama-3.1-8B"), ("70b", "Llama-3.1-70B"), ("405b", "Llama-3.1-405B")]:
        config = {**scaling.config(name), "head_dim": 128}
        nemo_checkpoint(folder / "nemo_ckpt" / model, config)
        hf(folder / name, folder / "hf_model" / model)
    hf(folder / "30b-a3b", folder / "hf_model/Qwen3-30B-A3B")
    write_rows(folder / "data/alpaca", 5000, 5000)
    documents, tokens = 1000, 800_000
    prefix = folder / "data/custom_dataset/preprocessed/text"
    prefix.parent.mkdir(parents=True)
    with open(f"{prefix}.bin", "wb") as file:  # a hole: nothing reads it
        file.truncate(documents * tokens * 4)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, documents, documents + 1)
    index += struct.pack(f"<{documents}i", *[tokens] * documents)
    index += struct.pack(f"<{documents}q", *range(0, documents * tokens * 4, tokens * 4))
    index += struct.pack(f"<{documents + 1}q", *range(documents + 1))
    prefix.with_suffix(".idx").write_bytes(index)
    return folder


def hf(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)
    (source / "tokenizer.json").write_text("{}")


def test_the_page_covers_what_it_promises():
    assert {name for _, name, _ in COMMANDS} == set(scaling.SHAPES)
    assert {gpu for gpu, _, _ in COMMANDS} == {"H100", "H200", "B200"}
    worlds = [int(row[2].split()[0].replace(",", "")) for row in ROWS]
    assert min(worlds) == 8 and max(worlds) == 2048
    assert {int(number) for number in re.findall(r"^(\d+)\. ", TEXT, re.MULTILINE)} == set(range(1, len(COMMANDS) + 1))
    assert len(COMMANDS) == TEXT.count("python pretraining/") + TEXT.count("python finetuning/")


def test_the_table_is_that_of_the_commands(cluster):
    assert scaling.table(TEXT, cluster) in TEXT, "python benchmarks/scaling.py --write"


def test_counting_is_nvidias(cluster):
    """4.74e14 FLOP for a sample of 8,192 tokens of the 8B, as NVIDIA publishes; and its tokens/s at its share."""
    model = scaling.models.from_config(cluster / "8b/config.json")
    a_token = scaling.flops_a_token(model, 8192)
    assert a_token * 8192 == pytest.approx(4.74e14, rel=0.01)
    for name, published in (("8b", 10_682), ("70b", 1_118), ("405b", 206)):
        model = scaling.models.from_config(cluster / name / "config.json")
        share = published * scaling.flops_a_token(model, 8192) / scaling.GPUS["H100"].peak
        assert share == pytest.approx(scaling.UTILIZATION[name], abs=0.01), name


@pytest.mark.parametrize("number", range(1, len(COMMANDS) + 1))
def test_command(cluster, number, load_script, monkeypatch, capsys):
    """Its dry run prints the layout, the micro batches and the memory of the page's table; and 8 % stay free."""
    gpu, name, words = COMMANDS[number - 1]
    row_number, row_name, cells = ROWS[number - 1]
    assert (int(row_number), row_name) == (number, name)
    gpus, layout, batch, memory, *_ = cells.split(" | ")
    monkeypatch.chdir(cluster)
    load_script(words[0]).main([*words[1:], "--dry_run"])
    said = capsys.readouterr().out
    nodes = int(gpus.split()[0].replace(",", "")) // 8
    assert f"{nodes} x 8 GPUs" in said and gpus.endswith(gpu)
    assert layout.split(", ")[0] in said and ("experts over 8" in layout) == ("experts over 8" in said)
    if words[0].startswith("pretraining"):
        assert f"; {batch.split(', ')[1]} micro batches a GPU" in said
    needed, limit = (float(part) for part in re.search(r"together +([\d.]+) GiB of ([\d.]+) GiB", said).groups())
    assert memory == f"{needed:.0f} of {limit:.0f} GiB" and limit == scaling.GPUS[gpu].memory
    assert needed < 0.92 * limit and ": fits" in said

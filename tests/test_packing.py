"""Rows into packs: none lost, none too long, little left empty, and a step has the rows that were asked for."""

import sys

import pytest
from conftest import ROOT

from nemo_tutorial import packing

sys.path.insert(0, str(ROOT / "benchmarks"))
import lengths  # noqa: E402


@pytest.mark.parametrize("kind", lengths.KINDS)
@pytest.mark.parametrize("size", [4096, 8192])
def test_packs_are_full(kind, size):
    rows = lengths.draw(kind, 100_000, size)
    packs = packing.pack(rows, size, seed=1)
    assert sorted(index for pack in packs for index in pack) == list(range(len(rows)))
    assert max(sum(rows[index] for index in pack) for pack in packs) <= size
    assert sum(rows) / len(packs) / size >= 0.995


def test_rows_of_all_lengths_are_mixed():
    """Packs are alike in their number of rows, so that steps are: within a third of the mean, nearly all."""
    rows = lengths.draw("alpaca", 20_000, 4096)
    counts = [len(pack) for pack in packing.pack(rows, 4096, seed=1)]
    mean = sum(counts) / len(counts)
    assert sum(abs(count - mean) < mean / 3 for count in counts) > 0.9 * len(counts)


def test_the_seed_decides():
    rows = lengths.draw("alpaca", 500, 1024)
    assert packing.pack(rows, 1024, 1) == packing.pack(rows, 1024, 1) != packing.pack(rows, 1024, 2)


@pytest.mark.parametrize("rows, packs", [([5], [[0]]), ([8, 8, 8], 3), ([8, 1, 7], 2), ([1] * 16, 2)])
def test_small(rows, packs):
    found = packing.pack(rows, 8, seed=0)
    assert found == packs if isinstance(packs, list) else len(found) == packs


def test_a_row_longer_than_a_pack():
    with pytest.raises(ValueError, match="9 tokens does not fit a pack of 8"):
        packing.pack([1, 9], 8, seed=0)


@pytest.mark.parametrize("rows", [32, 128, 512, 2048])
@pytest.mark.parametrize("ranks", [1, 4, 8])
@pytest.mark.parametrize("kind", lengths.KINDS)
def test_a_step_has_the_rows_asked_for(rows, ranks, kind):
    """Within a twentieth, as long as a pack for each rank holds the longest row."""
    found = lengths.draw(kind, 20_000, 2048)
    size = packing.pack_size(found, max(found), rows, ranks, 8192)
    assert max(found) <= size <= 8192 and size % 16 == 0
    packs = packing.pack(found, size, seed=0)
    batch = packing.packs_a_step(rows, len(found) / len(packs), ranks)
    assert batch % ranks == 0
    got = batch * len(found) / len(packs)
    least = ranks * max(found) * len(found) / sum(found)  # a pack for each rank, as short as the longest row allows
    assert got == pytest.approx(rows, rel=0.05) or got == pytest.approx(least, rel=0.05)


def test_a_pipeline_gets_micro_batches():
    rows = lengths.draw("alpaca", 20_000, 512)
    assert packing.packs_a_step(128, 8192 / 220, 1) < 8
    size = packing.pack_size(rows, max(rows), 128, 1, 8192, micro_batches=8)
    packs = packing.pack(rows, size, seed=0)
    assert packing.packs_a_step(128, len(rows) / len(packs), 1) == 8


def test_validation_fills_whole_batches_with_every_row():
    rows = lengths.draw("alpaca", 777, 2048)
    packs = packing.spread(rows, 4096, 8)
    assert len(packs) % 8 == 0 and len(packs) >= sum(rows) / 4096
    assert sorted(index for pack in packs for index in pack) == list(range(len(rows)))
    fills = [sum(rows[index] for index in pack) for pack in packs]
    assert max(fills) <= 4096 and min(fills) > 0.9 * max(fills), "evenly, so that each batch counts alike"
    assert packing.spread(rows[:7], 4096, 8) == []

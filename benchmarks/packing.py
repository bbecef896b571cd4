"""How full our packs are and how long packing takes, against NeMo's own packer on the same lengths.

    python benchmarks/packing.py
    python benchmarks/packing.py --rows 20000

NeMo's takes minutes for each line with 100,000 rows: it looks at every pack for every row, and adds it up anew.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lengths

from nemo_tutorial import packing, terminal


def ours(rows, size):
    return [[rows[index] for index in pack] for pack in packing.pack(rows, size, seed=0)]


def stock(rows, size):
    """NeMo's default, as FineTuningDataModule packs: from a histogram of the lengths."""
    from nemo.utils.sequence_packing_utils import create_packing_strategy

    histogram = [0] * (size + 1)
    for length in rows:
        histogram[length] += 1
    return create_packing_strategy(histogram, size, "first_fit_shuffle")[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="[100000]")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths [0]")
    parser.add_argument("--without_nemo", action="store_true", help="measure only ours")
    args = parser.parse_args()
    packers = [("ours", ours)] if args.without_nemo else [("ours", ours), ("NeMo", stock)]
    if not args.without_nemo:
        import nemo.utils.sequence_packing_utils  # noqa: F401  so that its import is in no measurement
    table = []
    for kind in lengths.KINDS:
        for size in (4096, 8192):
            rows, seconds = lengths.draw(kind, args.rows, size, args.seed), {}
            for name, packer in packers:
                began = time.perf_counter()
                packs = packer(rows, size)
                seconds[name] = time.perf_counter() - began
                assert sorted(length for pack in packs for length in pack) == sorted(rows)
                assert max(map(sum, packs)) <= size
                fill = sum(rows) / len(packs) / size
                ratio = f"{seconds[name] / seconds['ours']:.0f}"
                table.append([kind, size, name, len(packs), f"{fill:.2%}", f"{seconds[name]:.2f}", ratio])
                print(*table[-1], flush=True)
    print()
    terminal.table(["lengths", "pack", "packer", "packs", "full", "seconds", "x ours"], table)


if __name__ == "__main__":
    main()

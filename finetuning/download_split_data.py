"""Download instruction data and split it into training.jsonl, validation.jsonl and test.jsonl.

From the repository root, with no arguments, the Traditional Chinese Alpaca data of the tutorial:

    python finetuning/download_split_data.py

writes data/alpaca/. --dataset takes any Hub id, a local folder, or a .jsonl file, in Alpaca's form
(instruction, input, output); a row of the output is {"input": ..., "output": ...}.
"""

import json
import random
import sys
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, preflight, terminal

NAMES = ("training", "validation", "test")


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "--dataset",
        default="erhwenkuo/alpaca-data-gpt4-chinese-zhtw",
        help="Hub id, folder or .jsonl file [erhwenkuo/alpaca-data-gpt4-chinese-zhtw]",
    )
    parser.add_argument("--split", default="train", help="the Hub dataset's split [train]")
    parser.add_argument("--ratios", default="98,1,1", help="shares of training, validation, test [98,1,1]")
    parser.add_argument("--seed", type=int, default=1234, help="of the shuffle [1234]")
    parser.add_argument("--output_path", default="data/alpaca", help="[data/alpaca]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def ratios(text):
    """'98,1,1' -> [98.0, 1.0, 1.0]. Raises ValueError in a sentence."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0 or shares[1] <= 0:
        raise ValueError(f"--ratios {text!r} is not three shares, training and validation above 0, such as 98,1,1")
    return shares


def read_rows(args):
    """The rows of --dataset: an iterable of dicts. Exits 1 with file and line number if a line is bad."""
    if args.dataset.endswith(".jsonl"):
        with open(args.dataset, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    terminal.fail([f"{args.dataset}:{number} is not JSON ({error}); nothing was written"], code=1)
        return
    from datasets import load_dataset

    try:
        yield from load_dataset(args.dataset, split=args.split)
    except Exception as error:  # the Hub's and the readers' errors are many; each says what to do
        terminal.fail([f"--dataset {args.dataset}: {error}"], code=1)


def to_pair(row, place):
    """An Alpaca row as {"input", "output"}; exits 1 if it isn't one."""
    if not isinstance(row, dict) or not isinstance(row.get("output"), str) or not row.get("instruction"):
        terminal.fail([f"{place} is not in Alpaca's form (instruction, input, output); nothing was written"], code=1)
    question = "\n".join([row["instruction"].strip(), (row.get("input") or "").strip()]).strip()
    return {"input": question, "output": row["output"].strip()}


def split(pairs, shares, seed):
    """Shuffle and split: every share above 0 gets at least one row, and no question is in two of them."""
    random.Random(seed).shuffle(pairs)
    sizes = [max(1, round(len(pairs) * share / sum(shares))) if share else 0 for share in shares[1:]]
    first = len(pairs) - sum(sizes)
    return pairs[:first], pairs[first : first + sizes[0]], pairs[first + sizes[0] :]


def main(argv=None):
    args = parse_args(argv)
    problems, shares = [], None
    try:
        shares = ratios(args.ratios)
    except ValueError as error:
        problems.append(str(error))
    if args.dataset.endswith(".jsonl") and not Path(args.dataset).is_file():
        problems.append(f"--dataset {args.dataset} is not a file")
    preflight.report(problems + preflight.output_problems(args, [args.dataset] if Path(args.dataset).exists() else []))
    terminal.describe(
        "split", [("dataset", args.dataset), ("ratios", args.ratios), ("seed", args.seed), ("output", args.output_path)]
    )
    if args.dry_run:
        return
    pairs, seen, repeated = [], set(), 0
    for number, row in enumerate(read_rows(args), 1):
        pair = to_pair(row, f"{args.dataset}:{number}")
        if pair["input"] in seen:
            repeated += 1
            continue
        seen.add(pair["input"])
        pairs.append(pair)
    if len(pairs) < 3:
        terminal.fail([f"--dataset {args.dataset} holds {len(pairs)} different rows; three are the least"], code=1)
    with checkpoints.published(args.output_path, args.overwrite) as partial:
        partial.mkdir()
        parts = split(pairs, shares, args.seed)
        for name, part in zip(NAMES, parts):
            with open(partial / f"{name}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in part)
    terminal.describe(
        "written",
        [
            ("folder", args.output_path),
            *((name, f"{len(part):,} rows") for name, part in zip(NAMES, parts)),
            ("left out", f"{repeated} repeated questions" if repeated else None),
        ],
    )


if __name__ == "__main__":
    main()

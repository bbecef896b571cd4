"""Write the texts of any dataset, of the Hugging Face Hub or local, as JSON lines, a document a line.

From the repository root, with no arguments, the Traditional Chinese news of the tutorial:

    python data/download_pretrain_data.py

writes data/custom_dataset/json/wikinews-zhtw.jsonl. --dataset takes Hub ids, files (parquet, jsonl, json, csv, txt;
.gz and .zst too), folders of them, and what `datasets` saved to disk. Nothing but the output is kept: memory and disk
do not grow with the dataset.
"""

import json
import sys
import time
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, corpora, preflight, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "--dataset",
        nargs="+",
        default=["erhwenkuo/wikinews-zhtw"],
        help="Hub ids, files or folders, read one after the other [erhwenkuo/wikinews-zhtw]",
    )
    parser.add_argument("--subset", help="of a Hub dataset that has several, such as 20231101.zh")
    parser.add_argument("--split", default="train", help="[train]")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub dataset [main]")
    parser.add_argument("--text_column", default="text", help="the column that holds the text [text]")
    parser.add_argument("--limit", type=arguments.positive, help="stop after this many documents [all]")
    parser.add_argument("--output_path", help="[data/custom_dataset/json/NAME.jsonl]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments.add_dry_run(parser)
    args = parser.parse_args(argv)
    name = Path(args.dataset[0]).name.split(".jsonl")[0] + (f"-{args.subset}" if args.subset else "")
    args.output_path = args.output_path or f"data/custom_dataset/json/{name}.jsonl"
    return args


def output_problems(args, output):
    if output.exists() and not args.overwrite:
        return [f"--output_path {output} exists; choose another, or replace it with --overwrite"]
    if output.is_dir() or any(output.resolve() == Path(name).resolve() for name in args.dataset):
        return [f"--output_path {output} is a folder, or the dataset itself; choose another"]
    return []


def documents(args, counts):
    """The documents as lines of JSON; those that are empty are counted and left out. Raises ValueError."""
    for name in args.dataset:
        for place, text in corpora.rows(name, args.split, args.subset, args.revision, args.text_column):
            if text is None or (isinstance(text, str) and not text.strip()):
                counts["empty"] += 1
                continue
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ValueError(f"{place} has a {kind} under {args.text_column}; name a --text_column of texts")
            try:
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            except UnicodeEncodeError:
                raise ValueError(f"{place} has half a character (a lone surrogate); mend or remove it") from None
            counts["documents"] += 1
            counts["bytes"] += len(line)
            yield line
            if counts["documents"] == args.limit:
                return


def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output_path)
    problems = corpora.problems("--dataset", args.dataset, args.subset, args.revision)
    preflight.report(problems + output_problems(args, output))
    terminal.describe(
        "download",
        [
            ("dataset", f"{' '.join(args.dataset)}, split {args.split}, column {args.text_column}"),
            ("documents", f"the first {args.limit:,}" if args.limit else "all"),
            ("output", output),
        ],
    )
    if args.dry_run:
        return
    counts, said = {"documents": 0, "bytes": 0, "empty": 0}, time.monotonic()
    try:
        with checkpoints.published_file(output) as file:
            for line in documents(args, counts):
                file.write(line)
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    size = terminal.gigabytes(counts["bytes"])
                    print(f"  {counts['documents']:,} documents, {size}", file=sys.stderr, flush=True)
            if not counts["documents"]:
                raise ValueError(f"split {args.split} has no text under {args.text_column}")
    except ValueError as error:
        flag = "" if str(error).startswith("--") else "--dataset: "
        terminal.fail([f"{flag}{error}; nothing was written"], code=1)
    except OSError as error:
        terminal.fail([f"--output_path {output}: {error}; nothing was written"], code=1)
    terminal.describe(
        "downloaded",
        [
            ("documents", f"{counts['documents']:,}"),
            ("left out", f"{counts['empty']:,} without text" if counts["empty"] else None),
            ("file", f"{output}, {terminal.gigabytes(counts['bytes'])}"),
        ],
    )


if __name__ == "__main__":
    main()

"""Download a text dataset from the Hugging Face Hub as JSON lines, a document a line.

From the repository root, with no arguments, the Traditional Chinese news of the tutorial:

    python data/download_pretrain_data.py

writes data/custom_dataset/json/wikinews-zhtw.jsonl. --dataset takes any Hub id, or a local folder.
"""

import json
import os
import sys
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, preflight, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--dataset", default="erhwenkuo/wikinews-zhtw", help="[erhwenkuo/wikinews-zhtw]")
    parser.add_argument("--split", default="train", help="[train]")
    parser.add_argument("--text_column", default="text", help="the column that holds the text [text]")
    parser.add_argument("--limit", type=arguments.positive, help="stop after this many documents [all]")
    parser.add_argument("--output_path", help="[data/custom_dataset/json/NAME.jsonl]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments.add_dry_run(parser)
    args = parser.parse_args(argv)
    name = Path(args.dataset).name
    args.output_path = args.output_path or f"data/custom_dataset/json/{name}.jsonl"
    return args


def main(argv=None):
    args = parse_args(argv)
    output = Path(args.output_path)
    preflight.report(
        [f"--output_path {output} exists; choose another, or replace it with --overwrite"]
        if output.exists() and not args.overwrite
        else []
    )
    terminal.describe(
        "download",
        [
            ("dataset", f"{args.dataset}, split {args.split}, column {args.text_column}"),
            ("output", output),
        ],
    )
    if args.dry_run:
        return

    from datasets import load_dataset

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    count = 0
    try:
        try:
            rows = load_dataset(args.dataset, split=args.split, streaming=True)
            columns = rows.column_names
        except Exception as error:  # the Hub's and the readers' errors are many; each says what to do
            terminal.fail([f"--dataset {args.dataset}: {error}"], code=1)
        if columns and args.text_column not in columns:
            terminal.fail([f"--text_column {args.text_column}: {args.dataset} has {', '.join(columns)}"], code=1)
        with open(partial, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"text": row[args.text_column]}, ensure_ascii=False) + "\n")
                count += 1
                if count == args.limit:
                    break
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    terminal.describe("downloaded", [("documents", f"{count:,}"), ("file", output)])


if __name__ == "__main__":
    main()

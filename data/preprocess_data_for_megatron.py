"""Turn JSON lines into Megatron's .bin and .idx files: tokens, ready for pretraining/pretrain.py.

The flags are those of the script of this name that older NeMo containers had. From the repository root:

    python data/preprocess_data_for_megatron.py \\
        --input=data/custom_dataset/json/wikinews-zhtw.jsonl --json-keys=text --dataset-impl mmap \\
        --tokenizer-library=huggingface --tokenizer-type Llama-3.1-8B-Instruct \\
        --output-prefix=data/custom_dataset/preprocessed/wikinews --append-eod

writes data/custom_dataset/preprocessed/wikinews_text_document.bin and .idx.
"""

import json
import os
import sys
import time
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, models, preflight, terminal

BATCH = 1000  # documents handed to the tokenizer's threads at a time


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--input", required=True, help="JSON lines, one document a line")
    parser.add_argument("--json_keys", nargs="+", default=["text"], help="fields to tokenize, a file pair each [text]")
    parser.add_argument("--output_prefix", required=True, help="the files are named PREFIX_KEY_document.bin and .idx")
    parser.add_argument("--tokenizer_type", required=True, help="Hugging Face folder or Hub id")
    parser.add_argument("--tokenizer_library", choices=("huggingface",), default="huggingface", help="[huggingface]")
    parser.add_argument("--dataset_impl", choices=("mmap",), default="mmap", help="[mmap]")
    parser.add_argument("--append_eod", action="store_true", help="end each document with the end token: recommended")
    parser.add_argument("--workers", type=arguments.positive, help="tokenizer threads [all cores]")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def output_prefix(args, key):
    """Megatron's name for the files of one field, without .bin or .idx."""
    return f"{args.output_prefix}_{key}_document"


def input_problems(args):
    problems = []
    if not Path(args.input).is_file():
        problems.append(f"--input {args.input} is not a file; python data/download_pretrain_data.py makes one")
    for key in args.json_keys:
        for suffix in (".bin", ".idx"):
            file = Path(output_prefix(args, key) + suffix)
            if file.exists() and not args.overwrite:
                problems.append(f"--output_prefix: {file} exists; choose another, or replace it with --overwrite")
    if models.hf_folder(args.tokenizer_type) is None and not models.is_hub_id(args.tokenizer_type):
        problems.append(f"--tokenizer_type {args.tokenizer_type} is neither a folder nor a Hub id (OWNER/MODEL)")
    if not args.append_eod:
        terminal.warn("without --append_eod nothing marks where a document ends, and the model never learns to stop")
    return problems


def documents(args, lines):
    """The (line number, row) of each line of the input; exits 1 with file and line number if one is bad."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            terminal.fail([f"{args.input}:{number} is not JSON ({error}); nothing was written"], code=1)
        missing = [key for key in args.json_keys if not isinstance(row, dict) or not isinstance(row.get(key), str)]
        if missing:
            terminal.fail(
                [f"{args.input}:{number} has no text under {', '.join(missing)}; nothing was written"], code=1
            )
        yield row


def batches(rows):
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def main(argv=None):
    args = parse_args(argv)
    preflight.report(input_problems(args))
    terminal.describe(
        "preprocess",
        [
            ("input", f"{args.input}, {terminal.gigabytes(Path(args.input).stat().st_size)}"),
            ("tokenizer", args.tokenizer_type),
            ("output", ", ".join(output_prefix(args, key) + ".bin/.idx" for key in args.json_keys)),
            ("end of document", "appended" if args.append_eod else "not marked"),
            ("threads", args.workers or os.cpu_count()),
        ],
    )
    if args.dry_run:
        return
    if args.workers:
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    import numpy
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import AutoTokenizer

    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_type)
    encode, eod = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    if args.append_eod and eod is None:
        terminal.fail([f"--append_eod: the tokenizer {args.tokenizer_type} has no end token"])
    dtype = DType.optimal_dtype(len(tokenizer))
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    partial = {key: f"{output_prefix(args, key)}.{os.getpid()}.partial" for key in args.json_keys}
    builders = {key: IndexedDatasetBuilder(partial[key] + ".bin", dtype=dtype) for key in args.json_keys}
    count = dict.fromkeys(args.json_keys, 0)
    tokens, empty = 0, 0
    try:
        with open(args.input, "rb") as lines:
            for batch in batches(documents(args, lines)):
                for key, builder in builders.items():
                    # No special tokens, as in NeMo's script; the end of a document is --append-eod's.
                    for text in encode.encode_batch_fast([row[key] for row in batch], add_special_tokens=False):
                        ids = text.ids + [eod] if args.append_eod and text.ids else text.ids
                        if not ids:
                            empty += 1
                            continue
                        builder.add_document(numpy.array(ids, dtype=dtype), [len(ids)])
                        count[key] += 1
                        tokens += len(ids)
        if min(count.values()) == 0:
            terminal.fail([f"--input {args.input} holds no text; nothing was written"], code=1)
        for key, builder in builders.items():
            builder.finalize(partial[key] + ".idx")
        for key in args.json_keys:
            # The index last: a .bin without its .idx is never taken for a dataset.
            os.replace(partial[key] + ".bin", output_prefix(args, key) + ".bin")
            os.replace(partial[key] + ".idx", output_prefix(args, key) + ".idx")
    finally:
        for name in partial.values():
            Path(name + ".bin").unlink(missing_ok=True)
            Path(name + ".idx").unlink(missing_ok=True)
    seconds = time.monotonic() - began
    terminal.describe(
        "preprocessed",
        [
            ("documents", f"{sum(count.values()):,}" + (f", {empty} empty ones left out" if empty else "")),
            ("tokens", f"{tokens:,} of {numpy.dtype(dtype).itemsize} bytes"),
            ("files", ", ".join(output_prefix(args, key) + ".bin/.idx" for key in args.json_keys)),
            ("seconds", f"{seconds:.1f}"),
        ],
    )


if __name__ == "__main__":
    main()

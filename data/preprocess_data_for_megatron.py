"""Turn texts into Megatron's .bin and .idx files: tokens, ready for pretraining/pretrain.py.

The flags are those of the script of this name that older NeMo containers had. From the repository root:

    python data/preprocess_data_for_megatron.py \\
        --input=data/custom_dataset/json/wikinews-zhtw.jsonl --json-keys=text --dataset-impl mmap \\
        --tokenizer-library=huggingface --tokenizer-type Llama-3.1-8B-Instruct \\
        --output-prefix=data/custom_dataset/preprocessed/wikinews --append-eod

writes data/custom_dataset/preprocessed/wikinews_text_document.bin and .idx, .json (how it was made; training checks the
tokenizer against it) and .png (the lengths). Killed, the same command goes on from what was finished.
"""

import ctypes
import errno
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import (
    arguments,
    dataset_report,
    dataset_writer,
    documents,
    models,
    preflight,
    terminal,
    tokenization,
    workers,
)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHOWN = 10  # bad lines that are named, of those skipped


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="files, globs, folders: see data/README.md")
    parser.add_argument("--json_keys", nargs="+", default=["text"], help="fields to tokenize, a file pair each [text]")
    parser.add_argument("--output_prefix", required=True, help="the files are named PREFIX_KEY_document.bin and .idx")
    parser.add_argument("--tokenizer_type", required=True, help="Hugging Face folder or Hub id")
    parser.add_argument("--tokenizer_library", choices=("huggingface",), default="huggingface", help="[huggingface]")
    parser.add_argument("--dataset_impl", choices=("mmap",), default="mmap", help="[mmap]")
    parser.add_argument("--append_eod", action="store_true", help="end each document with the end token: recommended")
    parser.add_argument("--add_bos", action="store_true", help="the tokenizer's own special tokens too, as Megatron-LM")
    parser.add_argument("--on_error", choices=("stop", "skip"), default="stop", help="what a bad line does [stop]")
    parser.add_argument("--workers", type=arguments.positive, help="processes [all cores]")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files once the new are done")
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def input_problems(args):
    """Fill in the inputs' paths and the number of workers; return what is wrong."""
    args.paths, problems = documents.expand(args.input)
    args.workers = args.workers or len(os.sched_getaffinity(0))
    for path in args.paths:
        if documents.form(path) == "text" and args.json_keys != ["text"]:
            problems.append(f"--json_keys {' '.join(args.json_keys)}: {path} is plain text, whose only field is text")
    if len(set(args.json_keys)) < len(args.json_keys):
        problems.append(f"--json_keys {' '.join(args.json_keys)} names a field twice")
    for key in args.json_keys:
        for suffix in (".bin", ".idx"):
            file = Path(dataset_writer.final(args.output_prefix, key) + suffix)
            if file.exists() and not args.overwrite:
                problems.append(f"--output_prefix: {file} exists; choose another, or replace it with --overwrite")
    if models.hf_folder(args.tokenizer_type) is None and not models.is_hub_id(args.tokenizer_type):
        problems.append(f"--tokenizer_type {args.tokenizer_type} is neither a folder nor a Hub id (OWNER/MODEL)")
    if not args.append_eod:
        terminal.warn("without --append_eod nothing marks where a document ends, and the model never learns to stop")
    return problems


def choose_tokenizer(args, sample):
    """The fastest library with Hugging Face's ids: (reference, texts -> ids, library, tokens a byte of the sample)."""
    # In a process of its own, which ends: transformers takes 150 MB. matplotlib takes as long to be imported.
    with workers.aside(lambda: tokenization.reference(args.tokenizer_type, args.add_bos, sample)) as asked:
        dataset_report.import_matplotlib()
        try:
            reference, texts, expected = asked()
        except tokenization.Unusable as error:
            terminal.fail([str(error)])
    if args.append_eod and reference.eod is None:
        terminal.fail([f"--append_eod: the tokenizer {args.tokenizer_type} has no end token"])
    if reference.lost_by_nemo:
        example = reference.lost_by_nemo[0]
        terminal.warn(f"NeMo's own script would write other ids for texts like {example!r}, and lose an added token")
    tokens = sum(map(len, expected[: len(sample)]))
    density = tokens / max(1, sum(len(text.encode()) for text in sample))
    if reference.json is None:
        terminal.warn(f"{args.tokenizer_type} exists in Python only: it is used as it is, slowly")
        return reference, tokenization.load("transformers", reference), "transformers", density
    with workers.aside(lambda: tokenization.fingerprint(json.loads(reference.json))) as asked:
        encode, why = fast(reference)
        reference.fingerprint = asked()
    if encode:
        try:
            with workers.aside(lambda: same_ids(encode, texts, reference, expected)) as asked:
                if asked():
                    return reference, encode, "fastokens", density
            why = "fastokens gives other ids than Hugging Face's tokenizer for texts of the sample"
        except Exception as error:
            why = unread(error)
    terminal.warn(f"{why}: the ids come from Hugging Face's tokenizers, at a tenth of the speed")
    return reference, tokenization.load("tokenizers", reference), "tokenizers", density


def fast(reference):
    """(fastokens' function from texts to ids, or None; why there is none)."""
    try:
        encode = tokenization.load("fastokens", reference)
    except ImportError:
        return None, "fastokens is not installed here (pip install fastokens)"
    except Exception as error:
        return None, unread(error)
    give_memory_back()
    return encode, None


def unread(error):
    return f"fastokens does not read this tokenizer ({str(error).splitlines()[0]})"


def give_memory_back():
    """Give freed memory to the system: 140 MB after a tokenizer of 128,000 entries is read, 10 MB after a piece."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another C library than GNU's


def same_ids(encode, texts, reference, expected):
    ids, lengths = tokenization.assemble(*encode(texts), reference, append_eod=False)
    return lengths.tolist() == [len(one) for one in expected] and ids.tolist() == [i for one in expected for i in one]


def tokenizer_of_pieces(args, reference, encode, token_bytes, spool):
    """The function that the workers run: a piece -> what the journal says of it, its tokens in files by `spool`."""
    import numpy
    import xxhash

    dtype = {2: numpy.uint16, 4: numpy.int32}[token_bytes]

    def tokenize(task):
        number, piece = task
        texts, numbers, blank, bad, read = {key: [] for key in args.json_keys}, [], 0, [], 0
        for line, row, problem in documents.rows(piece, args.json_keys):
            read += 1
            if problem:
                bad.append(f"{piece.path}:{line} {problem}")
                if args.on_error == "stop":
                    return {"error": bad[0]}
            elif row is None:
                blank += 1
            else:
                numbers.append(line)
                for key, text in zip(args.json_keys, row):
                    texts[key].append(text)
        piece.remove()
        keys = {}
        for index, key in enumerate(args.json_keys):
            ids, lengths = tokenization.assemble(*encode(texts[key]), reference, args.append_eod)
            if len(ids) and ids.max() > numpy.iinfo(dtype).max:
                document = int(numpy.searchsorted(numpy.cumsum(lengths), ids.argmax(), side="right"))
                return {
                    "error": f"{piece.path}:{numbers[document]} has the token {ids.max()}, which does not fit into the "
                    f"{token_bytes} bytes of a vocabulary of {reference.size}; the tokenizer contradicts itself"
                }
            hashes = [xxhash.xxh3_64_intdigest(text.encode()) for text, size in zip(texts[key], lengths) if size]
            empty = len(lengths) - len(hashes)
            if not args.add_bos:
                lengths = lengths[lengths > 0]  # Megatron-LM's script counts a document without tokens, NeMo's doesn't
            ids = ids.astype(dtype)
            with open(os.open(spool(number, index), os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
                file.write(ids)
                file.write(lengths.astype(numpy.int32))
                file.write(numpy.array(hashes, numpy.uint64))
            keys[key] = {
                "bin": ids.nbytes,
                "lengths": 4 * len(lengths),
                "hashes": 8 * len(hashes),
                "digest": xxhash.xxh3_64_hexdigest(ids),
                "empty": empty,
            }
        give_memory_back()
        return {
            "number": number,
            "input": piece.path,
            "digest": piece.digest,
            "consumed": piece.consumed,
            "lines": read,
            "blank": blank,
            "skipped": len(bad),
            "bad": bad[:SHOWN],
            "keys": keys,
        }

    return tokenize


def run(args, writer, tokenize, progress):
    """Tokenize all inputs, but for the pieces that the writer has from an earlier run."""
    finished = list(writer.pieces)
    spool = (str(writer.folder / f"in-{number}") for number in itertools.count())

    def tasks():
        number, reuse = 0, len(finished)
        for path in args.paths:
            for piece in documents.pieces(path, args.json_keys, spool):
                if number < reuse and [finished[number][name] for name in ("input", "digest")] != [path, piece.digest]:
                    terminal.warn(f"{path} has changed since the run that was stopped: tokenized again from there")
                    reuse = number
                    writer.keep(number)
                if number < reuse:
                    piece.remove()
                    progress(finished[number])
                else:
                    yield number, piece
                number += 1
        if number < reuse:
            writer.keep(number)

    for result in workers.ordered(tokenize, tasks(), args.workers):
        if "error" in result:
            skip = "; --on_error skip leaves such lines out, counted" if args.on_error == "stop" else ""
            raise documents.Unreadable(result["error"] + skip)
        writer.append(result)
        progress(result)


def progress_bar(args):
    """(the bar, a function that takes a finished piece): MB/s, ETA and documents/s, by bytes of the inputs."""
    import tqdm

    began, state = time.monotonic(), {"input": None, "consumed": 0, "documents": 0}
    bar = tqdm.tqdm(
        total=sum(documents.size(path) for path in args.paths),
        unit="B",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file needs no line every moment
        dynamic_ncols=True,
    )

    def progress(piece):
        before = state["consumed"] if state["input"] == piece["input"] else 0
        state["input"], state["consumed"] = piece["input"], piece["consumed"]
        state["documents"] += piece["lines"] - piece["blank"] - piece["skipped"]
        rate = state["documents"] / (time.monotonic() - began)
        bar.set_postfix_str(f"{rate:,.0f} documents/s", refresh=False)
        bar.update(piece["consumed"] - before)

    return bar, progress


def preprocess(args):
    """All of it, after the checks that need no tokenizer. Returns the records of the datasets."""
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="preprocess_") as folder:
        sample = documents.sample(args.paths, args.json_keys, (f"{folder}/{number}" for number in itertools.count()))
    reference, encode, library, density = choose_tokenizer(args, sample)
    token_bytes = 2 if reference.size < 65_500 else 4  # Megatron's and NeMo's rule
    if args.append_eod and reference.eod >= 256**token_bytes:
        terminal.fail([f"--tokenizer_type {args.tokenizer_type}: its end token {reference.eod} does not fit"], code=1)
    writer = dataset_writer.Writer(args.output_prefix, args.json_keys, token_bytes, workers.LEAD * args.workers)
    # Less than what it will be, so that nothing is refused that would have fitted.
    needed = 0.8 * density * token_bytes * sum(map(documents.size, args.paths)) - writer.size()
    preflight.report(preflight.disk_problems(writer.folder, needed, f"--output_prefix {args.output_prefix}"))
    reused, other = writer.resume(
        {
            "keys": args.json_keys,
            "tokenizer": reference.fingerprint,
            "before": reference.before,
            "after": reference.after + [reference.eod] * args.append_eod,
            "add_bos": args.add_bos,
            "on_error": args.on_error,
            "token_bytes": token_bytes,
            "piece": documents.PIECE,
        }
    )
    if other:
        terminal.warn(f"{writer.folder} was begun with another tokenizer or other flags: begun again")
    if reused:
        print(f"goes on from {reused} finished pieces in {writer.folder}")
    bar, progress = progress_bar(args)
    with bar:
        run(args, writer, tokenizer_of_pieces(args, reference, encode, token_bytes, writer.spool), progress)
    bad = list(itertools.islice((line for piece in writer.pieces for line in piece["bad"]), SHOWN))
    for line in bad:
        terminal.warn(f"skipped: {line}")
    records = {key: dataset_report.record(args, writer, reference, library, key) for key in args.json_keys}
    if not all(record["documents"] for record in records.values()):
        shutil.rmtree(writer.folder)
        terminal.fail([f"--input {' '.join(args.input)} holds no text; nothing was written"], code=1)
    writer.finish(lambda key, stem: dataset_report.save(records[key], writer.path(key, "lengths"), stem))
    return records


def main(argv=None):
    began = time.monotonic()
    args = parse_args(argv)
    if dataset_writer.interrupted_publishing(args.output_prefix):
        dataset_writer.publish(args.output_prefix)
        print(f"an earlier run was killed while it named its files; that is done, and {args.output_prefix} complete")
        return
    preflight.report(input_problems(args))
    outputs = ", ".join(dataset_writer.final(args.output_prefix, key) + ".bin/.idx" for key in args.json_keys)
    terminal.describe(
        "preprocess",
        [
            ("input", args.paths[0] if len(args.paths) == 1 else f"{len(args.paths)} files, {args.paths[0]} first"),
            ("size", terminal.gigabytes(sum(map(documents.size, args.paths)))),
            ("tokenizer", args.tokenizer_type),
            ("output", outputs),
            ("end of document", "appended" if args.append_eod else "not marked"),
            ("special tokens", "the tokenizer's own" if args.add_bos else "no others"),
            ("bad lines", "stop the run" if args.on_error == "stop" else "skipped, counted"),
            ("workers", args.workers),
        ],
    )
    if args.dry_run:
        return
    # The workers are processes: no threads in them.
    os.environ |= {"RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        records = preprocess(args)
    except (documents.Unreadable, workers.Died, dataset_writer.Busy) as error:
        terminal.fail([f"{error}\nno output was written; the same command goes on from what is finished"], code=1)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        free = terminal.gigabytes(shutil.disk_usage(Path(args.output_prefix).parent).free)
        problem = f"--output_prefix {args.output_prefix}: {error.strerror} ({free} free)"
        terminal.fail([f"{problem}\nno output was written; make room, and the same command goes on"], code=1)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)
    for key, found in records.items():
        percentiles = ", ".join(f"{share} % {length:,}" for share, length in found["lengths"]["percentiles"].items())
        terminal.describe(
            "preprocessed",
            [
                ("documents", f"{found['documents']:,}"),
                ("tokens", f"{found['tokens']:,} of {found['token_bytes']} bytes, by {found['tokenizer']['library']}"),
                ("lengths", f"mean {found['lengths']['mean']:,}; {percentiles}"),
                ("duplicates", f"{found['duplicates']:,} documents whose text another one has"),
                ("empty", f"{found['empty_lines']:,} lines, {found['empty_documents']:,} documents: left out"),
                ("skipped", f"{found['skipped_lines']:,} bad lines" if args.on_error == "skip" else None),
                ("files", dataset_writer.final(args.output_prefix, key) + ".bin, .idx, .json, .png"),
                ("seconds", f"{time.monotonic() - began:.1f}"),
            ],
        )


if __name__ == "__main__":
    main()

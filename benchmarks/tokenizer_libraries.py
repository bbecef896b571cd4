"""Libraries that turn text into token ids, on one core: megabytes a CPU second, and whether the ids are the same.

    python benchmarks/tokenizer_libraries.py FOLDER

FOLDER is one that benchmarks/texts.py has filled. CPU seconds, so that other work on the machine hardly shows. Those
libraries that are not installed are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import terminal

LIBRARIES = ("tokenizers", "tiktoken", "gigatoken", "fastokens")
CORPORA = {"English and code": "english.jsonl", "Traditional Chinese": "chinese.jsonl"}
BATCH = 1_000_000  # bytes of text in a call, as in a piece of the preprocessing


def byte_of():
    """The byte that each character of a byte-level BPE's vocabulary stands for, as GPT-2 has it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


def encoder(library, file):
    """A function from a list of texts to the list of their ids; `file` is a tokenizer.json."""
    if library == "tokenizers":
        import tokenizers

        one = tokenizers.Tokenizer.from_file(str(file))
        return lambda texts: [found.ids for found in one.encode_batch_fast(texts, add_special_tokens=False)]
    if library == "tiktoken":
        import tiktoken

        content, table = json.loads(file.read_text()), byte_of()
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocabulary = content["model"]["vocab"].items()
        ranks = {bytes(table[c] for c in token): number for token, number in vocabulary if token not in added}
        one = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
        return lambda texts: one.encode_batch(texts, num_threads=1, allowed_special="all")
    if library == "gigatoken":
        import gigatoken

        one = gigatoken.Tokenizer.from_json(file.read_text())
        return lambda texts: one.encode_batch_list(texts)
    import fastokens

    one = fastokens.Tokenizer.from_json_str(file.read_text())
    return lambda texts: [found.ids for found in one.encode_batch(texts)]


def child(library, file, corpus, size):
    """Print the CPU seconds for `size` bytes of a corpus, and a number that stands for all ids."""
    os.sched_setaffinity(0, {0})
    encode = encoder(library, Path(file))
    batches, texts, held, seen = [], [], 0, 0
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            held += len(line)
            if held >= BATCH:
                batches.append(texts)
                seen, texts, held = seen + sum(len(text.encode()) for text in texts), [], 0
            if seen >= int(size):
                break
    found, spent = 0, 0.0
    for batch in batches:
        began = time.process_time()
        ids = encode(batch)
        spent += time.process_time() - began
        for one in ids:
            found = hash((found, *map(int, one)))
    print(json.dumps([spent, seen, found]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=20, help="of each corpus [20]")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    rows = []
    for name, corpus in CORPORA.items():
        right = None
        for library in LIBRARIES:
            task = [library, args.folder / "tokenizer/tokenizer.json", args.folder / corpus, args.megabytes * 10**6]
            command = [sys.executable, __file__, args.folder, "--child", *task]
            threads = {"RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run([*map(str, command)], env=os.environ | threads, capture_output=True, text=True)
            if done.returncode:
                rows.append([name, library, "-", (done.stderr.strip().splitlines() or ["failed"])[-1][:60]])
                continue
            seconds, size, ids = json.loads(done.stdout.splitlines()[-1])
            right = ids if right is None else right
            rows.append([name, library, f"{size / seconds / 1e6:.1f}", "the same" if ids == right else "OTHERS"])
    terminal.table(["corpus", "library", "MB a CPU second", "ids"], rows)


if __name__ == "__main__":
    main()

"""Megatron's indexed datasets (`PREFIX.bin`, `PREFIX.idx`): what they hold, and how an index is written.

Source of the format and of the arithmetic: megatron/core/datasets/indexed_dataset.py, gpt_dataset.py and
blended_megatron_dataset_builder.py, Megatron-Core 0.15.3.
"""

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"MMIDIDX\x00\x00"
HEADER = len(MAGIC) + 8 + 1 + 8 + 8  # magic, version, dtype code, sequences, document indices
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # Megatron's code of the token type -> bytes
TRAIN, VALIDATION, TEST = range(3)


@dataclass(frozen=True)
class Index:
    """What an .idx file says."""

    prefix: str
    token_bytes: int  # width of a token: 2 for vocabularies below 65500, else 4
    sequences: int
    documents: int
    tokens: int

    def tokens_before(self, sequence):
        """Number of tokens in the sequences before number `sequence`."""
        if sequence >= self.sequences:
            return self.tokens
        with open(self.prefix + ".idx", "rb") as file:
            file.seek(HEADER + 4 * self.sequences + 8 * sequence)
            return struct.unpack("<q", file.read(8))[0] // self.token_bytes


def is_there(path):
    """Whether `path` is a folder, or the prefix of a .bin or .idx file."""
    return Path(path).is_dir() or Path(f"{path}.bin").is_file() or Path(f"{path}.idx").is_file()


def prefixes(path):
    """The dataset prefixes that `path` names: a folder's, or itself. Raises ValueError, naming every bad file."""
    path = Path(path)
    if path.suffix in (".bin", ".idx") and not is_there(path):
        path = path.with_suffix("")
    if path.is_dir():
        stems = sorted({str(file.with_suffix("")) for file in path.iterdir() if file.suffix in (".bin", ".idx")})
        if not stems:
            raise ValueError(f"{path} holds no .bin and .idx files; run data/preprocess_data_for_megatron.py first")
    elif is_there(path):
        stems = [str(path)]
    else:
        raise ValueError(f"{path} is neither a folder nor the prefix of a .bin and an .idx file")
    bad = [f"{stem}{suffix}" for stem in stems for suffix in (".bin", ".idx") if not Path(stem + suffix).is_file()]
    if bad:
        raise ValueError(f"missing {', '.join(bad)}: every .bin needs its .idx; preprocess again, or remove the other")
    return stems


def read_index(prefix):
    """Read PREFIX.idx and check PREFIX.bin's size against it. Raises ValueError naming the file and the fault."""
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    with open(idx, "rb") as file:
        header = file.read(HEADER)
        if header[: len(MAGIC)] != MAGIC or len(header) < HEADER:
            raise ValueError(f"{idx} is not a Megatron index; preprocess again")
        version, code, sequences, entries = struct.unpack("<QBQQ", header[len(MAGIC) :])
        if version != 1 or code not in TOKEN_BYTES:
            raise ValueError(f"{idx} has version {version} and token type {code}, which Megatron-Core can't read")
        size = HEADER + 4 * sequences + 8 * sequences + 8 * entries
        if idx.stat().st_size < size:
            raise ValueError(
                f"{idx} is truncated: {idx.stat().st_size} bytes, its header says {size}; preprocess again"
            )
        if sequences == 0:
            raise ValueError(f"{idx} holds no documents; preprocess a file that has some")
        file.seek(HEADER + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", file.read(4))
        file.seek(HEADER + 4 * sequences + 8 * (sequences - 1))
        (last_pointer,) = struct.unpack("<q", file.read(8))
    width = TOKEN_BYTES[code]
    expected = last_pointer + last_length * width
    if bin_.stat().st_size != expected:
        raise ValueError(
            f"{bin_} has {bin_.stat().st_size} bytes, its index says {expected}: truncated or changed; preprocess again"
        )
    return Index(prefix, width, sequences, entries - 1, expected // width)


def write_index(path, lengths, token_bytes):
    """Write an .idx from a file of int32, the tokens of each document; 0 is a document without any sequence.

    Not Megatron's IndexedDatasetBuilder, whose Python lists grow with the corpus and which imports torch; same bytes.
    """
    import numpy

    count = os.path.getsize(lengths) // 4

    def slices():
        for begin in range(0, count, 1_000_000):
            yield numpy.fromfile(lengths, numpy.int32, 1_000_000, offset=4 * begin)

    sequences = sum(int((part > 0).sum()) for part in slices())
    with open(path, "wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, {2: 8, 4: 4}[token_bytes], sequences, count + 1))
        for part in slices():
            file.write(part[part > 0].tobytes())
        offset = 0
        for part in slices():
            part = part[part > 0].astype(numpy.int64) * token_bytes
            ends = offset + numpy.cumsum(part)
            file.write((ends - part).tobytes())
            offset = int(ends[-1]) if len(ends) else offset
        file.write(struct.pack("<q", 0))
        seen = 0
        for part in slices():
            ends = seen + numpy.cumsum(part > 0)
            file.write(ends.astype(numpy.int64).tobytes())
            seen = int(ends[-1])


def record(prefix):
    """What data/preprocess_data_for_megatron.py wrote about a dataset in PREFIX.json, or {} if it did not make it."""
    try:
        found = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and "tokenizer" in found else {}
    except (OSError, ValueError):
        return {}


def split_sequences(sequences, split):
    """Sequences of the training, validation and test share: [(first, end), ...], None for a share of zero.

    Our files hold a sequence a document; where others hold several, Megatron's GPT dataset splits between sequences.
    `split` is Megatron's "900,50,50". Raises ValueError if it isn't one.
    """
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    if not re.fullmatch(f"{number}(,{number}){{0,2}}", split):
        raise ValueError(f"--split {split!r} is not a list of one to three shares such as 900,50,50")
    shares = [float(share) for share in split.split(",")]
    shares += [0.0] * (3 - len(shares))
    total = sum(shares)
    if total <= 0:
        raise ValueError(f"--split {split!r} adds up to nothing")
    spans, start = [], 0.0
    for share in shares:
        end = start + share / total
        spans.append((round(start * sequences), round(end * sequences)) if share > 0 else None)
        start = end
    return spans


def split_tokens(index, split):
    """Tokens in the training, validation and test share of one dataset (0 for a share of zero)."""
    spans = split_sequences(index.sequences, split)
    return [index.tokens_before(span[1]) - index.tokens_before(span[0]) if span else 0 for span in spans]


def steps_per_epoch(tokens, seq_length, global_batch_size):
    """Optimizer steps in one pass over `tokens`: a sample is seq_length tokens, and one more to predict."""
    return max(0, tokens - 1) // seq_length // global_batch_size

"""Text corpora: which files there are, and their documents, in pieces that any process can read.

JSON lines (.jsonl, .json), plain text (.txt, a document a line), both also as .gz and .zst; .parquet; and folders that
`datasets` wrote with save_to_disk. Nothing here holds more than a piece in memory.
"""

import glob
import gzip
import io
import itertools
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

PIECE = 1_000_000  # bytes of text in a piece, about: a piece ends with a line
LONGEST_LINE = 1_000_000_000  # bytes; a longer one is no document, and would not fit in memory
COMPRESSED = (".gz", ".zst")
UTF8_BOM = b"\xef\xbb\xbf"


class Unreadable(Exception):
    """An input that can't be read on: says where (file:line) and why."""


@dataclass
class Piece:
    """Some documents of one input. `first` is the number of its first line or row, counted from 1."""

    path: str
    first: int
    read_from: str  # the file that holds it, from byte `begin` to `end`: the input itself, or a spool file
    begin: int
    end: int
    consumed: int  # bytes of the input up to the end of this piece, as they lie on disk
    digest: str  # xxh3_128 of the input's text up to the end of this piece

    def remove(self):
        """Remove its spool file, if it has one."""
        if self.read_from != self.path:
            os.unlink(self.read_from)


def form(path):
    """'lines', 'text', 'parquet' or 'datasets' (a folder), or None for anything else."""
    path = Path(path)
    if path.is_dir():
        return "datasets" if (path / "state.json").is_file() else None
    if path.suffix == ".parquet":
        return "parquet"
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return {".jsonl": "lines", ".json": "lines", ".txt": "text"}.get(suffix)


def expand(patterns):
    """The inputs that names and globs stand for, in order: (paths, problems)."""
    paths, problems = [], []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            problems.append(
                f"--input {pattern}: there is no such file; python data/download_pretrain_data.py makes one"
            )
        for path in found:
            if form(path) is None:
                hint = "name its files, as in FOLDER/*.jsonl" if Path(path).is_dir() else "rename it, or convert it"
                if (Path(path) / "dataset_dict.json").is_file():
                    hint = f"name one of its splits, as in {path}/train"
                problems.append(
                    f"--input {path} is none of .jsonl, .json, .txt (also .gz, .zst), .parquet, or a folder written by "
                    f"datasets' save_to_disk; {hint}"
                )
            elif os.path.realpath(path) in map(os.path.realpath, paths):
                problems.append(f"--input {path} is named twice; name it once")
            paths.append(path)
    return paths, problems


def size(path):
    """Bytes of a file, or of a folder's files."""
    path = Path(path)
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def pieces(path, keys, spool):
    """Yield the pieces of one input. What does not lie on disk as lines goes to files that `spool` names.

    Raises Unreadable.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    blocks = _line_blocks(path) if form(path) in ("lines", "text") else _table_blocks(path, keys)
    for first, begin, block, consumed in blocks:
        digest.update(block)
        name = path
        if begin is None:
            name, begin = next(spool), 0
            with open(name, "wb") as file:
                file.write(block)
        yield Piece(path, first, name, begin, begin + len(block), consumed, digest.hexdigest())


def _line_blocks(path):
    """(number of the first line, offset in the file or None if it is compressed, bytes, bytes consumed on disk)."""
    line, begin = 1, 0
    with open(path, "rb") as raw:
        try:
            stream = _decompressed(raw, path)
            while block := stream.read(PIECE):
                if not block.endswith(b"\n"):
                    block += stream.readline(LONGEST_LINE)
                    if len(block) >= LONGEST_LINE and not block.endswith(b"\n"):
                        number = line + block.count(b"\n")
                        raise Unreadable(f"{path}:{number} is longer than 1 GB: are these lines?")
                yield line, begin if stream is raw else None, block, begin + len(block) if stream is raw else raw.tell()
                line += block.count(b"\n")
                begin += len(block)
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise Unreadable(
                f"{path}:{line} can't be read on ({error}): cut short or damaged; fetch it again"
            ) from None


def _decompressed(raw, path):
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if path.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


def _table_blocks(path, keys):
    """(number of the first row, None, an Arrow stream of the columns `keys`, bytes consumed on disk)."""
    import pyarrow
    from pyarrow import ipc, parquet

    number, total = 0, size(path)
    try:
        if form(path) == "parquet":
            table = parquet.ParquetFile(path)
            rows, columns = table.metadata.num_rows, table.schema_arrow.names
        else:
            import datasets

            table = datasets.load_from_disk(path)
            rows, columns = table.num_rows, table.column_names
        missing = [key for key in keys if key not in columns]
        if missing:
            raise Unreadable(f"{path} has no column {', '.join(missing)}; --json_keys can be {', '.join(columns)}")
        step = max(1, int(PIECE * rows / max(1, total * 3)))  # a compressed table holds about thrice its size in text
        batches = (
            table.iter_batches(step, columns=keys)
            if form(path) == "parquet"
            else table.select_columns(keys).with_format("arrow").iter(step)
        )
        for batch in batches:
            sink = io.BytesIO()
            with ipc.new_stream(sink, batch.schema) as writer:
                writer.write(batch)
            yield number + 1, None, sink.getvalue(), total * (number + batch.num_rows) // max(1, rows)
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, EOFError) as error:
        raise Unreadable(f"{path}:{number + 1} can't be read on ({error}): cut short or damaged") from None


def rows(piece, keys):
    """Yield (number, texts, problem) for each line or row of a piece.

    `texts` holds a string a key, or is None for a blank line; `problem` says what is wrong with the line, or is None.
    """
    with open(piece.read_from, "rb") as file:
        file.seek(piece.begin)
        data = file.read(piece.end - piece.begin)
    if form(piece.path) not in ("lines", "text"):
        yield from _table_rows(data, piece.first, keys)
        return
    parse = _text_line if form(piece.path) == "text" else _json_line
    if piece.first == 1 and data.startswith(UTF8_BOM):
        data = data[len(UTF8_BOM) :]
    if b"\r" in data:  # as Python reads text: each of \r\n, \r and \n ends a line
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    del data
    for number, line in enumerate(lines, piece.first):
        try:
            yield number, parse(line.decode("utf-8"), keys), None
        except UnicodeDecodeError as error:
            yield number, None, f"is not UTF-8 ({error.reason} at byte {error.start + 1})"
        except UnicodeEncodeError as error:
            yield number, None, f"holds half of a surrogate pair (character {error.start + 1}), which is no text"
        except RecursionError:
            yield number, None, "is nested too deeply"
        except ValueError as error:
            yield number, None, str(error)


def _text_line(line, keys):
    return [line.strip()] if line.strip() else None


def _json_line(line, keys):
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at character {error.pos + 1})") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"is not read ({error})") from None
    if not isinstance(row, dict):
        raise ValueError('is not a JSON object, like {"text": ...}')
    texts = [row.get(key) for key in keys]
    return _checked(texts, keys)


def _checked(texts, keys):
    bad = [key for key, text in zip(keys, texts) if not isinstance(text, str)]
    if bad:
        raise ValueError(f"has no text under {', '.join(bad)}")
    for text in texts:
        if not text.isascii():
            text.encode("utf-8")
    return texts


def _table_rows(data, first, keys):
    import pyarrow

    table = pyarrow.ipc.open_stream(data).read_all()
    columns = [table.column(key) for key in keys]
    columns = [c.cast(pyarrow.string()) if pyarrow.types.is_dictionary(c.type) else c for c in columns]
    for number, texts in enumerate(zip(*columns), first):
        try:
            yield number, _checked([text.as_py() for text in texts], keys), None
        except ValueError as error:
            yield number, None, str(error)


def sample(paths, keys, spool, characters=200_000):
    """Texts to try a tokenizer on: from up to 16 inputs, and from places all over those that lie on disk as lines."""
    texts, paths = [], paths[:: -(-len(paths) // 16)]
    places = max(1, 16 // len(paths))
    for path in paths:
        for piece in _places(path, keys, spool, places):
            left = characters // len(paths) // places
            for _, row, _ in rows(piece, keys):
                for text in row or []:
                    texts.append(text[:left])
                    left -= len(texts[-1])
                if left <= 0:
                    break
    return texts


def _places(path, keys, spool, count):
    if form(path) not in ("lines", "text") or Path(path).suffix in COMPRESSED:
        yield from itertools.islice(pieces(path, keys, spool), 1)
        return
    with open(path, "rb") as file:
        total = size(path)
        for number in range(count):
            file.seek(total * number // count)
            if number:
                file.readline(PIECE)
            begin = file.tell()
            file.readlines(100_000)
            yield Piece(path, 1 if begin == 0 else 2, path, begin, file.tell(), 0, "")

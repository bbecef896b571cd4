"""Rows of a dataset, of the Hub or of local files, one after the other; each failure as one sentence.

The `datasets` library reads them as a stream: nothing is kept, and memory does not grow with the dataset. A local
.jsonl file is read line by line, so that a bad line can be named; `datasets` would not say where it is.
"""

import gzip
import json
import re
import time
from pathlib import Path

from nemo_tutorial import hub

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
SQUEEZED = (".gz", ".zst", ".bz2", ".xz")
WAITS = (1, 5, 20, 60)  # seconds until a dataset of the Hub is read on; it begins anew when a row has come
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def problems(flag, datasets, subset, revision):
    """What can be said of the names alone: files that aren't there, folders of mixed files, flags without effect."""
    found = []
    for name in datasets:
        path = Path(name)
        if not path.exists() and (_suffix(path) in READERS or not HUB_ID.fullmatch(name)):
            found.append(f"{flag} {name} is not a file or folder here, nor a Hub id (OWNER/NAME)")
        elif path.is_file() and _suffix(path) not in READERS:
            found.append(f"{flag} {name} is none of {', '.join(READERS)} ({', '.join(SQUEEZED)}); convert it first")
        elif path.is_dir() and not _saved(path):
            kinds = sorted({_suffix(file) for file in path.rglob("*") if _suffix(file) in READERS})
            if not kinds:
                found.append(f"{flag} {name} holds no {', '.join(READERS)}; name a folder that does")
            elif len({READERS[kind] for kind in kinds}) > 1:
                said = f"only one kind would be read; name the files: {flag} '{path}'/*{kinds[0]}"
                found.append(f"{flag} {name} holds {' and '.join(kinds)}: {said}")
        if path.exists() and revision:
            found.append(f"--revision {revision} is for the Hub, and {flag} {name} is here; leave the flag out")
        if path.is_file() and subset:
            found.append(f"--subset {subset} has no effect on the file {name}; leave the flag out")
    return found


def rows(dataset, split="train", subset=None, revision=None, column=None):
    """The rows of a dataset: pairs of where a row stands and the row, a dict; with `column`, only what is under it.

    A blank line of a .jsonl file is (place, None). Raises ValueError with a sentence.
    """
    path = Path(dataset)
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        for place, row in _lines(path):
            if column is not None and row is not None:
                if not isinstance(row, dict) or column not in row:
                    has = ", ".join(row) if isinstance(row, dict) else "no columns"
                    raise ValueError(f"--text_column {column}: {place} has {has}; name one of them")
                row = row[column]
            yield place, row
        return
    found = _local(path, split, subset, column) if path.exists() else _of_hub(dataset, split, subset, revision, column)
    for number, row in enumerate(found, 1):
        yield f"{dataset}, row {number}", row if column is None else row[column]


def _suffix(path):
    """The suffix of a data file, without what it is compressed by."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix in SQUEEZED else path).suffix


def _saved(path):
    """Whether a folder was written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _lines(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                try:
                    yield f"{path}:{number}", json.loads(line) if line.strip() else None
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{number} is not JSON ({error}); mend or remove the line") from None
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}:{number + 1} can't be read: {error}") from None


def _local(path, split, subset, column):
    import pyarrow
    from datasets import load_dataset, load_from_disk

    # Arrow's own allocator keeps what it once had, and a parquet file is read ahead as a whole, unless by row groups.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    try:
        if path.is_file():
            found = load_dataset(READERS[_suffix(path)], data_files=str(path), streaming=True)
        elif _saved(path):
            found = load_from_disk(str(path))
            found = found if (path / "dataset_dict.json").is_file() else {str(found.split or "train"): found}
        else:
            found = load_dataset(str(path), subset, streaming=True)
        rows = _chosen(found, path, split, column)
        yield from rows.reshard() if hasattr(rows, "reshard") else rows
    except Exception as error:  # those of the readers have no common base
        raise ValueError(_said(error, path)) from None


def _of_hub(repo, split, subset, revision, column):
    """Rows of a Hub dataset. A failure that may pass is waited out, and the stream goes on with the row after it."""
    from datasets import load_dataset

    commit = hub.dataset_commit(repo, revision or "main")
    hub.read_whole_answers()
    stream, state, waits = None, None, list(WAITS)
    while True:
        try:
            stream = _chosen(load_dataset(repo, subset, revision=commit, streaming=True), repo, split, column)
            if state is not None:
                stream.load_state_dict(state)
            for row in stream:
                yield row
                waits = list(WAITS)
            return
        except Exception as error:  # those of the Hub, of requests and of the readers have no common base
            if not hub.passes(error):
                raise ValueError(_said(error, repo, revision or "main")) from None
            if not waits:
                raise ValueError(hub.explain(error, repo, revision or "main", "dataset")) from None
            time.sleep(waits.pop(0))
            state = stream.state_dict() if stream is not None else state


def _chosen(found, dataset, split, column):
    """One split of what `datasets` found, and of it one column."""
    if split not in found:
        raise ValueError(f"--split {split}: {dataset} has {', '.join(map(str, found))}")
    stream = found[split]
    columns = stream.column_names or list(next(iter(stream), {}))
    if column is None:
        return stream
    if column not in columns:
        raise ValueError(f"--text_column {column}: {dataset} has {', '.join(columns) or 'no rows'}")
    return stream.select_columns([column])


def _said(error, dataset, revision=None):
    """One sentence about what `datasets` says of a dataset that can't be read."""
    said = " ".join(str(error).split())
    if said.startswith("--"):
        return said
    if getattr(error, "response", None) is not None:
        return hub.explain(error, str(dataset), revision, "dataset")
    missing = re.search(r"pick one among the available configs: (\[.*?\])|BuilderConfig .* Available: (\[.*?\])", said)
    if missing:
        names = re.sub(r"[\[\]']", "", missing.group(1) or missing.group(2))
        return f"{dataset} has several subsets; name one of {names} with --subset"
    return f"{dataset} can't be read: {said[:300]}"

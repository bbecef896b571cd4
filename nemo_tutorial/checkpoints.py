"""NeMo 2 checkpoints on disk: complete or not, which is the newest, and publishing an output whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from nemo_tutorial import models, terminal

# What a Hugging Face folder holds beside its weights and papers.
ASSETS = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json tokenizer.model vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json"
).split()
MANIFEST = "manifest.json"  # of a checkpoint that we imported: its files, their sizes and hashes, and its source
HASHED = 1 << 20  # larger files are weights, whose records carry checksums of their own
UNFINISHED = "-unfinished"  # NeMo's marker beside a checkpoint that is being written or removed


def is_nemo(path):
    """Whether `path` is, or was meant to be, a NeMo 2 checkpoint."""
    return (Path(path) / "context").is_dir() or (Path(path) / "weights").is_dir()


def is_adapter(path):
    """Whether a checkpoint holds only a LoRA or DoRA adapter."""
    return (Path(path) / "weights" / "adapter_metadata.json").is_file()


def problem(path):
    """Why a checkpoint can't be used, or None if it is complete."""
    path = Path(path)
    if not path.is_dir():
        return f"{path} does not exist"
    if not is_nemo(path):
        return f"{path} is not a NeMo 2 checkpoint: it has neither weights/ nor context/"
    real = path.resolve()
    for marker in {Path(f"{path}{UNFINISHED}"), Path(f"{real}{UNFINISHED}")}:
        if marker.exists():
            return f"{path} is unfinished: {marker.name} lies beside it, so its writing was interrupted"
    found = damage(path)
    if found:
        return found
    for part in ("weights/metadata.json", "weights/.metadata", "weights/common.pt", "context/io.json"):
        if not (path / part).is_file():
            return f"{path} is incomplete: {part} is missing"
    if not any((path / "weights").glob("*.distcp")):
        return f"{path} is incomplete: weights/ holds no *.distcp file"
    return None


def write_manifest(path, **facts):
    """Write down what a finished checkpoint consists of: every file's size, the small ones' SHA-256, and `facts`."""
    path = Path(path)
    files = {str(file.relative_to(path)): _fingerprint(file) for file in sorted(path.rglob("*")) if file.is_file()}
    text = json.dumps({**facts, "files": files}, indent=1, ensure_ascii=False)
    (path / MANIFEST).write_text(text + "\n", encoding="utf-8")


def manifest(path):
    """What write_manifest wrote, or {}."""
    try:
        return json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _fingerprint(file):
    size = file.stat().st_size
    return {"size": size} | ({"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if size <= HASHED else {})


def damage(path):
    """What of a checkpoint is no longer as its manifest says, or None (also if it has no manifest)."""
    path = Path(path)
    if not (path / MANIFEST).is_file():
        return None
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{path} is incomplete: {name} is missing"
            found = _fingerprint(path / name)
            if found["size"] != expected["size"]:
                return f"{path} is damaged: {name} has {found['size']} bytes of {expected['size']}"
            if found != expected:
                return f"{path} is damaged: {name} has other content than when it was imported"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged: {MANIFEST} can't be read ({error!r})"
    return None


def step(path):
    """Finished optimizer steps of a checkpoint, from its name (NeMo counts from 0); 0 for an imported one."""
    match = re.search(r"step=(\d+)", Path(path).name)
    return int(match.group(1)) + 1 if match else 0


def latest(run):
    """The complete checkpoint with the most steps in `run`/checkpoints (links followed), or None."""
    folder = Path(run) / "checkpoints"
    found = [path for path in folder.glob("*") if path.is_dir() and is_nemo(path) and problem(path) is None]
    # At equal steps NeMo's own "-last" is preferred: it is the one that its README commands name.
    return max(found, key=lambda path: (step(path), path.name.endswith("-last")), default=None)


def is_pretraining(path):
    """Whether a checkpoint was written by pretraining: full weights, and NeMo's pretraining data module."""
    try:
        context = models.nemo_context(path)
    except ValueError:
        return False
    data = context["datamodule"]
    return data is not None and data[0] == "PreTrainingDataModule" and not is_adapter(path)


def newest_pretraining(results):
    """The newest complete pretraining checkpoint under `results`: newest run first, then most steps; or None."""
    runs = [latest(run) for run in Path(results).glob("*") if (run / "checkpoints").is_dir()]
    found = [path for path in runs if path is not None and is_pretraining(path)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def copy_assets(source, target):
    """Copy a Hugging Face folder's tokenizer and configuration, byte for byte, without its weights."""
    Path(target).mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def size(path):
    """Bytes in a folder."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


@contextlib.contextmanager
def published(output, overwrite=False):
    """Give a folder beside `output` to write in; rename it to `output` if the block succeeds, else remove it.

    With `overwrite` an existing output is replaced, and stays whole until the new one is. What a killed process left
    behind is put back or removed, and said. Raises FileExistsError if `output` is there or being written.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging, replaced = (output.parent / f".{output.name}.{word}" for word in ("partial", "replaced"))
    with _locked(output):
        if replaced.exists() and not output.exists():
            terminal.warn(f"an earlier run was killed while it replaced {output}: the old one is back in its place")
            replaced.rename(output)
        if staging.exists() or replaced.exists():
            terminal.warn(f"an earlier run was killed before {output} was complete: what it left is removed")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        try:
            yield staging
            if output.exists() and not overwrite:
                raise FileExistsError(f"{output} appeared while this was running")
            for file in staging.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
            if output.exists():
                output.rename(replaced)
            try:
                staging.rename(output)
            except BaseException:
                if replaced.exists():
                    replaced.rename(output)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def published_file(output):
    """Give a binary file beside `output` to write to; it takes its place if the block succeeds, else it is removed.

    Raises FileExistsError if another process is writing it.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial"
    with _locked(output):
        try:
            with open(partial, "wb") as file:  # what a killed process left is overwritten
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, output)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(output):
    """Hold a lock for writing `output`, which the system takes back from a process that dies."""
    path = output.parent / f".{output.name}.lock"
    with open(path, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.stat().st_ino == os.fstat(lock.fileno()).st_ino  # else its owner has just removed it
        except OSError:
            mine = False
        if not mine:
            raise FileExistsError(f"{output} is being written by another process; wait for it, or choose another")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

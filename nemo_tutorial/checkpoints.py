"""NeMo 2 checkpoints on disk: complete or not, which is the newest, and publishing an output whole or not at all."""

import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nemo_tutorial import models, terminal

# What a Hugging Face folder holds beside its weights and papers.
ASSETS = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json tokenizer.model vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json"
).split()
MANIFEST = "manifest.json"  # of a checkpoint that we imported: its files, their sizes and hashes, and its source
LARGE = 1 << 20  # larger files are weights: their content is checked only before it is used
NO_OPTIMIZER = "no_optimizer"  # an empty file in a checkpoint whose optimizer state was dropped
UNFINISHED = "-unfinished"  # NeMo's marker beside a checkpoint that is being written or removed


def is_nemo(path):
    """Whether `path` is, or was meant to be, a NeMo 2 checkpoint."""
    return (Path(path) / "context").is_dir() or (Path(path) / "weights").is_dir()


def is_adapter(path):
    """Whether a checkpoint holds only a LoRA or DoRA adapter."""
    return (Path(path) / "weights" / "adapter_metadata.json").is_file()


def adapter_base(path):
    """The checkpoint that an adapter was trained on, as it was named then. Raises ValueError."""
    file = Path(path) / "weights" / "adapter_metadata.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["model_ckpt_path"].removesuffix("/weights")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} can't be read ({error!r})") from None


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


def fingerprints(path):
    """Size and SHA-256 of every file in a folder: {name: {"size", "sha256"}}."""
    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip([str(file.relative_to(path)) for file in files], pool.map(_fingerprint, files)))


def write_manifest(path, files=None, **facts):
    """Write down what a finished checkpoint consists of: its files (`fingerprints`, if they are known), and `facts`."""
    text = json.dumps({**facts, "files": files or fingerprints(path)}, indent=1, ensure_ascii=False)
    (Path(path) / MANIFEST).write_text(text + "\n", encoding="utf-8")


def manifest(path):
    """What write_manifest wrote, or {}."""
    try:
        return json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _fingerprint(file, progress=lambda size: None):
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):  # hashlib lets other threads run meanwhile
            digest.update(block)
            progress(len(block))
        return {"size": opened.tell(), "sha256": digest.hexdigest()}


def damage(path):
    """What of a checkpoint is no longer as its manifest says, or None (also if it has no manifest).

    Looks at every file's size and at the small ones' content; `changed` looks at the large ones'.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        return None
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            if not (path / name).is_file():
                return f"{path} is incomplete: {name} is missing"
            found = (path / name).stat().st_size
            if found != expected["size"]:
                return f"{path} is damaged: {name} has {found} bytes of {expected['size']}"
            if found <= LARGE and _fingerprint(path / name) != expected:
                return f"{path} is damaged: {name} has other content than when it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged: {MANIFEST} can't be read ({error!r})"
    return None


def changed(path, progress=lambda size: None):
    """Which large file of a checkpoint has other content than its manifest says, as a sentence; or None."""
    large = {name: entry for name, entry in manifest(path).get("files", {}).items() if entry["size"] > LARGE}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda name: _fingerprint(Path(path) / name, progress), large)
        for name, fingerprint in zip(large, found):
            if fingerprint != large[name]:
                return f"{path} is damaged: {name} has other content than when it was written"
    return None


@contextlib.contextmanager
def unchanged(*paths):
    """Check large files against the manifests while they are read. Raises ValueError, after the block, if one changed.

    Nearly free: what one thread has read from the disk is there for the other.
    """
    with ThreadPoolExecutor(len(paths)) as pool:
        found = [pool.submit(changed, path) for path in paths]
        yield
        for result in found:
            if result.result():
                raise ValueError(result.result())


def hugging_face_base(adapter):
    """The Hugging Face model that an adapter's base was imported from: (Hub id, folder or None; commit or None)."""
    try:
        found = manifest(adapter_base(adapter))
    except ValueError:
        return None, None
    commit = found.get("commit")
    return (found["source"], commit) if commit else (found.get("folder"), None)


def step(path):
    """Finished optimizer steps of a checkpoint, from its name (NeMo counts from 0); 0 for an imported one."""
    match = re.search(r"step=(\d+)", Path(path).name)
    return int(match.group(1)) + 1 if match else 0


def consumed(path):
    """Samples that a checkpoint's run had consumed, from its name; None if it doesn't say."""
    match = re.search(r"consumed_samples=(\d+)", Path(path).name)
    return int(match.group(1)) if match else None


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
    """Copy a Hugging Face folder's tokenizer and configuration, byte for byte, without its weights.

    Its code, too, if it asks to run it.
    """
    Path(target).mkdir(parents=True, exist_ok=True)
    code = [file.name for file in Path(source).glob("*.py")] if models.remote_code(source) else []
    for name in (*ASSETS, *code):
        own, copy = Path(source) / name, Path(target) / name
        if own.is_file() and not (copy.is_file() and filecmp.cmp(own, copy, shallow=False)):  # it may be in use
            shutil.copyfile(own, copy)


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
            with _written_early(staging):
                yield staging
            if output.exists() and not overwrite:
                raise FileExistsError(f"{output} appeared while this was running")
            to_disk(staging)
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


def to_disk(folder, forget=False):
    """Have the disk hold what lies in a folder. With `forget`, what is read again comes from there, not from memory."""
    for file in filter(Path.is_file, Path(folder).rglob("*")):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            if forget:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _written_early(folder):
    """Have the disk write what lies in `folder` while more is made, and the memory that it took be used again.

    By itself, Linux begins when a tenth of the memory waits to be written.
    """
    done = threading.Event()

    def write():
        while not done.wait(0.5):
            with contextlib.suppress(OSError):  # gone meanwhile; a full disk is said to whoever writes
                to_disk(folder, forget=True)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_whole(file, text, mode=0o666):
    """Write a text file whole or not at all, in the place of an older one. `mode` is a new file's, as in os.open."""
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed, perhaps with another mode
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as written:
        written.write(text)
    os.replace(partial, file)


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

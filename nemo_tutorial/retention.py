"""What older checkpoints of a run lose, so that more of them fit on the disk: their optimizer state."""

import dataclasses
import os
import pickle
import shutil
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from nemo_tutorial import checkpoints

OPTIMIZER = "optimizer."  # how the names of its tensors begin; in common.pt it is "optimizer" itself
BLOCK = 1 << 24
AWAY = Path("record", "retention")


def drop_optimizer(checkpoint):
    """Rewrite a checkpoint of a run without its optimizer state; the bytes saved. The weights' records stay the same.

    Megatron writes weights and optimizer state into the same files, so the weights' parts are copied out of them. The
    old checkpoint stays whole until the new one takes its place. Raises OSError if the disk is full.
    """
    checkpoint = Path(checkpoint).resolve()
    run, before = checkpoint.parent.parent, checkpoints.size(checkpoint)
    new, old = (run / AWAY / name / checkpoint.name for name in ("new", "old"))  # not where NeMo looks for checkpoints
    recover(run)
    try:
        shutil.copytree(checkpoint, new, ignore=shutil.ignore_patterns("*.distcp", ".metadata", checkpoints.MANIFEST))
        _copy_records(checkpoint / "weights", new / "weights")
        # What the run itself wrote: numbers, and classes that only NeMo knows.
        common = torch.load(new / "weights" / "common.pt", map_location="cpu", weights_only=False)
        kept = {key: value for key, value in common.items() if key not in ("optimizer", "lr_schedulers")}
        torch.save(kept | {"optimizer_states": []}, new / "weights" / "common.pt")
        (new / checkpoints.NO_OPTIMIZER).touch()
        for file in new.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        old.parent.mkdir(parents=True)
        checkpoint.rename(old)
        new.rename(checkpoint)
    finally:
        recover(run)
    return before - checkpoints.size(checkpoint)


def recover(run):
    """Undo what was interrupted: an old checkpoint whose new one did not take its place goes back."""
    for old in Path(run, AWAY, "old").glob("*"):
        if not (Path(run) / "checkpoints" / old.name).exists():
            old.rename(Path(run) / "checkpoints" / old.name)
    shutil.rmtree(Path(run) / AWAY, ignore_errors=True)


def _copy_records(source, target):
    """Copy the records of all but the optimizer, each file's in their order, and the metadata with their new places."""
    metadata = dcp.FileSystemReader(source).read_metadata()
    kept = {index: info for index, info in metadata.storage_data.items() if not index.fqn.startswith(OPTIMIZER)}
    storage = {}
    for name in sorted({info.relative_path for info in kept.values()}):
        with open(source / name, "rb") as old, open(target / name, "wb") as new:
            records = [(index, info) for index, info in kept.items() if info.relative_path == name]
            for index, info in sorted(records, key=lambda record: record[1].offset):
                storage[index] = dataclasses.replace(info, offset=new.tell())
                left = info.length
                old.seek(info.offset)
                while left:
                    block = old.read(min(BLOCK, left))
                    if not block:
                        raise ValueError(f"{source / name} ends within {index.fqn}; the file is damaged")
                    left -= len(block)
                    new.write(block)
    metadata.storage_data = {index: storage[index] for index in kept}
    metadata.state_dict_metadata = {
        name: entry for name, entry in metadata.state_dict_metadata.items() if not name.startswith(OPTIMIZER)
    }
    mcore = getattr(metadata, "mcore_data", None)
    if mcore:
        metadata.mcore_data = {name: entry for name, entry in mcore.items() if not name.startswith(OPTIMIZER)}
    if getattr(metadata, "all_local_plans", None):
        del metadata.all_local_plans  # a cache for saving again with the same plan; it lists the optimizer's records
    with open(target / ".metadata", "wb") as file:  # as torch writes it
        pickle.dump(metadata, file)


def older(run):
    """The complete checkpoints of a run, but for the newest, that still have their optimizer state."""
    recover(run)
    newest = checkpoints.latest(run)
    found = [path for path in (Path(run) / "checkpoints").glob("*") if path.is_dir() and not path.is_symlink()]
    return [
        path
        for path in sorted(found, key=checkpoints.step)
        if checkpoints.problem(path) is None
        and newest is not None
        and path.resolve() != newest.resolve()
        and not (path / checkpoints.NO_OPTIMIZER).exists()
    ]

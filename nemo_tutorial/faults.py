"""What a run's folder says about how it ended, and what a run that goes on may not change. Nothing heavy is imported.

record/run.json has every start's flags and data; preempted.json, failure.json and early_stop.json the last one's end.
"""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path

from nemo_tutorial import checkpoints, schedule

PREEMPTED, FAILURE, EARLY_STOP, LOCK = "preempted.json", "failure.json", "early_stop.json", ".training"
# What a run that goes on must share with its last start, as far as flags say it. Layouts and batches a GPU may differ.
DATA = (
    "dataset_path split seq_length global_batch_size seed prompt_template system_prompt packing packed_sequence_size "
    "overlong"
).split()
SCHEDULE = "lr min_lr warmup_steps max_steps lr_decay lr_wsd_decay_steps".split()
MODEL = "peft hf_model_id lora_rank lora_alpha lora_target_modules".split()
FINAL = ("NaN", "spike")  # the same again after a restart
NO_PROGRESS = 3


def read(run, name):
    """A JSON file of a run's record, or None."""
    try:
        return json.loads((Path(run) / "record" / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def clear(run):
    """Remove what an earlier start wrote about its end."""
    for name in (PREEMPTED, FAILURE, EARLY_STOP):
        (Path(run) / "record" / name).unlink(missing_ok=True)


def hold(run):
    """Mark a run as being trained by this process until it ends; gives what must be kept. Raises BlockingIOError."""
    file = open(Path(run) / "record" / LOCK, "wb")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a loader's process would inherit that
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass
    return file


def busy(run):
    """Whether a process of this machine, or of one that shares its locks, trains in this folder."""
    try:
        with open(Path(run) / "record" / LOCK, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def remove_unfinished(run):
    """Remove the checkpoints that a run could not finish writing, and their markers; return their names."""
    found = []
    for marker in (Path(run) / "checkpoints").glob(f"*{checkpoints.UNFINISHED}"):
        folder = marker.with_name(marker.name.removesuffix(checkpoints.UNFINISHED))
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            marker.unlink(missing_ok=True)
            found.append(folder.name)
    for link in (Path(run) / "checkpoints").glob("*"):
        if link.is_symlink() and not link.exists():
            link.unlink()
    return found


def identity(files):
    """What tells whether data are still the same: {file: [bytes, hash of its first and last MiB]}."""
    found = {}
    for file in files:
        with open(file, "rb") as opened:
            size = opened.seek(0, 2)
            digest = hashlib.sha256()
            for start in (0, max(0, size - (1 << 20))):
                opened.seek(start)
                digest.update(opened.read(1 << 20))
        found[str(file)] = [size, digest.hexdigest()]
    return found


def changes(args, last, data):
    """What is no longer as at a run's last start, as (what, old, new); `data` is `identity` of today's files."""
    flags, found = last.get("flags", {}), []
    for name in (*DATA, *SCHEDULE, *MODEL):
        if name not in flags or not hasattr(args, name):
            continue
        old, new = flags[name], json.loads(json.dumps(getattr(args, name)))
        if name == "hf_model_id" and (flags.get("nemo_model") is not None or "split" not in flags or new is None):
            continue  # the shape is not from there
        if old != new and not _follows(name, args, flags):
            found.append((f"--{name}", old, new))
    before = last.get("data") or {}
    same_names = flags.get("dataset_path") == getattr(args, "dataset_path", None)
    for file in sorted(before.keys() | data.keys()) if before and same_names else ():
        old, new = before.get(file), data.get(file)
        if old != new:
            words = [f"{one[0]:,} bytes" if one else "not there" for one in (old, new)]
            found.append((file, words[0], words[1] if words[0] != words[1] else "as many, but others"))
    return found


def _follows(name, args, flags):
    """Whether a changed value needs no permission: more steps, and what follows from them by default."""
    if name == "max_steps":
        return args.max_steps > flags["max_steps"]
    if name == "warmup_steps":
        defaults = [schedule.warmup_steps(steps) for steps in (flags.get("max_steps"), args.max_steps)]
        return [flags["warmup_steps"], args.warmup_steps] == defaults
    if name == "lr_wsd_decay_steps" and args.lr_decay == flags["lr_decay"] == "wsd":
        defaults = [schedule.wsd_decay_steps(steps) for steps in (flags["max_steps"], args.max_steps)]
        return [flags["lr_wsd_decay_steps"], args.lr_wsd_decay_steps] == defaults
    return False


def restart(step, failures, allowed):
    """Whether a run that has failed starts again: (yes or no, why).

    `step` is that of the last complete checkpoint, `failures` those at the failures before, `allowed` their number.
    """
    if len(failures) >= allowed:
        return False, f"after {len(failures)} of {allowed} restarts" if allowed else None
    if len(failures) >= NO_PROGRESS - 1 and all(before >= step for before in failures[-NO_PROGRESS + 1 :]):
        return False, f"no progress: {NO_PROGRESS} failures in a row after step {step}"
    return True, f"restart {len(failures) + 1} of {allowed} from step {step}"

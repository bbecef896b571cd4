"""The numbers that a run leaves in record/metrics.jsonl: reading and writing them, and what follows from them."""

import json
import math
import os
from pathlib import Path


def path(run):
    """Where a run keeps its numbers."""
    return Path(run) / "record" / "metrics.jsonl"


def append(file, lines):
    """Append JSON lines in one write, so that a process that is killed leaves whole lines."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def end_line(file):
    """End the last line if a full disk or a crash of the machine cut it off: what is appended stays readable."""
    try:
        with open(file, "rb+") as lines:
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
    except OSError:  # none yet, or an empty one
        pass


def read(run):
    """All whole lines of a run, as they were written: a step that was done again is there twice."""
    try:
        return parse(path(run).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []


def parse(text):
    """The whole lines of a text in the form of metrics.jsonl."""
    found = []
    for line in text.splitlines():
        try:
            line = json.loads(line)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def steps(lines):
    """(training lines, validation lines), one a step in order: of a step that was done again, the last."""
    training = {line["step"]: line for line in lines if "loss" in line}
    validation = {line["step"]: line for line in lines if "val_loss" in line}
    return [training[step] for step in sorted(training)], [validation[step] for step in sorted(validation)]


def perplexity(loss):
    """e to the loss (nats a token); infinite where that is no number any more."""
    return math.exp(loss) if loss < 700 else math.inf


def median(lines, name):
    """The median of a value over the steps, the first of the run left out if there are others: it warms up."""
    import statistics  # takes longer than a whole dry run's arithmetic

    values = [line[name] for line in (lines[1:] or lines) if name in line]
    return statistics.median(values) if values else None


def duration(seconds):
    """3725 -> '1:02:05', 93784 -> '1 d 2:03:04'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02}:{seconds:02}"

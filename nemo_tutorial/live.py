"""The live bar: on a terminal, one line that follows a run, in the place of the log.

The ranks' output passes through torchrun and NeMo-Run, so no rank has a terminal: the launcher draws, from what they
write. Warnings of the log are shown above the bar; all of it is in the file that the bar names while nothing trains.
"""

import contextlib
import re
import shutil
import sys
import threading
import time
from pathlib import Path

from nemo_tutorial import metrics

SECONDS = 0.5  # between looks


@contextlib.contextmanager
def bar(experiment, total, run):
    """Draw while the block runs; `run` is the run's folder, `total` its steps. Ends with the last state on a line."""
    drawing = Bar(experiment, total, run)
    stop = threading.Event()

    def follow():
        while not stop.wait(SECONDS):
            drawing.look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        drawing.look(last=True)


class Bar:
    """What is drawn; `look` reads what is new and draws it."""

    def __init__(self, experiment, total, run, out=None):
        self.experiment, self.total, self.out = experiment, total, out or sys.stdout
        self.metrics, self.began = metrics.path(run), time.time()
        try:
            self.read = self.metrics.stat().st_size  # a run that goes on: what was before is past
        except OSError:
            self.read = 0
        self.log, self.log_read, self.last_said = None, 0, ""
        self.step = self.validation = None
        self.first = self.newest = None  # (moment, step) of what was seen first, and last

    def look(self, last=False):
        """Read what was written since the last look, and draw."""
        warnings = self._read_log()
        for line in self._new_lines():
            if "val_loss" in line:
                self.validation = line
            elif "loss" in line:
                self.step = line
                self.newest = (time.time(), line["step"])
                self.first = self.first or self.newest
        width = shutil.get_terminal_size().columns
        for warning in warnings:
            self.out.write("\r\x1b[K" + warning + "\n")
        # The cursor goes back to the start of the line: what others print is not behind the bar.
        self.out.write("\r\x1b[K" + self.text(width - 1) + ("\n" if last else "\r"))
        self.out.flush()

    def _new_lines(self):
        try:
            with open(self.metrics, "rb") as file:
                file.seek(self.read)
                new = file.read()
        except OSError:
            return []
        whole = new[: new.rfind(b"\n") + 1]
        self.read += len(whole)
        return metrics.parse(whole.decode("utf-8", "replace"))

    def _read_log(self):
        """Take in the log's new lines; return its warnings."""
        if self.log is None:
            found = [
                path
                for path in Path("experiments", self.experiment).rglob("combined.log")
                if path.stat().st_mtime >= self.began - 1
            ]
            self.log = max(found, key=lambda path: path.stat().st_mtime, default=None)
        if self.log is None:
            return []
        with open(self.log, "rb") as file:
            file.seek(self.log_read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.log_read += len(whole)
        lines = [
            re.sub(r"\x1b\[[0-9;]*m|^\[\w+\]:", "", line).strip()
            for line in whole.decode("utf-8", "replace").splitlines()
        ]
        lines = [line for line in lines if line]
        self.last_said = lines[-1] if lines else self.last_said
        return [line for line in lines if line.startswith("warning:")]

    def text(self, width):
        """The line, of at most `width` characters."""
        if self.step is None:
            waited = metrics.duration(time.time() - self.began)
            state = f"validation before the first step: {self.validation['val_loss']:.4f}" if self.validation else None
            return f"starting {waited}  {state or self.last_said or 'importing NeMo'}"[:width]
        line, done = self.step, self.step["step"] / self.total
        seconds = line.get("seconds", 0)
        if self.newest[1] > self.first[1]:  # of the clock, so that validations and saving are in it
            seconds = (self.newest[0] - self.first[0]) / (self.newest[1] - self.first[1])
        parts = [f"{line['step']}/{self.total}", f"loss {line['loss']:.4f}"]
        if self.validation:
            parts.append(f"val {self.validation['val_loss']:.4f}")
        parts.append(f"left {metrics.duration((self.total - line['step']) * seconds)}")
        for name, form in (
            ("tokens_per_second_per_gpu", "{:,.0f} tok/s/GPU"),
            ("mfu", "MFU {:.1%}"),
            ("tflops_per_gpu", "{:.0f} TFLOP/s"),
            ("memory_gb", "{:.1f} GB"),
            ("learning_rate", "lr {:.3g}"),
            ("grad_norm", "grad {:.3g}"),
        ):
            if name in line:
                parts.append(form.format(line[name]))
        room = max(8, min(30, width // 5))
        filled = "█" * round(done * room)
        text = f"{filled:░<{room}} {done:4.0%}  {parts[0]}"
        for part in parts[1:]:  # the first ones first: what does not fit is left out whole
            if len(text) + len(part) + 2 > width:
                break
            text += "  " + part
        return text[:width]

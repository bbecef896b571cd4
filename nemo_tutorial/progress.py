"""The progress of a run, from rank 0: a line in the log, record/metrics.jsonl, the loggers, at the end the report."""

import itertools
import json
import os
import time
from collections import deque
from pathlib import Path

import torch
from lightning.pytorch import Callback

from nemo_tutorial import metrics, report, throughput

SECONDS = 2  # metrics.jsonl is never older than this and a step, however long the log's interval is
NAMES = {"reduced_train_loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm"}


class Progress(Callback):
    """Append one JSON line a step and one a validation to `path`; print one line every `interval` steps.

    Fields of a step: step (finished optimizer steps), loss (nats a token), learning_rate, grad_norm, seconds (of the
    step; the mean where several are written at once), tokens (real ones of all replicas, no padding),
    tokens_per_second_per_gpu, tflops_per_gpu and mfu (see throughput.py), memory_gb (10^9 bytes; rank 0's peak on a
    GPU, its resident size on a CPU). Of a validation: step, val_loss, seconds, memory_gb (the largest of all ranks).
    A value that is not known is left out: TFLOP/s and MFU on a CPU.
    """

    def __init__(self, path, interval, cost, low_precision):
        self.path, self.interval, self.cost = path, interval, cost
        self.low_precision = low_precision  # bf16 or FP8: what the table of peaks is of
        self.pending = []  # (step, its Numbers, when it ended) not yet written
        self.lengths, self.padded = [], False
        self.mark = self.validating_since = self.val_loss = None
        self.recent, self.pauses = deque(maxlen=20), deque(maxlen=3)
        self.peak = None

    # What is counted.

    def on_fit_start(self, trainer, pl_module):
        # The validation loss before the first step, to compare with. Here, because with PP NeMo has set it to 0.
        trainer.num_sanity_val_steps = trainer.limit_val_batches
        data_step = pl_module.data_step

        def counted(batches):
            return data_step(map(self._count, batches) if trainer.training else batches)

        # On this object, not in the config: that is saved with every checkpoint. With several chunks of a pipeline
        # the others are copies made before, so that nothing is counted twice.
        pl_module.data_step = counted
        pl_module.log = logged_without_waiting(pl_module.log, pl_module.device)

    def _count(self, batch):
        values = batch[0] if isinstance(batch, tuple) else batch
        self.lengths += sample_lengths(values)
        self.padded = "token_count" in values
        return batch

    def _counted(self, pl_module):
        """{"tokens", "flops"} of the step over all replicas, as numbers or as tensors that may still be computed."""
        from megatron.core import parallel_state

        found = [sum(self.lengths), throughput.flops(self.cost, self.lengths)]
        self.lengths = []
        if not self.padded:  # each replica has as many
            found = [value * parallel_state.get_data_parallel_world_size() for value in found]
        else:
            found = torch.tensor(found, dtype=torch.float64).to(pl_module.device, non_blocking=True)
            torch.distributed.all_reduce(found, group=parallel_state.get_data_parallel_group())
        return dict(zip(("tokens", "flops"), found))

    def on_train_start(self, trainer, pl_module):
        # NeMo says it of rank 0 alone; the split of the model shows on the others.
        count = sum(parameter.numel() for parameter in pl_module.parameters())
        print(f"rank {trainer.global_rank} holds {count:,} parameters", flush=True)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:
            metrics.end_line(self.path)
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            machine = {"device": device, "ranks": trainer.world_size}
            (Path(self.path).parent / "machine.json").write_text(json.dumps(machine), encoding="utf-8")
        if torch.cuda.is_available() and self.low_precision:
            self.peak = throughput.peak(torch.cuda.get_device_name())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.mark is None:  # the first step, or the first after a validation
            self.mark = time.monotonic()
            if self.validating_since is not None:
                self.pauses.append(self.mark - self.validating_since)
                self.validating_since = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        if step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning validates where a run is told to stop: it ends with a validation
        counted = self._counted(pl_module)
        if not trainer.is_global_zero:
            return
        logged = trainer.callback_metrics
        found = {new: logged[name] for name, new in NAMES.items() if name in logged}
        self.pending.append((step, Numbers(found | counted), time.monotonic()))
        if trainer.should_stop:
            self._flush(trainer, say=True)
        elif len(self.pending) > 1:
            # All but this step: its numbers may still be computed, and the GPU shall not wait for who waits for them.
            before, _, ended = self.pending[-2]
            if before % self.interval == 0 or ended - self.mark > SECONDS:
                self._flush(trainer, but=1)

    # What is written.

    def _flush(self, trainer, but=0, say=False):
        """Write the pending steps but the last `but`; print those that are due, and with `say` the last one anyway."""
        count = len(self.pending) - but
        steps, self.pending = self.pending[:count], self.pending[count:]
        if not steps:
            return
        numbers = [own.get() for _, own, _ in steps]
        ended = steps[-1][-1]
        seconds = (ended - self.mark) / count
        self.mark = ended
        lines = []
        for (step, *_), own in zip(steps, numbers):
            tokens, flops = own.pop("tokens"), own.pop("flops")
            line = {"step": step, **own, "seconds": round(seconds, 4), "tokens": round(tokens)}
            line["tokens_per_second_per_gpu"] = round(tokens / trainer.world_size / seconds, 1)
            if torch.cuda.is_available():
                tflops = flops / trainer.world_size / seconds / 1e12
                line["tflops_per_gpu"] = float(f"{tflops:.4g}")
                if self.peak:
                    line["mfu"] = round(tflops / self.peak, 4)
            line["memory_gb"] = round(memory() / 1e9, 3)
            lines.append(line)
        self.recent.append((count, seconds * count))
        metrics.append(self.path, lines)
        for logger in trainer.loggers:
            extra = {name: lines[-1][name] for name in EXTRA if name in lines[-1]}
            logger.log_metrics(extra, step=lines[-1]["step"] - 1)  # NeMo counts from 0
        for line in lines:
            if line["step"] % self.interval == 0 or (say and line is lines[-1]):
                left = self._left(trainer, line["step"])
                print(log_line(line | {"val_loss": self.val_loss}, trainer.max_steps, left), flush=True)

    def _left(self, trainer, step):
        """Seconds left after `step`: of the steps as the last ones took, and of the validations, saving included."""
        steps = trainer.max_steps - step
        taken = sum(seconds for _, seconds in self.recent) / sum(count for count, _ in self.recent)
        pauses = 0
        if self.pauses and trainer.val_check_batch:
            pauses = steps // trainer.val_check_batch * sum(self.pauses) / len(self.pauses)
        return steps * taken + pauses

    def on_validation_start(self, trainer, pl_module):
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._flush(trainer)
        self.mark, self.validating_since = None, time.monotonic()

    def on_validation_end(self, trainer, pl_module):
        if "val_loss" not in trainer.callback_metrics:
            return
        largest = torch.tensor([memory()], dtype=torch.float64, device=pl_module.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        self.val_loss = float(trainer.callback_metrics["val_loss"])
        if trainer.is_global_zero:
            line = {
                "step": trainer.global_step,
                "val_loss": self.val_loss,
                "seconds": round(time.monotonic() - self.validating_since, 4),
                "memory_gb": round(float(largest) / 1e9, 3),
            }
            metrics.append(self.path, [line])
            print(validation_line(line), flush=True)

    def on_exception(self, trainer, pl_module, exception):
        # Where a run is stopped on purpose. After a fault, asking the GPU for values might wait for ever.
        if isinstance(exception, SystemExit) and trainer.is_global_zero and self.mark is not None:
            self._flush(trainer, say=True)

    def teardown(self, trainer, pl_module, stage):
        # Here, not by the launcher alone: on Slurm that is gone when the run ends.
        if stage == "fit" and trainer.is_global_zero:
            self._flush(trainer)
            report.write_if_possible(Path(self.path).parents[1])


class Numbers:
    """Numbers that a GPU has still to compute, on their way to the host: nothing waits until they are asked for."""

    def __init__(self, values):
        """`values`: name -> tensor of one element, or a plain number."""
        coming = {name: value for name, value in values.items() if torch.is_tensor(value) and value.is_cuda}
        # Those that the host has stay here: NeMo's time of a step, moved to the others, would wait for the GPU.
        self.known = {
            name: value.item() if torch.is_tensor(value) else value
            for name, value in values.items()
            if name not in coming
        }
        self.names, self.values, self.there = list(coming), torch.empty(0), None
        if coming:
            together = torch.stack([value.detach().reshape(()).double() for value in coming.values()])
            self.values = together.to("cpu", non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()

    def arrived(self):
        """Whether get() would not wait."""
        return not self.there or self.there.query()

    def get(self):
        """{name: number}."""
        if self.there:
            self.there.synchronize()
        return dict(zip(self.names, self.values.tolist())) | self.known


EXTRA = ("tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "memory_gb")


def logged_without_waiting(log, device):
    """A LightningModule's `log` that never waits for `device`: the next step starts while this one's end still runs.

    Lightning copies a number there and waits until it has arrived, and it makes numbers of what is for a progress bar,
    also where there is none, whenever a callback asks for any value.
    """

    def quiet(name, value, *args, **kwargs):
        if isinstance(value, (int, float)):
            value = torch.tensor(value, dtype=torch.float32, pin_memory=device.type == "cuda")
            value = value.to(device, non_blocking=True)
        log(name, value, *args, **kwargs | {"prog_bar": False})

    return quiet


def sample_lengths(batch):
    """Lengths in tokens of the samples of a micro batch, on the host, that attend each to itself; no padding."""
    rows, length = batch["tokens"].shape
    counts = batch.get("token_count")  # only instruction data are padded, and say so
    if counts is None:
        return [length] * rows
    if "cu_seqlens" not in batch:
        return [min(int(count), length) for count in counts]
    found = []
    for ends, count in zip(batch["cu_seqlens"].tolist(), counts):
        ends = [end for end in ends if 0 <= end <= count]  # after the last sample: padding, and -1
        found += [end - start for start, end in itertools.pairwise(ends)]
    return found


def memory():
    """Bytes: the peak of a GPU's tensors since the start, or what this process holds of the host's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def log_line(line, total, left):
    """A step as one line of text."""

    def show(name, form):
        return form.format(line[name]) if line.get(name) is not None else "–"

    parts = [
        f"step {line['step']}/{total}",
        "loss " + show("loss", "{:.4f}"),
        "val " + show("val_loss", "{:.4f}"),
        "lr " + show("learning_rate", "{:.3g}"),
        "grad " + show("grad_norm", "{:.3g}"),
        show("tokens_per_second_per_gpu", "{:,.0f}") + " tok/s/GPU",
        show("tflops_per_gpu", "{:.1f}") + " TFLOP/s",
        "MFU " + show("mfu", "{:.1%}"),
        show("memory_gb", "{:.1f}") + " GB",
        show("seconds", "{:.3g}") + " s/step",
        "left " + metrics.duration(left),
    ]
    return " | ".join(parts)


def validation_line(line):
    """A validation as one line of text."""
    return (
        f"validation after step {line['step']}: loss {line['val_loss']:.4f}, perplexity "
        f"{metrics.perplexity(line['val_loss']):.4g}, in {line['seconds']:.1f} s"
    )

"""What runs in the ranks beside NeMo's own callbacks; progress.py, samples.py and loggers.py have more."""

import collections
import contextlib
import ctypes
import datetime
import faulthandler
import json
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil
import torch
from lightning.pytorch import Callback
from nemo.lightning import megatron_init

from nemo_tutorial import ahead, checkpoints, faults, progress, retention


class ExitInterval(Callback):
    """Stop at every multiple of `steps`; the run's schedule and data order stay those of all its steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.steps == 0:
            trainer.should_stop = True


class Preemption(Callback):
    """SIGTERM, SIGUSR1 or SIGINT at any rank: a complete checkpoint after the running step, `marker`, exit code 143.

    `marker` is a JSON file: {"step", "signal", "checkpoint"}; a start removes it. A second signal hurries: the rank
    exits with 1 at once and saves nothing. NeMo's own callback listens at rank 0 alone, and exits with 0.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    ONE = 5  # seconds within which signals are one: torchrun passes on what its ranks may have got themselves

    def __init__(self, marker):
        self.marker = Path(marker)
        self.received = self.since = 0
        self.group = None
        self._listen()  # from here on, and not first at the first step

    def _listen(self):
        for number in self.SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        if self.received and time.monotonic() - self.since > self.ONE:
            os.write(2, b"a second signal: this rank exits at once, without a checkpoint\n")
            os._exit(1)
        if not self.received:
            self.received, self.since = number, time.monotonic()

    def setup(self, trainer, pl_module, stage):
        os.register_at_fork(before=_note_thread, after_in_child=_in_child)

    def on_sanity_check_start(self, trainer, pl_module):
        self._listen()  # instead of Lightning's, which ends the one rank that got the signal

    def on_train_start(self, trainer, pl_module):
        self._listen()

    def on_fit_start(self, trainer, pl_module):
        # On the CPU: a flag on the GPU would make every step wait for it.
        self.group = torch.distributed.new_group(backend="gloo")
        if trainer.is_global_zero:
            self.marker.parent.mkdir(parents=True, exist_ok=True)
            self.marker.unlink(missing_ok=True)
            try:
                self.lock = faults.hold(self.marker.parents[1])
            except BlockingIOError:
                raise RuntimeError(f"{self.marker.parents[1]} is being trained by another process") from None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._stop_if_signalled(trainer, trained=True)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._stop_if_signalled(trainer, trained=False)

    def _stop_if_signalled(self, trainer, trained):
        flag = torch.tensor(self.received, dtype=torch.int32, device="cpu")
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        number = int(flag)
        if not number:
            return
        if not self.received:
            self.received, self.since = number, time.monotonic()
        checkpoint = self._save(trainer, trained)
        if trainer.is_global_zero:
            # Before any rank leaves: whoever sees one gone ends the others.
            values = {"step": trainer.global_step, "signal": signal.Signals(number).name, "checkpoint": checkpoint}
            checkpoints.write_whole(self.marker, json.dumps(values))
            print(f"{values['signal']}: stopped after step {values['step']}; checkpoint: {checkpoint}", flush=True)
        torch.distributed.barrier(self.group)
        for other in self.SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + signal.SIGTERM)

    def _save(self, trainer, trained):
        """Save, unless it is done; the path of the checkpoint, or None if there is none yet."""
        saver, loop = trainer.checkpoint_callback, trainer.fit_loop.epoch_loop
        if trainer.sanity_checking:  # before the first step of this start: what it went on from, if anything
            return str(trainer.ckpt_path).removesuffix("/weights") if trainer.ckpt_path else None
        if saver._last_global_step_saved != trainer.global_step:
            if trained:  # Lightning counts the batch only after this: validations would be one step late from here on
                loop.batch_progress.increment_completed()
            else:  # the validation is not half done for those who go on, but to be done
                loop.val_loop.batch_progress.reset()
            candidates = saver._monitor_candidates(trainer)
            name = saver.CHECKPOINT_NAME_LAST
            if saver.monitor not in candidates:  # not validated yet: the name would say 0.00
                name = re.sub(r"\{val_loss[^}]*\}-", "", saver.filename) + "-last"
            saver.last_model_path = saver.format_checkpoint_name(candidates, name)
            saver._save_checkpoint(trainer, saver.last_model_path)
        finalize = getattr(trainer.strategy.checkpoint_io, "maybe_finalize_save_checkpoint", None)
        if finalize:  # a save in the background
            finalize(blocking=True)
        return saver.last_model_path.removesuffix(".ckpt")


_main_forks = False  # whether it is the main thread that is about to fork: what is forked takes its own for that
PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that this process gets when the thread that forked it ends


def _note_thread():
    global _main_forks
    _main_forks = threading.current_thread() is threading.main_thread()


def _in_child():
    """A process that this rank has forked: of a loader, of a save."""
    # torchrun passes a signal on to the rank's process group: the loaders' processes would die before the save.
    os.setpgid(0, 0)
    # So a rank that is killed does not take them along: Megatron's server of a save's results would stay for ever.
    if _main_forks:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class OwnSchedule(Callback):
    """Keep the learning rate schedule that this start was given.

    NeMo restores the checkpoint's with the step: a raised --max_steps would be trained at the old floor.
    """

    PLACE = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step")  # where in the schedule it is

    def on_fit_start(self, trainer, pl_module):
        self.own = [
            {name: value for name, value in config.scheduler.state_dict().items() if name not in self.PLACE}
            for config in trainer.lr_scheduler_configs
        ]

    def on_train_start(self, trainer, pl_module):
        for config, own in zip(trainer.lr_scheduler_configs, self.own):
            config.scheduler.__dict__.update(own)
            if trainer.global_step:  # the rate of the step to come, by these values
                config.scheduler.last_epoch -= 1
                config.scheduler.step()


class OneEpoch(Callback):
    """Let a fine-tuning run that goes on read to its end: only --max_steps ends it.

    NeMo's batch sampler has the length of what is left, and Lightning adds to what it reads what was read before: it
    would end the epoch early, and read the same rows once more.
    """

    def on_train_start(self, trainer, pl_module):
        sampler = getattr(trainer.datamodule, "data_sampler", None)
        if trainer.global_step and getattr(sampler, "dataloader_type", None) == "batch":
            trainer.fit_loop.max_batches = math.inf
            trainer.fit_loop._data_fetcher.length = None


class RandomState(Callback):
    """Seed every step by its number, so that a run that was interrupted draws the same dropout: NeMo saves no state.

    Only where something is drawn: it takes a millisecond or two between two steps, in which the GPU waits.
    """

    NAMES = ("hidden_dropout", "attention_dropout", "moe_input_jitter_eps")  # in Megatron's config

    def __init__(self, seed):
        self.seed, self.draws = seed, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.draws is None:  # not before the first step: until then there is no adapter
            modules = (module for module in pl_module.modules() if isinstance(module, torch.nn.Dropout))
            self.draws = any(getattr(pl_module.config, name, None) for name in self.NAMES)
            self.draws = self.draws or any(module.p for module in modules)
        if self.draws:
            megatron_init._set_random_seed(max(1, (self.seed + 1_000_003 * (trainer.global_step + 1)) % 2**31))


def write_failure(folder, trainer, kind, message, step=None):
    """Write down why a run ends: `folder`/failure.json, by the rank that sees it first; the others' are dropped.

    Fields: kind, rank, step (counted from 1; by default the one that runs), samples ([first, last] of it), message.
    """
    sampler = getattr(trainer.datamodule, "data_sampler", None)
    step, batch = step or trainer.global_step + 1, getattr(sampler, "global_batch_size", None)
    values = {
        "kind": kind,
        "rank": trainer.global_rank,
        "step": step,
        "samples": [(step - 1) * batch, step * batch - 1] if batch else None,
        "message": message,
    }
    partial = Path(folder, f".failure.{trainer.global_rank}.partial")
    try:
        partial.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        os.link(partial, Path(folder, faults.FAILURE))
    except OSError:  # another rank was first, or the disk is full
        pass
    finally:
        partial.unlink(missing_ok=True)
    print(f"rank {values['rank']}, step {step}, samples {values['samples']}: {message}", flush=True)


def _bad_micro_batches(outputs):
    """The numbers of those among a step's micro batches whose loss is NaN or infinite."""

    def bad(value):
        if isinstance(value, dict):
            return any(bad(part) for part in value.values())
        if isinstance(value, (list, tuple)):
            return any(bad(part) for part in value)
        return torch.is_tensor(value) and value.is_floating_point() and not bool(torch.isfinite(value).all())

    return [number for number, output in enumerate(outputs or ()) if bad(output)]


class LossGuard(Callback):
    """Stop when the loss or the gradients are NaN or infinite, or the loss jumps: before a checkpoint is overwritten.

    `max_spike` is how many times the mean loss of the 20 steps before a loss may be; None for any.
    """

    STEPS = 20
    VALUES = {"reduced_train_loss": "loss", "grad_norm": "gradient norm", "own_gradients": "gradient norm"}
    LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")  # another rank is gone

    def __init__(self, folder, max_spike=None):
        self.folder, self.max_spike = folder, max_spike
        self.before, self.outputs = collections.deque(maxlen=self.STEPS), []
        self.waiting = None  # a step, its micro batches' outputs, its numbers

    def on_megatron_reduce_microbatches_start(self, step=None, microbatch_outputs=(), **kwargs):
        self.outputs = microbatch_outputs

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._judge(trainer)  # the step before; awaiting this one's values, the GPU would stand idle
        logged = trainer.callback_metrics | ahead.own_gradients()
        found = {name: logged[name] for name in self.VALUES if name in logged}
        if found:
            self.waiting = trainer.global_step, self.outputs, progress.Numbers(found)

    # Before anything is saved the last step is judged as well.

    def on_validation_start(self, trainer, pl_module):
        self._judge(trainer)

    def on_train_end(self, trainer, pl_module):
        self._judge(trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self._judge(trainer)

    def _judge(self, trainer, wait=True):
        if not self.waiting:
            return
        (step, outputs, numbers), self.waiting = self.waiting, None
        if not wait and not numbers.arrived():
            return
        values = numbers.get()
        for name, value in values.items():
            if not math.isfinite(value):
                own, where = _bad_micro_batches(outputs), ""
                if own:
                    where = f", in micro batch {', '.join(map(str, own))} of this rank"
                elif not math.isfinite(values.get("own_gradients", 0)):
                    where = ", in this rank's own gradients"
                time.sleep(0 if where else 3)  # the rank that it came from shall be the one that is named
                self._stop(trainer, "NaN", f"the {self.VALUES[name]} is {value}{where}", step)
        loss = values.get("reduced_train_loss", 0.0)
        if self.max_spike and len(self.before) >= 5:
            mean = sum(self.before) / len(self.before)
            if loss > self.max_spike * mean:
                before = f"{loss / mean:.3g} times the mean of the {len(self.before)} steps before"
                self._stop(trainer, "spike", f"the loss is {loss:.4g}, {before}", step)
        self.before.append(loss)

    def on_validation_end(self, trainer, pl_module):
        loss = float(trainer.callback_metrics.get("val_loss", 0.0))
        if not math.isfinite(loss):  # of the validation's own rows, or of weights that a checkpoint is about to keep
            for name, weights in pl_module.named_parameters():
                if not bool(torch.isfinite(weights.detach().float()).all()):
                    what = f"the validation loss is {loss}, and {name} has NaN or infinity"
                    self._stop(trainer, "NaN", what, trainer.global_step)

    def _stop(self, trainer, kind, message, step):
        write_failure(self.folder, trainer, kind, message, step=step)
        raise SystemExit(1)

    def on_exception(self, trainer, pl_module, exception):
        if not isinstance(exception, Exception):  # a SystemExit: it has been said why
            return
        try:
            self._judge(trainer, wait=False)  # the step before may be the cause; a GPU that hangs is not awaited
        except SystemExit:
            return
        except RuntimeError:  # the GPU answers no more
            pass
        text, kind = str(exception), "exception"
        if "NaN" in text or " Inf" in text:
            kind = "NaN"
        elif "No space left" in text or "File too large" in text:
            kind = "full disk"
        elif any(word in text for word in self.LOST):
            kind = "lost"
            time.sleep(3)  # the rank that is the cause shall be the one that is named, if it still can
        write_failure(self.folder, trainer, kind, f"{type(exception).__name__}: {text[:1000]}")


_patient = []  # what patience() was asked for and runs now


@contextlib.contextmanager
def patience(what):
    """Let Heartbeat wait for `what`, which moves no micro batch and may take longer than --hang_timeout."""
    _patient.append(what)
    try:
        yield
    finally:
        _patient.remove(what)


class Heartbeat(Callback):
    """End this rank, and those beside it, when nothing has moved for `seconds`: a rank that hangs holds all others.

    What moves is a micro batch, not a step, which may take minutes; while a checkpoint is saved on one node, its files.
    `SLOW` seconds are allowed until the first step is done, for what patience() covers, and for a save on several
    nodes, of whose disks this one knows nothing.
    """

    SLOW = 1800
    ENDING = 30  # seconds to end in after an exception: with NCCL, this rank may wait for those that wait for it

    def __init__(self, folder, seconds):
        self.folder, self.seconds = folder, seconds
        self.deadline, self.last, self.trainer, self.settled = math.inf, "start", None, False

    def beat(self, what):
        """Something has moved: `what`."""
        self.last, self.allowed = what, self.seconds if self.settled else max(self.SLOW, self.seconds)
        self.deadline = time.monotonic() + self.allowed

    def on_train_start(self, trainer, pl_module):
        self.trainer, self.main = trainer, threading.get_ident()
        self.beat("the first step")
        threading.Thread(target=self._watch, daemon=True).start()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.beat("a step's start")

    def on_megatron_microbatch_start(self, **kwargs):
        self.beat("a micro batch")

    def on_megatron_microbatch_end(self, **kwargs):
        self.beat("a micro batch")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.settled = True
        self.beat("a step's end")

    def on_validation_start(self, trainer, pl_module):
        self.beat("a validation's start")

    def on_validation_end(self, trainer, pl_module):
        self.beat("a validation's end")

    def on_train_end(self, trainer, pl_module):
        self.beat("the end")

    def on_exception(self, trainer, pl_module, exception):
        self.settled = True
        if isinstance(exception, Exception):  # and not a SystemExit
            self.seconds = min(self.seconds, self.ENDING)
        self.beat("the end")

    def teardown(self, trainer, pl_module, stage):
        self.deadline = math.inf
        faulthandler.cancel_dump_traceback_later()

    def _saves(self):
        """Whether the main thread is in a checkpoint callback, Lightning's or NeMo's."""
        frames = traceback.walk_stack(sys._current_frames()[self.main])
        return any(Path(frame.f_code.co_filename).name == "model_checkpoint.py" for frame, _ in frames)

    def _files(self):
        """What changes while a checkpoint is saved: number and size of the files; the time, while a disk is awaited."""
        sizes = []
        for folder, _, names in os.walk(Path(self.folder).parent / "checkpoints"):
            for name in names:
                with contextlib.suppress(OSError):
                    sizes.append(os.lstat(os.path.join(folder, name)).st_size)
        waits = False
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = psutil.Process().parent().children(recursive=True)
            waits = any(process.status() == psutil.STATUS_DISK_SLEEP for process in ranks)
        return len(sizes), sum(sizes), time.monotonic() if waits else None

    def _watch(self):
        before, since, until, looked, seen = time.monotonic(), None, 0, 0, None  # until: of the slow work, from `since`
        while True:
            now = time.monotonic()
            if now - before > 10:  # all of this process stood still, as in a job that Slurm suspends
                self.deadline += now - before
                until += now - before
            before, saves, slow = now, self._saves(), _patient or self.trainer.num_nodes > 1
            if saves or _patient:
                since = since or now
                if slow:
                    until = since + self.SLOW
                elif now == since or now > looked + self.seconds / 8:
                    looked, found = now, self._files()
                    if now == since or found != seen:
                        until, seen = now + self.seconds, found
            elif since:
                since, until = None, now + self.seconds
            limit = max(self.deadline, until)
            if now > limit:
                self.last = "a checkpoint's last write" if saves else self.last
                break
            if limit < math.inf:
                # A thread of C: it ends the process when this one gets no turn, as where C code holds Python's lock.
                faulthandler.dump_traceback_later(max(self.seconds, limit - now) + 5, exit=True)
            time.sleep(1)
        seconds = max(self.SLOW, self.allowed) if since and slow else self.allowed
        stack = traceback.extract_stack(sys._current_frames()[self.main])[-1]
        where = f"at {stack.filename}:{stack.lineno} in {stack.name}"
        if "torch/distributed" in stack.filename:
            where = f"waiting for another rank, in {stack.name}"
        faulthandler.dump_traceback(all_threads=True)
        words = f"nothing moved for {seconds} s after {self.last}; it is {where}"
        write_failure(self.folder, self.trainer, "hang", words)
        sys.stdout.flush()
        # A stopped process does not end itself, and torchrun would wait for it as long as for a save.
        parent = psutil.Process().parent()
        if any("torchrun" in word for word in parent.cmdline()):
            time.sleep(3)  # the others may have something to say
            for process in parent.children():
                if process.pid != os.getpid():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
        os._exit(1)


class KeepLastOptimizer(Callback):
    """After each save, take the optimizer state out of the run's older checkpoints."""

    def __init__(self, run):
        self.run, self.seen, self.group = run, 0, None

    def on_fit_start(self, trainer, pl_module):
        self.group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        saved = trainer.checkpoint_callback._last_global_step_saved
        if saved == self.seen:
            return
        self.seen = saved
        with patience("retention"):
            if trainer.is_global_zero:
                for checkpoint in retention.older(self.run):
                    try:
                        saved = retention.drop_optimizer(checkpoint)
                        print(f"{checkpoint.name}: optimizer state dropped, {saved / 1e9:.3g} GB", flush=True)
                    except (OSError, ValueError) as error:
                        print(f"warning: {checkpoint.name} keeps its optimizer state: {error}", flush=True)
            torch.distributed.barrier(self.group)  # the checkpoint must not be removed by NeMo meanwhile

"""What runs in the ranks beside NeMo's own callbacks; progress.py, samples.py and loggers.py have more."""

import json
import os
import re
import signal
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback


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
        # torchrun passes a signal on to the rank's process group: the loaders' processes would die before the save.
        os.register_at_fork(after_in_child=lambda: os.setpgid(0, 0))

    def on_fit_start(self, trainer, pl_module):
        self._listen()  # instead of Lightning's, which ends the one rank that got the signal
        # On the CPU: a flag on the GPU would make every step wait for it.
        self.group = torch.distributed.new_group(backend="gloo")
        if trainer.is_global_zero:
            self.marker.parent.mkdir(parents=True, exist_ok=True)
            self.marker.unlink(missing_ok=True)

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
            partial = self.marker.with_name(f".{self.marker.name}.partial")
            partial.write_text(json.dumps(values), encoding="utf-8")
            os.replace(partial, self.marker)
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

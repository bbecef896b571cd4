"""What runs in the ranks beside NeMo's own callbacks; progress.py, samples.py and loggers.py have more."""

from lightning.pytorch import Callback


class ExitInterval(Callback):
    """Stop at every multiple of `steps`; the run's schedule and data order stay those of all its steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.steps == 0:
            trainer.should_stop = True

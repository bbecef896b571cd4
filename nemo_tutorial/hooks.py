"""Callbacks that stand for flags: seed, save interval, early stopping, recomputation under an adapter, performance."""

import gc
import importlib
import json
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric


class Seed(Callback):
    """Seed new weights and dropout: NeMo's strategy takes no seed, and gives every run 1234."""

    def __init__(self, seed):
        self.seed = seed

    def setup(self, trainer, pl_module, stage):
        from nemo.lightning import megatron_init

        megatron_init._set_random_seed(self.seed)  # after the ranks know one another, before the model is built


class SaveInterval(Callback):
    """Let only validations at multiples of `steps`, and the last one, end with a checkpoint."""

    def __init__(self, steps):
        self.steps = steps

    def on_validation_end(self, trainer, pl_module):
        last = trainer.should_stop or trainer.global_step >= trainer.max_steps
        if trainer.global_step % self.steps and not last:
            # Lightning saves a step once; its checkpoint callback comes after all others.
            trainer.checkpoint_callback._last_global_step_saved = trainer.global_step


class EarlyStop(EarlyStopping):
    """Lightning's early stopping on the validation loss, which leaves `path` behind when it has stopped a run."""

    def __init__(self, patience, path):
        super().__init__(monitor="val_loss", patience=patience, mode="min")
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        before = trainer.should_stop  # perhaps by an exit interval
        super().on_validation_end(trainer, pl_module)
        # Any rank's decision stops all of them.
        stopped = trainer.should_stop and (not before or self.wait_count >= self.patience)
        if stopped and trainer.is_global_zero:
            found = {
                "step": trainer.global_step,
                "best": float(self.best_score),
                "last": float(trainer.callback_metrics["val_loss"]),
            }
            Path(self.path).write_text(json.dumps(found) + "\n", encoding="utf-8")


class InputGradients(Callback):
    """With all of a model's own weights frozen, a recomputed layer has gradients only if its input asks for one."""

    def on_fit_start(self, trainer, pl_module):
        for name, module in pl_module.named_modules():
            if name.endswith("embedding"):
                module.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


class FreezeHeap(Callback):
    """After the first step, take all objects that are there from Python's garbage collector.

    It would look at each of NeMo's 800,000 again and again, half a second a time, on every rank at another moment.
    """

    frozen = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.frozen:
            gc.collect()
            gc.freeze()
            self.frozen = True


class ShortPause(Callback):
    """Spare what Megatron and Lightning do for nothing while the GPU waits for the next step."""

    def setup(self, trainer, pl_module, stage):
        if not pl_module.config.num_moe_experts:
            # It asks each module for what routers hold, 1,200 of them in 32 layers with LoRA. By its full name, as the
            # package has a function of the module's name.
            finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")
            finalize.reset_model_temporary_tensors = lambda config, model: None
        _ResultMetric.to = moved


STOCK_TO = _ResultMetric.to


def moved(metric, device):
    """Lightning's `_ResultMetric.to`, called at each logged value, where there is something to be moved."""
    return metric if metric.value.device == device else STOCK_TO(metric, device)

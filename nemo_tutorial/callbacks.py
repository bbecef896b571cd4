"""What runs in the ranks beside NeMo's own callbacks."""

import json
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Callback


class Metrics(Callback):
    """Append one JSON line a step, and one a validation, to `path`, from rank 0.

    Fields: step (finished optimizer steps), loss and val_loss (nats a token), learning_rate, grad_norm,
    seconds (since the line before). Values are NeMo's own, as it logged them.
    """

    NAMES = {"reduced_train_loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm"}

    def __init__(self, path):
        self.path = path
        self.last = None

    def _write(self, trainer, values):
        if trainer.is_global_zero:
            now = time.monotonic()
            line = {"step": trainer.global_step, **values}
            if self.last is not None:
                line["seconds"] = round(now - self.last, 4)
            self.last = now
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def on_fit_start(self, trainer, pl_module):
        # The validation loss before the first step, to compare with. Here, because with PP NeMo has set it to 0.
        trainer.num_sanity_val_steps = trainer.limit_val_batches

    def on_train_start(self, trainer, pl_module):
        # NeMo says it of rank 0 alone; the split of the model shows on the others.
        count = sum(parameter.numel() for parameter in pl_module.parameters())
        print(f"rank {trainer.global_rank} holds {count:,} parameters", flush=True)
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = trainer.callback_metrics
        self._write(trainer, {new: float(metrics[name]) for name, new in self.NAMES.items() if name in metrics})

    def on_validation_end(self, trainer, pl_module):
        if "val_loss" in trainer.callback_metrics:
            self._write(trainer, {"val_loss": float(trainer.callback_metrics["val_loss"])})


class ExitInterval(Callback):
    """Stop at every multiple of `steps`; the run's schedule and data order stay those of all its steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % self.steps == 0:
            trainer.should_stop = True


class NetworkCheck(Callback):
    """Before weights are loaded: do all ranks' numbers reach all ranks, right, and how fast; at most a minute."""

    SECONDS = 60

    def setup(self, trainer, pl_module, stage):
        if stage != "fit":
            return
        device = trainer.strategy.root_device
        ranks, rank = trainer.world_size, trainer.global_rank
        values = torch.full((16 << 20 if device.type == "cuda" else 1 << 20,), rank + 1.0, device=device)
        try:
            group = torch.distributed.new_group(timeout=timedelta(seconds=self.SECONDS))
            self._add(values, group)
            wrong = values.ne(ranks * (ranks + 1) / 2).any()
            best = min(self._add(values.zero_(), group) for _ in range(3))
        except RuntimeError as error:  # torch's errors of communication are of this kind
            sys.exit(
                f"error: rank {rank} on {socket.gethostname()}: adding numbers of all ranks failed, or took more than "
                f"{self.SECONDS} s ({str(error).splitlines()[0]}). The nodes find one another, but data does not pass: "
                "name the network to use in NCCL_SOCKET_IFNAME (without GPUs GLOO_SOCKET_IFNAME); NCCL_DEBUG=INFO says "
                "which one it takes"
            )
        if wrong:
            sys.exit(f"error: rank {rank} on {socket.gethostname()}: the sum of all ranks' numbers is wrong")
        torch.distributed.destroy_process_group(group)
        if trainer.is_global_zero:
            # What each rank sends and receives in a ring.
            speed = values.nbytes * 2 * (ranks - 1) / ranks / best / 1e9
            print(
                f"network: {ranks} ranks on {trainer.num_nodes} node(s) add {values.nbytes >> 20} MiB in "
                f"{best * 1000:.1f} ms, {speed:.2f} GB/s a rank",
                flush=True,
            )

    def _add(self, values, group):
        """Sum `values` over the ranks, in place; seconds."""
        began = time.monotonic()
        work = torch.distributed.all_reduce(values, group=group, async_op=True)
        work.wait(timedelta(seconds=self.SECONDS))
        if values.is_cuda:
            torch.cuda.synchronize()
        return time.monotonic() - began

"""Whether data passes between the ranks, before weights are loaded; `network` is about finding one another."""

import socket
import sys
import time
from datetime import timedelta

import torch
from lightning.pytorch import Callback


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

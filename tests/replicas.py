"""A rank of a small model in Megatron's distributed optimizer: `torchrun --nproc-per-node N replicas.py WHO FOLDER`.

save: three steps, a checkpoint in the folder, three more. load: the three that come after the checkpoint. stock-load:
as Megatron loads it. Prints the losses of those three as JSON; all ranks see the same data. The buckets of three
replicas end in padding.
"""

import json
import os
import sys

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig

import nemo_tutorial.cpu  # noqa: F401  patches Megatron
from nemo_tutorial import optimizer_state

HIDDEN, LAYERS = 200, 6
FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def made(seed):
    """(the model, with its gradients' buffers; its optimizer)."""
    torch.manual_seed(seed)
    net = Net().bfloat16()
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, bf16=True)
    buckets = {"overlap_grad_reduce": True, "bucket_size": 2 * HIDDEN * HIDDEN, "grad_reduce_in_fp32": True}
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True, **buckets), net)
    adam = {"optimizer": "adam", "lr": 1e-2, "bf16": True, "use_distributed_optimizer": True}
    return ddp, get_megatron_optimizer(OptimizerConfig(**adam), [ddp])


def step(ddp, optimizer, number):
    """The loss of one step."""
    torch.manual_seed(number)
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    loss = ddp(torch.randn(8, HIDDEN).bfloat16()).float().pow(2).mean()
    loss.backward()
    ddp.finish_grad_sync()
    optimizer.step()
    return loss.item()


def sharded(ddp):
    names = ddp.module.named_parameters()
    return {n: ShardedTensor.from_rank_offsets(n, p, replica_id=(0, 0, dist.get_rank())) for n, p in names}


def main(who, folder):
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    if who != "stock-load":
        optimizer_state.SharedByReplicas().setup(None, None, "fit")
    ddp, optimizer = made(1 if who == "save" else 2)
    model = sharded(ddp)
    if who == "save":
        for number in range(3):
            step(ddp, optimizer, number)
        state = optimizer.sharded_state_dict(model, metadata=FORMAT)
        dist_checkpointing.save({"model": model, "optimizer": state}, folder)
    else:
        state = optimizer.sharded_state_dict(model, is_loading=True, metadata=FORMAT)
        found = dist_checkpointing.load({"model": model, "optimizer": state}, folder)
        for name, parameter in ddp.module.named_parameters():
            parameter.data.copy_(found["model"][name])
        optimizer.load_state_dict(found["optimizer"])
    losses = [step(ddp, optimizer, number) for number in range(3, 6)]
    padded = any(b.grad_data.numel() > b.numel_unpadded for b in optimizer.chained_optimizers[0].buffers[0].buckets)
    if dist.get_rank() == 0:
        print(json.dumps({"losses": losses, "padded": padded}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

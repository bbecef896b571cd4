"""The optimizer's state in a checkpoint, of several replicas: Megatron's way beside optimizer_state.py.

From the repository root, without a GPU, a process a replica:

    python benchmarks/replicas.py                          # a small model: is what is loaded what was saved?
    python benchmarks/replicas.py --hidden 2048 --layers 24 --replicas 2 4     # the memory and time of a save

A model of linear layers in Megatron's distributed optimizer, bf16 with float32 states, in buckets of two layers. Three
steps, a checkpoint, three more; and the same three by a new model that has loaded it. All replicas see the same data.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import executors, terminal

FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", nargs="+", type=int, default=[2, 3], help="[2 3]")
    parser.add_argument("--ways", nargs="+", choices=("stock", "ours"), default=["stock", "ours"])
    parser.add_argument("--hidden", type=int, default=200, help="[200: buckets of three replicas end in padding]")
    parser.add_argument("--layers", type=int, default=6, help="[6]")
    parser.add_argument("--save", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--load", metavar="FOLDER", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def launch(way, replicas, hidden, layers, *what, timeout=600):
    """What the first rank prints: its losses, if a bucket is padded; of a save the most of any rank in MB, and s."""
    of_ranks = argparse.Namespace(accelerator="cpu", num_gpus=replicas)
    env = os.environ | executors.environment(of_ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(replicas)]
    command += [__file__, "--ways", way, "--hidden", str(hidden), "--layers", str(layers), *map(str, what)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(lines[-1])


def rank(args):
    """One replica."""
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    import nemo_tutorial.cpu  # noqa: F401  patches Megatron
    from nemo_tutorial import optimizer_state

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layers = (torch.nn.Linear(args.hidden, args.hidden) for _ in range(args.layers))
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).tanh()
            return x

    def step(number):
        torch.manual_seed(number)
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = ddp(torch.randn(8, args.hidden).bfloat16()).float().pow(2).mean()
        loss.backward()
        ddp.finish_grad_sync()
        optimizer.step()
        return loss.item()

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    if args.ways == ["ours"]:
        optimizer_state.SharedByReplicas().setup(None, None, "fit")
    torch.manual_seed(1 if args.save else 2)
    config = TransformerConfig(num_layers=1, hidden_size=args.hidden, num_attention_heads=1, bf16=True)
    replicas = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        bucket_size=2 * args.hidden**2,
        grad_reduce_in_fp32=True,
    )
    ddp = DistributedDataParallel(config, replicas, Net().bfloat16())
    adam = OptimizerConfig(optimizer="adam", lr=1e-2, bf16=True, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(adam, [ddp])
    replica = (0, 0, dist.get_rank())
    names = list(ddp.module.named_parameters())
    model = {name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=replica) for name, tensor in names}
    buckets = optimizer.chained_optimizers[0].buffers[0].buckets
    found = {"padded": any(bucket.grad_data.numel() > bucket.numel_unpadded for bucket in buckets)}
    if args.save:
        for number in range(3):
            step(number)
        began, before = time.monotonic(), peak()
        state = optimizer.sharded_state_dict(model, metadata=FORMAT)
        dist_checkpointing.save({"model": model, "optimizer": state}, args.save)
        most = torch.tensor(float(peak() - before))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        found |= {"seconds": round(time.monotonic() - began, 1), "mb": round(most.item())}
        del state
    else:
        state = optimizer.sharded_state_dict(model, is_loading=True, metadata=FORMAT)
        loaded = dist_checkpointing.load({"model": model, "optimizer": state}, args.load)
        for name, tensor in names:
            tensor.data.copy_(loaded["model"][name])
        optimizer.load_state_dict(loaded["optimizer"])
    found["losses"] = [step(number) for number in range(3, 6)]
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def peak():
    """The most memory that this process had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv=None):
    args = parse_args(argv)
    if "RANK" in os.environ:
        return rank(args)
    rows, states = [], 12 * args.layers * (args.hidden**2 + args.hidden) / 2**20
    for replicas in args.replicas:
        for way in args.ways:
            with tempfile.TemporaryDirectory() as folder:
                saved = launch(way, replicas, args.hidden, args.layers, "--save", folder)
                loaded = launch(way, replicas, args.hidden, args.layers, "--load", folder)
            same = "equal" if saved["losses"] == loaded["losses"] else "different"
            padded = "yes" if saved["padded"] else "no"
            losses = " ".join(f"{loss:.4f}" for loss in (*saved["losses"], *loaded["losses"]))
            rows.append([replicas, way, padded, f"{same}: {losses}", saved["mb"], saved["seconds"]])
    print(f"{states:,.0f} MB of states")
    terminal.table(["replicas", "way", "padded", "losses of steps 4-6, as saved and loaded", "MB a rank", "s"], rows)


if __name__ == "__main__":
    main()

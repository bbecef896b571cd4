"""LoRA where tensor parallelism splits the sequence: a rank of a process group that torchrun has started.

    torchrun --nproc-per-node 2 tests/adapters_on_ranks.py cpu   # Megatron's layers, gloo
    torchrun --nproc-per-node 2 tests/adapters_on_ranks.py cuda  # Transformer Engine's with norms, NCCL, a GPU or two

Prints, in a line of JSON, how far the output and each gradient of a layer with an adapter lie from those of the whole,
by NeMo's own way, with its gradients of inputs mended, and split: of each rank {layer: {way: {what: error}}}.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SEQUENCE, BATCH, RANK, ALPHA, EPSILON = 8, 3, 4, 12, 1e-5
SIZES = {"linear_fc1": (64, 96), "linear_fc2": (96, 64)}  # inputs and outputs


def main(device):
    if device == "cpu":
        import nemo_tutorial.cpu  # noqa: F401  patches Megatron
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
            os.environ["NCCL_HOSTID"] = os.environ["RANK"]  # to NCCL a host each: those of one can't share a GPU
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from nemo.collections.llm.peft.lora import LoRALinear

    from nemo_tutorial import lora

    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    parallel_state.initialize_model_parallel(dist.get_world_size())
    random.model_parallel_cuda_manual_seed(1)
    stock, found = LoRALinear.forward, {}
    for name in SIZES:
        found[name] = {"stock": errors(name, device)}
        lora.GradientsOfInputs().setup(None, None, "fit")
        found[name]["mended"] = errors(name, device)
        lora.SplitBySequence().setup(None, None, "fit")
        found[name]["split"] = errors(name, device)
        LoRALinear.forward, LoRALinear.base_linear_forward = stock, lora.STOCK_BASE
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def errors(name, device):
    """Largest difference to the whole's, by the whole's largest value."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layer, normed = made(name, device)
    column = name == "linear_fc1"
    generator = torch.Generator().manual_seed(3)
    whole, grad = (torch.randn(SEQUENCE, BATCH, size, generator=generator).to(device) for size in SIZES[name])
    x = whole.chunk(world, axis("input", column))[rank].contiguous().requires_grad_()
    out, _ = layer(x)
    out.backward(grad.chunk(world, axis("output", column))[rank].contiguous())
    a, b = layer.adapter.linear_in.weight, layer.adapter.linear_out.weight
    ours = {"output": out.detach(), "input": x.grad, "A": a.grad, "B": b.grad}
    ours = {what: gathered(value, axis(what, column)) for what, value in ours.items()}
    # The whole.
    weight = gathered(layer.to_wrap.weight.detach(), 0 if column else 1)
    a = gathered(a.detach(), axis("A", column)).requires_grad_()
    b = gathered(b.detach(), axis("B", column)).requires_grad_()
    whole.requires_grad_()
    behind = whole * (whole.square().mean(-1, keepdim=True) + EPSILON).rsqrt() if normed else whole
    output = behind @ weight.t() + ALPHA / RANK * (behind @ a.t()) @ b.t()
    output.backward(grad)
    theirs = {"output": output.detach(), "input": whole.grad, "A": a.grad, "B": b.grad}
    return {what: ((ours[what] - value).abs().max() / value.abs().max()).item() for what, value in theirs.items()}


def axis(what, column):
    """Along which ranks have parts of it: a column-parallel layer gathers the sequence, a row-parallel splits it."""
    return {"output": 2 if column else 0, "input": 0 if column else 2, "A": 0 if column else 1, "B": 0}[what]


def gathered(part, axis):
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts, axis)


def made(name, device):
    """A layer of Megatron's with NeMo's adapter of random values; whether it has a norm inside."""
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import TransformerConfig
    from nemo.collections import llm

    world = dist.get_world_size()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        normalization="RMSNorm",
        layernorm_epsilon=EPSILON,
        tensor_model_parallel_size=world,
        sequence_parallel=True,
    )
    options = {"config": config, "init_method": torch.nn.init.xavier_normal_, "bias": False, "skip_bias_add": True}
    column = name == "linear_fc1"
    options |= {"gather_output": False} if column else {"input_is_parallel": True}
    if device == "cpu":
        cls = layers.ColumnParallelLinear if column else layers.RowParallelLinear
    else:
        from megatron.core.extensions import transformer_engine as te

        options["is_expert"] = False
        cls = te.TELayerNormColumnParallelLinear if column else te.TERowParallelLinear
    base = cls(*SIZES[name], **options)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    lora = llm.peft.LoRA(dim=RANK, alpha=ALPHA, dropout=0.0, target_modules=[name])
    layer = lora.transform(base, name=name, prefix="").to(device)
    torch.manual_seed(5 + dist.get_rank())
    for parameter in layer.adapter.parameters():
        torch.nn.init.normal_(parameter)
    return layer, column and device != "cpu"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "cuda"))
    main(parser.parse_args().device)

"""The tables of slurm/SCALING.md: what each of its commands needs of memory, computing and network.

    python benchmarks/scaling.py            # the tables, from the commands on the page
    python benchmarks/scaling.py --write    # put them into the page

Nothing is measured here. Memory is nemo_tutorial/memory.py's; computing and network are counted as the page says.
"""

import argparse
import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nemo_tutorial import memory, models, runs  # noqa: E402

PAGE = ROOT / "slurm/SCALING.md"
HEADER = "| command | GPUs | layout | tokens a step | memory | a micro batch | TP, CP, EP | DP a step | bubble |"
GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """In a node of 8: GiB that nvidia-smi shows, dense BF16 FLOP/s, bytes/s within the node and out of it."""

    memory: int
    peak: float
    nvlink: float
    network: float


GPUS = {
    "H100": Gpu(79, 989e12, 450 * GB, 50 * GB),
    "H200": Gpu(140, 989e12, 450 * GB, 50 * GB),
    "B200": Gpu(178, 2250e12, 900 * GB, 50 * GB),
}
LINE_RATE = 0.8  # of it, what collectives reach
# Model FLOP/s a GPU over its peak, as published for H100 in BF16 (30B-A3B: in FP8, over BF16's peak); see the page.
UTILIZATION = {"8b": 0.62, "70b": 0.54, "405b": 0.55, "30b-a3b": 0.2}
SHAPES = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64},
    "405b": {"hidden_size": 16384, "num_hidden_layers": 126, "intermediate_size": 53248, "num_attention_heads": 128},
    "30b-a3b": {"hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144, "num_attention_heads": 32},
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256}
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


def config(name):
    """The config.json of a model of the page: Llama 3.1's 8B, 70B and 405B, Qwen3-30B-A3B."""
    shape = (QWEN if name == "30b-a3b" else LLAMA) | SHAPES[name]
    return {**shape, "max_position_embeddings": 131072, "tie_word_embeddings": False}


def commands(text):
    """The commands of the page: [(GPU, model, words after `python`)]; a comment before each names GPU and model."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for gpu, model, command in re.findall(r"^# (\w+), (\S+)\n(python (?:.*\\\n)*.*)$", block, re.M):
            found.append((gpu, model, shlex.split(command.replace("\\\n", " "))[1:]))
    return found


def parse(words, name, folder):
    """The flags of a command as the script has them, and the model."""
    spec = importlib.util.spec_from_file_location("script", ROOT / words[0])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    args = script.parse_args([*words[1:], "--dry_run"])
    model = models.from_config(folder / name / "config.json")
    runs.hardware_problems(args, model)
    runs.model_problems(args, model)
    if words[0].startswith("finetuning"):
        script.packing_problems(args, model)
    return args, model


def flops_a_token(model, seq_length):
    """Of a training step: 6 a parameter that a token passes (not the embedding's) and 12 for each pair of tokens."""
    passed = model.active_parameters - model.vocab_size * model.hidden_size
    attention = model.num_hidden_layers * model.num_attention_heads * model.head_dim * seq_length
    return 6 * passed + 12 * attention


def expert_parameters(model, args):
    """Of a GPU."""
    return memory._layer_parameters(model, args)[1] * model.num_hidden_layers / args.pipeline_model_parallel_size


def arithmetic(gpu, name, args, model):
    """Seconds and shares of one command: see the columns on the page."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    ep, chunks = args.expert_model_parallel_size, args.virtual_pipeline_model_parallel_size or 1
    world, kind = args.num_nodes * args.num_gpus, GPUS[gpu]
    dp = world // (tp * pp * cp)
    sample = memory.sample_length(args)
    tokens = args.micro_batch_size * sample / cp  # of a micro batch, on a GPU and those that share it by TP
    layers, hidden = model.num_hidden_layers / pp, model.hidden_size
    micro_batches = args.global_batch_size * args.seq_length // (args.micro_batch_size * sample * dp)
    frozen = 2 / 3 if args.peft else 1  # no gradients of weights
    flops = flops_a_token(model, args.seq_length) * frozen * tokens / (tp * pp)
    computing = flops / (kind.peak * UTILIZATION[name])

    def seconds(size, inside, members=1):
        """Of a collective within a node; or across nodes, over the network cards of its members in a node."""
        return size / (LINE_RATE * (kind.nvlink if inside else min(kind.nvlink, members * kind.network)))

    inner = 0
    if tp > 1:
        gathers = 8 if args.peft else 10  # 4 forward, 4 backward, 2 of inputs once more for the weights' gradients
        inner += seconds(gathers * layers * tokens * hidden * 2 * (tp - 1) / tp, tp <= 8)
    if cp > 1:
        keys = 2 * model.num_key_value_heads * model.head_dim / tp
        inner += seconds(3 * layers * tokens * keys * 2 * (cp - 1), tp * cp <= 8)
    if ep > 1:
        rows = tokens / tp * model.num_experts_per_tok
        inner += seconds(4 * layers * rows * hidden * 2 * (ep - 1) / ep, ep <= 8)
    estimate = memory.estimate(model, args)
    # Gradients in float32, weights in bf16. Each collective's ring enters a node once for each member in it.
    experts, copies = expert_parameters(model, args), world // (pp * ep * memory._expert_tensor_size(args))
    outer = 0
    for count, group, members in (
        (estimate.trained - experts, dp * cp, max(1, 8 // tp)),
        (experts, copies, max(1, 8 // (ep * memory._expert_tensor_size(args)))),
    ):
        if group > 1:
            outer += seconds((4 + 2) * count, world <= 8, members)
    return {
        "world": world,
        "layout": f"TP {tp} x PP {pp} x CP {cp} x DP {dp}" + (f", experts over {ep}" if ep > 1 else ""),
        "tokens": args.global_batch_size * args.seq_length,
        "micro_batches": micro_batches,
        "memory": estimate.total / memory.GIB,
        "limit": kind.memory,
        "computing": computing,
        "inner": inner,
        "outer": outer,
        "bubble": (pp - 1) / (chunks * micro_batches),
    }


def row(number, gpu, name, result):
    """A line of the page's table."""
    hidden = result["inner"] / result["computing"]
    return (
        f"| {number} {name} | {result['world']:,} {gpu} | {result['layout']} | {result['tokens'] / 1e6:.2g} M, "
        f"{result['micro_batches']} | {result['memory']:.0f} of {result['limit']} GiB | "
        f"{result['computing'] * 1000:.0f} ms | {result['inner'] * 1000:.0f} ms, {hidden:.0%} | "
        f"{result['outer'] * 1000:.0f} ms | {result['bubble']:.0%} |"
    )


def table(text, folder):
    """The page's table, of its own commands."""
    rows = [HEADER, "|---" * HEADER.count(" | ") + "|---|"]
    for number, (gpu, name, words) in enumerate(commands(text), 1):
        rows.append(row(number, gpu, name, arithmetic(gpu, name, *parse(words, name, folder))))
    return "\n".join(rows)


def make_models(folder):
    """Write the config.json of every model of the page below `folder`."""
    import json

    for name in SHAPES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config(name)))


def main():
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table in the page")
    write = parser.parse_args().write
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        made = table(text, Path(folder))
    if write:
        old = re.search(re.escape(HEADER) + r"\n(?:\|.*\n)+", text)
        PAGE.write_text(text.replace(old[0], made + "\n"), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()

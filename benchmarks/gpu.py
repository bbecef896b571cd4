"""Training on one GPU: ours against NeMo's stock recipe and what else a user might take, in one run on the same data.

From the repository root, on a machine with a GPU (rows that are measured already are left out, so it can be repeated):

    python benchmarks/gpu.py --rows 1b-8192 8b-lora
    python benchmarks/gpu.py --rows ablation-1b=ours+mbs4,ours+mbs4+gc --seconds 500
    python benchmarks/gpu.py --layouts            # of all GPUs of this machine
    python benchmarks/gpu.py --layouts --gpus 8 --rows shared   # losses and memory of eight ranks, on one GPU
    python benchmarks/gpu.py --table

Each cell (a contestant in a row) runs in processes of its own, which imported NeMo while the cell before was measured.
Random weights, random tokens, the first steps dropped, the median of the others; of padded rows and packs, whose steps
differ, all of the others together. Tokens/s are of the whole loop with its logging, without validation and checkpoints.
TFLOP/s count 6 N + 6 L h s a token: N parameters in matrix products (a frozen one counts 4), causal attention once; MFU
is of 989 TFLOP/s.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import compat, preflight, terminal

ROOT = Path(__file__).resolve().parents[1]

# Row -> what all its contestants share, and the contestants. A contestant is "stock" or "ours", with "+change" (of
# gpu_nemo.CHANGES) or "-setting" (of nemo_tutorial.performance) after it, or a peer's name; then " seed N" of the
# weights, and " profile" to time the kernels as well.
PEERS = ("transformers", "peft")
PEERS_FULL = ("transformers+compile", "transformers+compile+liger")
ABLATION_1B = {"model": "1b", "kind": "pretrain", "seq": 8192, "gbs": 8, "steps": 8, "warmup": 3}
ABLATION_LORA = {"model": "8b", "kind": "lora", "seq": 4096, "gbs": 8, "steps": 8, "warmup": 3}
ROWS = {
    "1b-8192": (
        {"model": "1b", "kind": "pretrain", "seq": 8192, "gbs": 16},
        ("stock+mbs2", "ours+mbs4", *PEERS_FULL),
    ),
    "1b-4096": (
        {"model": "1b", "kind": "pretrain", "seq": 4096, "gbs": 32},
        ("stock+mbs4", "ours+mbs8", *PEERS_FULL),
    ),
    "1b-8192-fp8": (
        {"model": "1b", "kind": "pretrain", "seq": 8192, "gbs": 16},
        (
            "stock+mbs2+fp8_current",
            "ours+mbs4",
            "ours+mbs4+fp8_delayed",
            "ours+mbs4+fp8_delayed-casts",
            "ours+mbs4+fp8_current",
        ),
    ),
    # Micro batches of four take more than 80 GB.
    "3b-4096": (
        {"model": "3b", "kind": "pretrain", "seq": 4096, "gbs": 16},
        ("stock", "ours", "ours+mbs4", *PEERS_FULL),
    ),
    "3b-8192": ({"model": "3b", "kind": "pretrain", "seq": 8192, "gbs": 8}, ("stock", "ours+lean", *PEERS_FULL)),
    "8b-lora": (
        {"model": "8b", "kind": "lora", "seq": 4096, "gbs": 16},
        ("stock+mbs2", "ours+mbs2-adapter", "ours+mbs2", "peft+mbs2"),
    ),
    "8b-lora-fp8": (
        {"model": "8b", "kind": "lora", "seq": 4096, "gbs": 16},
        ("ours+mbs2+fp8_current_all",),
    ),
    "8b-sft": (
        {"model": "8b", "kind": "sft", "seq": 4096, "gbs": 8},
        ("ours+mbs2+lean", "ours+mbs4+lean+recompute_full", "ours+lean_fp8+recompute_full"),
    ),
    # One change at a time, the most promising first.
    "ablation-1b": (
        ABLATION_1B,
        (
            "stock+mbs2 profile",
            "ours+mbs2 profile",
            "ours+mbs2-gradients",
            "ours+mbs4",
            "ours+mbs2+fp8_current_all profile",
            "ours+mbs2+fp8_delayed",
            "ours+mbs4+fp8_delayed profile",
            "ours+mbs4+fp8_current_all",
            "ours+mbs4-logits profile",
            "ours+mbs4+gc",
            "ours+mbs2+graphs",
            "ours+mbs2+fuser",
        ),
    ),
    "ablation-1b-more": (
        ABLATION_1B,
        (
            "ours+mbs2",
            "ours+mbs2+quiet+log10 profile",
            "ours+mbs2+gc",
            "ours+mbs2+nonan",
            "ours+mbs2-positions",
            "ours+mbs2+adam_bf16",
            "ours+mbs2+grads_bf16",
            "ours+mbs2+segments",
            "ours+mbs2+connections",
            "ours+mbs2+graphs",
            "ours+mbs1",
            "ours+mbs2+fp8_current",
            "ours+mbs2+fp8_block",
            "ours+mbs2+fp8_current_nogather",
            "ours+mbs2+no_distopt",
            "stock+mbs2+ce_te",
            "stock+mbs2+nooverlap",
        ),
    ),
    "ablation-lora": (
        ABLATION_LORA,
        (
            "stock+mbs2 profile",
            "ours+mbs2-adapter profile",
            "ours+mbs2",
            "ours+mbs2-adapter+lora_fuser",
            "ours+mbs2+fp8_current_all profile",
            "ours+mbs2+fp8_delayed",
        ),
    ),
    "ablation-lora-more": (
        ABLATION_LORA,
        (
            "ours+mbs1",
            "ours+mbs2+gc",
            "ours+mbs2+fp8_current_nogather",
            "ours+mbs2+quiet+log10 profile",
        ),
    ),
    # Same initial weights and data: is the loss of ours as near to stock's as stock's own with other weights? At ten
    # times this rate the same run again differs by as much, so that it says nothing.
    "parity": (
        {"model": "1b", "kind": "pretrain", "seq": 2048, "gbs": 8, "steps": 98, "warmup": 2, "lr": 3e-5},
        (
            "stock",
            "stock seed 1",  # the same again: what rounding alone does
            "stock+mbs2",  # and in another order of sums
            "stock+mbs4",
            "stock seed 2",
            "stock seed 3",
            "ours",
            "ours-attention-activation",
            "ours-logits-positions-gradients",
            "ours-logits",
            "ours-positions",
            "ours-gradients",
            "ours+mbs2+lean",
            "ours+mbs2+grads_bf16",
            "ours+mbs2+fp8_current_all",
            "ours+mbs2+fp8_delayed",
            "ours+mbs2+lean_fp8",
        ),
    ),
    # The same at a rate at which rounding has less time to grow.
    "parity-slow": (
        {"model": "1b", "kind": "pretrain", "seq": 2048, "gbs": 8, "steps": 98, "warmup": 2, "lr": 1e-5},
        (
            "stock",
            "stock+mbs2",
            "stock+mbs4",
            "stock seed 2",
            "stock seed 3",
            "ours",
            "ours+mbs2",
            "ours+mbs2+lean",
            "ours+mbs2+fp8_delayed",
            "ours+mbs2+fp8_delayed-casts",
        ),
    ),
    # Of LoRA. NeMo rounds a layer's output before it adds an adapter's part, of which a small one is lost then.
    "parity-lora": (
        {"model": "1b", "kind": "lora", "seq": 2048, "gbs": 8, "steps": 98, "warmup": 2, "lr": 1e-4},
        ("stock", "stock seed 2", "stock seed 3", "ours", "ours-adapter_kernels", "ours seed 2", "ours seed 3"),
    ),
    # Instruction rows, packed and padded: tokens that are no padding. What packing alone is worth is seen without
    # `answers`, which spares padded rows the logits of their padding.
    "sft-packed": (
        {"model": "1b", "kind": "sft", "seq": 4096, "gbs": 8},
        (
            "ours+packed_8",
            "ours+padded",
            "ours+packed_8-answers",
            "ours+padded-answers",
            "ours+packed",
            "ours+packed_4",
            "stock+padded",
        ),
    ),
    "sft-packed-lora": (
        {"model": "8b", "kind": "lora", "seq": 4096, "gbs": 8},
        ("ours+packed", "ours+packed_4", "ours+padded", "stock+padded"),
    ),
    # What our own callbacks cost.
    "callbacks": (
        {"model": "1b", "kind": "pretrain", "seq": 8192, "gbs": 8, "steps": 30, "warmup": 4},
        ("ours+mbs2", "ours+mbs2+no_callbacks", "ours+mbs2 seed 2", "ours+mbs2+no_callbacks seed 2"),
    ),
    "tiny": (
        {"model": "tiny", "kind": "pretrain", "seq": 128, "gbs": 4, "steps": 4, "warmup": 2},
        ("stock+mbs2", "ours", "transformers"),
    ),
    "tiny-sft": (
        {"model": "tiny", "kind": "sft", "seq": 256, "gbs": 8, "steps": 2, "warmup": 1},
        ("ours+packed", "ours+packed_8", "ours+padded", "stock+padded"),
    ),
    "tiny-lora": (
        {"model": "tiny", "kind": "lora", "seq": 128, "gbs": 4, "steps": 4, "warmup": 2},
        ("stock", "ours", "peft"),
    ),
}
# Peak memory, for the estimate of --dry_run: three steps of two micro batches.
for model, kind in (("1b", "pretrain"), ("3b", "pretrain"), ("8b", "lora")):
    for seq in (2048, 4096, 8192):
        shared = {"model": model, "kind": kind, "seq": seq, "gbs": 4, "steps": 2, "warmup": 1}
        ROWS[f"memory-{model}-{seq}"] = (
            shared,
            ("ours+mbs1", "ours+mbs2", "ours+mbs1+recompute_full", "ours+mbs2+recompute_full"),
        )
MICRO_BATCHES = (4, 2, 1)  # of the peers, where their name has none: the largest that fits
# --layouts: model, kind, sequence, samples a step and GPU, changes of ours and of stock. Each GPU has the same work in
# every layout, so tokens/s a GPU against the row of one GPU is the weak scaling.
LAYOUT_MODELS = (
    ("1b", "pretrain", 8192, 4, "+mbs2"),
    ("3b", "pretrain", 8192, 4, "+mbs1"),
    ("8b", "lora", 4096, 8, "+mbs2"),
    ("8b", "pretrain", 8192, 4, "+mbs1"),
    ("8b", "sft", 4096, 8, "+mbs1"),
)
REHEARSED_LAYOUTS = (("tiny", "pretrain", 128, 4, "+mbs1"), ("tiny", "sft", 256, 4, "+packed_2"))  # without a GPU
# shared-*: model, kind, sequence, samples of a micro batch. Losses of the first, four of 1B's layers with few words, as
# NCCL sends over sockets there; peaks of memory of the others.
SHARED_LAYOUTS = (
    ("1b_4", "pretrain", 2048, 4),
    ("1b", "pretrain", 8192, 1),
    ("3b", "pretrain", 8192, 1),
    ("8b", "lora", 4096, 2),
)
# Fifty steps of the same samples in every layout: are the losses as near to one GPU's as those of other weights are?
LAYOUT_PARITY = {"kind": "pretrain", "gbs": 8, "steps": 48, "warmup": 2, "lr": 3e-4}
SEEDS = 4  # of one GPU; each layout draws its initial weights in its own order


def layouts(gpus):
    """{its name: TP, PP, CP, DP} of one GPU, and of every TP x PP x CP x DP of `gpus` of them, by powers of two."""
    powers = [2**n for n in range(gpus.bit_length())]
    found = [(t, p, c, gpus // (t * p * c)) for t, p, c in itertools.product(powers, repeat=3) if t * p * c <= gpus]
    named = {}
    for layout in ((1, 1, 1, 1), *found):
        parts = [f"{name}{size}" for name, size in zip(("tp", "pp", "cp", "dp"), layout) if size > 1]
        named["-".join(parts) or "one"] = layout
    return named


def layout_rows(models, gpus):
    """The rows of --layouts."""
    rows = {}
    for name, layout in layouts(gpus).items():
        tp, pp, cp, dp = layout
        seeds = [f"ours seed {number}" for number in range(1, 1 + (SEEDS if name == "one" else 1))]
        shared = {"model": models[0][0], "seq": min(2048, models[0][2]), "layout": layout, **LAYOUT_PARITY}
        rows[f"layout-parity-{name}"] = (shared, seeds)
        for model, kind, seq, samples, changes in models:
            shared = {"model": model, "kind": kind, "seq": seq, "gbs": samples * tp * pp * cp * dp, "layout": layout}
            ours = [f"ours{changes}"]
            if kind != "lora":  # a finetune recipe has no distributed optimizer whose collectives could be overlapped
                ours += [f"ours{changes}+nooverlap profile"] if dp * cp > 1 else []
                ours += [f"ours{changes}+tp_overlap profile"] if tp > 1 else []
            ours += [f"ours{changes}+vpp"] if pp > 1 else []
            rows[f"layout-{model}-{kind}-{name}"] = (shared, (f"stock{changes}", *ours))
    return rows


def shared_rows(models, gpus):
    """The rows shared-*: the first model's losses, as "layout-parity-*" has them, and the others' peaks of memory."""
    rows, ((parity, _, length, most), *others) = {}, models
    for name, layout in layouts(gpus).items():
        _, pp, _, dp = layout
        ours = f"ours+mbs{min(most, LAYOUT_PARITY['gbs'] // dp)}"
        seeds = [f"{ours} seed {number}" for number in range(1, 1 + (SEEDS if name == "one" else 1))]
        shared = {"share_gpu": True, "layout": layout}
        rows[f"shared-parity-{name}"] = (shared | LAYOUT_PARITY | {"model": parity, "seq": length}, seeds)
        if name == "one":  # its peaks are those of other rows
            continue
        for model, kind, seq, samples in others:
            sizes = {"model": model, "kind": kind, "seq": seq, "gbs": samples * dp * max(2, pp)}
            sizes |= {"steps": 1, "warmup": 1}
            rows[f"shared-memory-{model}-{kind}-{name}"] = (shared | sizes, (f"ours+mbs{samples}",))
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="ROW[=CONTESTANT,...]",
        help="memory means all memory-*; its own contestants, or those named: " + ", ".join(ROWS),
    )
    parser.add_argument("--seconds", type=float, default=540, help="start no cell that would end later than this [540]")
    parser.add_argument(
        "--layouts",
        action="store_true",
        help="the rows layout-*, of all layouts of --gpus; or some, by --rows; shared-*: losses and memory of ranks "
        "that are all on one GPU, each as a node",
    )
    parser.add_argument("--gpus", type=int, help="[all of this machine]")
    parser.add_argument("--steps", type=int, help="timed steps [15; the ablations 8]")
    parser.add_argument(
        "--profile", action="store_true", help="also time the kernels of two steps, and the GPU's idle share"
    )
    parser.add_argument("--results", default="benchmarks/gpu.json", help="read and added to [benchmarks/gpu.json]")
    parser.add_argument("--again", action="store_true", help="measure again what the results hold")
    parser.add_argument(
        "--accelerator",
        choices=("gpu", "cpu"),
        default="gpu",
        help="cpu: a rehearsal of the rows tiny, and of --layouts [gpu]",
    )
    parser.add_argument("--table", action="store_true", help="print what was measured, and stop")
    parser.add_argument("--plot", metavar="FILE", help="with --table: draw it as well")
    parser.add_argument("--serve", choices=("nemo", "peers", "ceilings"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def selected(word):
    """{row: its contestants} that a word of --rows means: one row, or all that begin with it."""
    name, _, contestants = word.partition("=")
    rows = [name] if name in ROWS else [row for row in ROWS if row.startswith(f"{name}-")]
    return {row: contestants.split(",") if contestants else ROWS[row][1] for row in rows}


def cells(args):
    """What to measure, in order."""
    rows = itertools.chain.from_iterable(selected(word).items() for word in args.rows or ["layout"])
    for row, contestant in dict.fromkeys((row, contestant) for row, names in rows for contestant in names):
        name, profile, _ = contestant.partition(" profile")
        base, _, seed = name.partition(" seed ")
        yield {
            "steps": 15,
            "warmup": 4,
            "lr": 1e-4,
            "layout": (1, 1, 1, 1),
            "data_seed": 1,
            **ROWS[row][0],
            **({"steps": args.steps} if args.steps else {}),
            "row": row,
            "name": name,
            "contestant": base,
            "seed": int(seed or 1),
            "stack": "peers" if re.split(r"\W", base)[0] in PEERS else "nemo",
            "profile": args.profile or bool(profile),
            "accelerator": args.accelerator,
        }


class Processes:
    """Processes that have imported a stack, which takes longer than most cells, and wait for one: a rank each.

    As one is taken, another begins to import. Forks of a single one can't use the GPU: some import has touched it.
    """

    def __init__(self, stack, args, folder, ranks):
        self.environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
            "NCCL_NVLS_ENABLE": "0",
            "HF_HUB_OFFLINE": "1",
        }
        if args.accelerator == "cpu" and stack == "nemo":
            path = [str(ROOT / "nemo_tutorial" / "no_gpu"), os.environ.get("PYTHONPATH")]
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, path))}
        self.command = [sys.executable, "-u", __file__, "--serve", stack, "--accelerator", args.accelerator]
        self.log = folder / f"{stack}.log"
        self.waiting = [self.started() for _ in range(ranks)]

    def started(self):
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
                text=True,
                start_new_session=True,  # to be ended with all that it starts
            )

    def ask(self, cell, until):
        """The cell's row; {"error": ...} if it failed or had not ended `until` (time.monotonic)."""
        world = math.prod(cell.get("layout", ()))
        ranks, self.waiting = self.waiting[:world], self.waiting[world:] + [self.started() for _ in range(world)]
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "benchmark"}  # Lightning asks for it
        answers, folder = {}, tempfile.mkdtemp()
        try:
            for number, rank in enumerate(ranks):
                own = shared | {"RANK": number, "LOCAL_RANK": number} if world > 1 else {}
                if world > 1 and cell.get("share_gpu"):
                    own |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": number}
                    own |= {"NCCL_HOSTID": number, "NCCL_SOCKET_IFNAME": "lo"}  # one host's ranks it refuses one GPU
                with contextlib.suppress(BrokenPipeError):
                    rank.stdin.write(json.dumps({"cell": cell, "environment": own, "folder": folder}) + "\n")
                    rank.stdin.flush()
            while len(answers) < world:
                # Those that have measured answer together; where one has failed, the others may wait for ever.
                patience = 10 if answers else max(0, until - time.monotonic())
                open_ = {rank.stdout: rank for rank in ranks if rank not in answers}
                ready, _, _ = select.select(open_, [], [], patience)
                if not ready:
                    break
                for pipe in ready:
                    answers[open_[pipe]] = json.loads(pipe.readline() or '{"error": "its process died; see the log"}')
        finally:
            for rank in ranks:
                end(rank)
            shutil.rmtree(folder, ignore_errors=True)
        if not answers:
            return {"error": "stopped: its time was up"}
        return together([answers.get(rank) for rank in ranks])

    def close(self):
        for process in self.waiting:
            end(process)


def end(process):
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def together(rows):
    """The ranks' rows as one: the first's, with the largest memory of all, and the loss of the last pipeline stage."""
    failed = [row for row in rows if row and "error" in row]
    if failed or None in rows:
        return failed[0] if failed else {"error": "not all ranks answered; see the log"}
    largest = {name: max(row[name] for row in rows) for name in ("allocated_gb", "reserved_gb") if name in rows[0]}
    return rows[0] | largest | ({"loss": rows[-1]["loss"]} if "loss" in rows[-1] else {})


def free_port():
    """A TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def serve(args):
    """The other side: import the stack, measure the one cell that standard input brings, answer in a line."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the stack prints goes to the log
    if args.serve == "ceilings":
        import gpu_measure as stack
    elif args.serve == "nemo":
        if args.accelerator == "cpu":
            import nemo_tutorial.cpu  # noqa: F401  patches NeMo
        import gpu_nemo as stack
    else:
        import gpu_peers as stack
    line = sys.stdin.readline()
    if not line:  # no cell was left
        return
    task = json.loads(line)
    cell = task["cell"]
    os.environ.update({name: str(value) for name, value in task["environment"].items()})
    try:
        os.chdir(task["folder"])  # the same for all ranks
        print(f"\n=== {cell.get('row')} {cell.get('name')} ===", file=sys.stderr, flush=True)
        row = stack.measure(cell, tokenizer(tempfile.mkdtemp(dir="."))) if "row" in cell else stack.ceilings()
    except BaseException as error:  # whatever it is, it is this cell's result
        traceback.print_exc()
        row = {"error": f"{type(error).__name__}: {error}".replace("\n", " ")[:400]}
    os.chdir("/")
    answer.write(json.dumps(row) + "\n")
    answer.flush()
    os._exit(0)  # no clean-up: it would wait for communicators and threads


def tokenizer(folder):
    """A folder with a tokenizer of few words: random tokens need none, NeMo does."""
    path = Path(folder, "tokenizer").absolute()
    path.mkdir()
    words = ["<s>", "</s>", "<unk>", *(f"w{number}" for number in range(1000))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"id": number, "content": word, "special": True, **flags} for number, word in enumerate(words[:3])]
    model = {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": "<unk>"}
    (path / "tokenizer.json").write_text(
        json.dumps(
            {"version": "1.0", "added_tokens": special, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
        )
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return str(path)


def load(path):
    """The results so far."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {"machines": {}, "rows": {}}


def save(path, results):
    """Whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(results, indent=1))
    os.replace(partial, path)


def machine():
    """The GPU's name and the versions of what is measured."""
    measured = "torch transformer_engine nemo_toolkit megatron-core transformers peft liger_kernel"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = (
        subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else "CPU"
    )
    return found.splitlines()[0], compat.versions(measured.split())


def run(args):
    """Measure the cells that the results lack."""
    began = time.monotonic()
    name, versions = machine()
    results = load(args.results)
    here = results["machines"].setdefault(name, {"versions": versions, "date": time.strftime("%Y-%m-%d")})
    todo = [
        cell
        for cell in cells(args)
        if args.again or "step_s" not in results["rows"].get(cell["row"], {}).get(f"{cell['name']} @ {name}", {})
    ]
    folder = Path(args.results).resolve().parent / "gpu_logs"
    folder.mkdir(parents=True, exist_ok=True)
    until = began + args.seconds
    ranks = {}
    for cell in todo:
        ranks[cell["stack"]] = max(ranks.get(cell["stack"], 1), math.prod(cell["layout"]))
    # An import takes longer than the steps of a small cell; ranks that share a GPU are slow, and many.
    ahead = 2 if args.accelerator == "gpu" and not any(cell.get("share_gpu") for cell in todo) else 1
    processes = {stack: Processes(stack, args, folder, ahead * count) for stack, count in ranks.items()}
    if args.accelerator == "gpu" and todo:
        ceilings = Processes("ceilings", args, folder, 1)
        here["ceilings"] = ceilings.ask({}, until)
        ceilings.close()
        print(f"{name}: {here['ceilings']}", flush=True)
    try:
        longest = {}  # of a row's cells
        for cell in todo:
            if until - time.monotonic() < max(15, longest.get(cell["row"], 0)):
                print(f"no time left for {cell['row']} {cell['name']} and after; the same command goes on", flush=True)
                break
            start = time.monotonic()
            sizes = [None]
            if cell["stack"] == "peers":
                asked = re.search(r"\+mbs(\d+)", cell["contestant"])
                sizes = [int(asked[1])] if asked else [size for size in MICRO_BATCHES if cell["gbs"] % size == 0]
            for size in sizes:
                row = processes[cell["stack"]].ask({**cell, "mbs": size}, until)
                if "out of memory" not in row.get("error", ""):
                    break
            took = time.monotonic() - start
            if cell is not todo[0]:  # that one waits for the import
                longest[cell["row"]] = max(took, longest.get(cell["row"], 0))
            row |= {"machine": name, "wall_s": round(took, 1), "date": time.strftime("%Y-%m-%d %H:%M")}
            kept = ("model", "kind", "seq", "gbs", "seed", "layout", "share_gpu")
            row |= {key: cell[key] for key in kept if key in cell}
            results["rows"].setdefault(cell["row"], {})[f"{cell['name']} @ {name}"] = row
            save(args.results, results)
            print(line(cell["row"], cell["name"], row), flush=True)
    finally:
        for waiting in processes.values():
            waiting.close()


def line(row, name, found):
    """One cell in a line."""
    if "error" in found:
        return f"{row:14} {name:40} {found['error'][:150]}  [{found['wall_s']} s]"
    idle = found.get("kernels") and f" idle {found['kernels']['idle']:.1%}"
    padding = f" padding {found['padding']:.1%}" if "padding" in found else ""
    world = math.prod(found.get("layout", ()))
    memory = f"{found.get('allocated_gb', 0)}/{found.get('reserved_gb', 0)} GB"
    loss = f"loss {found['loss'][0]:.3f} -> {found['loss'][-1]:.3f}"
    if found.get("share_gpu"):  # its speed is of nothing
        return f"{row:14} {name:40} {world} ranks on one GPU  {memory} a rank  {loss}  [{found['wall_s']} s]"
    return (
        f"{row:14} {name:40} {found['tok_s']:>7,} tok/s{' a GPU' if world > 1 else ''}  "
        f"{found['tflops']:6.1f} TFLOP/s  MFU {found['mfu']:.1%}  "
        f"{found['step_s']:.3f} s ({found['step_min']:.3f}-{found['step_max']:.3f})  mbs {found['micro_batch_size']}  "
        f"{memory}  {loss}{idle or ''}{padding}  [{found['wall_s']} s]"
    )


def table(args):
    """Print the results; the profiles, and how far losses lie apart, below."""
    results = load(args.results)
    for name, found in results["machines"].items():
        print(f"{name}, {found['date']}: {found['versions']} {found.get('ceilings', '')}")
    for row, contestants in results["rows"].items():
        print()
        for key, found in contestants.items():
            print(line(row, key.split(" @ ")[0], found))
        for key, found in contestants.items():
            if found.get("kernels"):
                profile = found["kernels"]
                between = profile.get("idle_between_steps_ms")
                waits = "" if between is None else f", {between} of them idle between steps"
                print(f"  {key.split(' @ ')[0]}: {profile['classes_ms']} of {profile['step_ms']} ms{waits}")
    # Before 2026-11-29 the tokens were independent of one another; on that day the rate was ten times today's.
    for row in ("iid-parity", "lr3e-4-parity", "parity", "parity-slow", "parity-lora"):
        parity(row, results["rows"].get(row, {}))
    layout_parity(results, "layout")
    layout_parity(results, "shared")
    if args.plot:
        plot(results, args.plot)


def parity(row, contestants):
    """Mean difference of the loss to stock's of the same weights over steps 51-100; and by how much stock's differ."""
    found = {key.split(" @ ")[0]: cell["loss"][50:100] for key, cell in contestants.items() if "loss" in cell}
    if "stock" not in found:
        return
    print(f"\n{row}: loss of steps 51-100 less stock's: mean, and mean of the absolute differences")
    for name, losses in found.items():
        seed = re.search(r" seed \d+$|$", name)[0]
        same = "stock" if name.startswith("stock") else f"stock{seed}"
        pairs = list(zip(losses, found.get(same, found["stock"])))
        mean = sum(a - b for a, b in pairs) / len(pairs)
        print(f"  {name:30} {mean:+.5f}  {sum(abs(a - b) for a, b in pairs) / len(pairs):.5f}")
    seeds = [statistics.mean(losses) for name, losses in found.items() if re.fullmatch(r"stock( seed [2-9])?", name)]
    if len(seeds) > 1:
        print(f"  half of the standard deviation of stock's with {len(seeds)} seeds: {statistics.stdev(seeds) / 2:.5f}")


def layout_parity(results, kind):
    """Mean loss of the second half of fifty steps in each layout, beside one GPU's with other initial weights."""
    found = {
        (row.removeprefix(f"{kind}-parity-"), key.split(" @ ")[0]): sum(cell["loss"][25:]) / len(cell["loss"][25:])
        for row, contestants in results["rows"].items()
        for key, cell in contestants.items()
        if row.startswith(f"{kind}-parity-") and len(cell.get("loss", ())) > 25
    }
    seeds = [mean for (layout, _), mean in found.items() if layout == "one"]
    if len(seeds) < 2:
        return
    middle, spread = statistics.mean(seeds), statistics.stdev(seeds)
    print(f"\n{kind}-parity: mean loss from step 26 on")
    print(f"  of one GPU with {len(seeds)} seeds {middle:.5f}, standard deviation {spread:.5f}")
    for (layout, name), mean in found.items():
        print(f"  {layout:16} {name:14} {mean:.5f}, {(mean - middle) / spread:+.1f} of them")


def plot(results, path):
    """Tokens/s of each row's contestants as bars, drawn into `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {
        row: {k.split(" @ ")[0]: v["tok_s"] for k, v in c.items() if "tok_s" in v} for row, c in results["rows"].items()
    }
    rows = {row: values for row, values in rows.items() if values and not row.startswith(("tiny", "shared"))}
    sizes = [len(values) for values in rows.values()]
    figure, axes = pyplot.subplots(
        len(rows),
        1,
        figsize=(8, 0.35 * sum(sizes) + 0.8 * len(rows)),
        gridspec_kw={"height_ratios": sizes},
        squeeze=False,
    )
    for axis, (row, values) in zip(axes[:, 0], rows.items()):
        names = list(values)[::-1]
        bars = axis.barh(
            names,
            [values[name] for name in names],
            color=["#76b900" if n.startswith("ours") else "#999" for n in names],
        )
        axis.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
        axis.set_title(row, loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv=None):
    args = parse_args(argv)
    if args.layouts:
        gpus, rehearsed = args.gpus or preflight.gpus_here(), args.accelerator == "cpu"
        ROWS.update(layout_rows(REHEARSED_LAYOUTS if rehearsed else LAYOUT_MODELS, gpus))
        ROWS.update(shared_rows([row[:4] for row in REHEARSED_LAYOUTS] if rehearsed else SHARED_LAYOUTS, gpus))
    if args.serve:
        serve(args)
    elif args.table:
        table(args)
    elif not (args.rows or args.layouts) or not all(map(selected, args.rows)):
        wrong = [name for name in args.rows if not selected(name)]
        terminal.fail([f"--rows {' '.join(wrong)}: choose from {', '.join(ROWS)}"])
    else:
        run(args)
        table(args)


if __name__ == "__main__":
    main()

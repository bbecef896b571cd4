"""Our conversion against stock NeMo's, in turn, on the same random model: seconds, memory, share of the disk's speed.

From the repository root (Linux; about five minutes and 8 GB of disk for 1B on two cores):

    python benchmarks/conversion.py
    python benchmarks/conversion.py --model 3B --contestants ours

Ours is the whole command after NeMo's import, with the hashes of a checkpoint and the sentence of a verified export.
Memory is anonymous and shared memory of the whole process tree at its peak, above that right after NeMo's import;
mapped file pages are not counted. Inputs are dropped from the page cache before each run. Stock NeMo runs in our
no-GPU mode where there is no GPU. With root and a memory cgroup, each is run again in half the model's memory.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import terminal

ROOT = Path(__file__).resolve().parents[1]
LLAMA32 = {"intermediate_size": 8192, "tie_word_embeddings": True}
SHAPES = {  # Llama 3.2's and 3.1's
    "1B": LLAMA32 | {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64},
    "3B": LLAMA32 | {"num_hidden_layers": 28, "hidden_size": 3072, "num_attention_heads": 24, "head_dim": 128},
    "8B": {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
RUNS = [
    ("ours", "import", "none"),
    ("stock", "import", "none"),
    ("ours", "export", "none"),
    ("stock", "export", "none"),
    ("ours", "import", "tensors"),
    ("ours", "export", "tensors"),
]


def make_model(folder, name):
    """A Hugging Face folder of random bf16 weights in a published shape, with a tiny tokenizer."""
    import torch
    from safetensors.torch import save_file

    command = [sys.executable, str(ROOT / "data/make_tiny_model.py"), "--output_path", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    config = json.loads((folder / "config.json").read_text())
    config |= SHAPES[name] | {"num_key_value_heads": 8, "vocab_size": 128256}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "model.safetensors").unlink()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))

    def random(*shape):
        values = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator, device=device)
        return (values.to(torch.bfloat16) / 2**20 + (len(shape) == 1)).cpu()  # norms around 1

    places = {}
    for layer in range(-1, config["num_hidden_layers"]):
        file, prefix = f"model-{layer + 1:05}.safetensors", f"model.layers.{layer}."
        if layer < 0:
            tensors = {"model.embed_tokens.weight": random(128256, hidden), "model.norm.weight": random(hidden)}
            if not config["tie_word_embeddings"]:
                tensors["lm_head.weight"] = random(128256, hidden)
        else:
            tensors = {
                "self_attn.q_proj.weight": random(queries, hidden),
                "self_attn.k_proj.weight": random(keys, hidden),
                "self_attn.v_proj.weight": random(keys, hidden),
                "self_attn.o_proj.weight": random(hidden, queries),
                "mlp.gate_proj.weight": random(inner, hidden),
                "mlp.up_proj.weight": random(inner, hidden),
                "mlp.down_proj.weight": random(hidden, inner),
                "input_layernorm.weight": random(hidden),
                "post_attention_layernorm.weight": random(hidden),
            }
            tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def child(who, stage, verify, source, output):
    """One conversion in this process: says "ready" once NeMo is imported, then the seconds it took."""
    from nemo.collections import llm

    from nemo_tutorial import conversion  # noqa: F401  (as the script does, in its main)

    source, output = Path(source), Path(output)
    print("ready", flush=True)
    began = time.perf_counter()
    if who == "ours":
        name = {"import": "convert_from_hf_to_nemo", "export": "convert_from_nemo_to_hf"}[stage]
        command = importlib.import_module(f"convert_ckpt.{name}").main
        with contextlib.redirect_stdout(sys.stderr):
            command(["--source", str(source), "--output_path", str(output), "--verify", verify])
    elif stage == "import":
        llm.LlamaModel.importer(f"hf://{source}")(output_path=output)
    else:
        llm.export_ckpt(source, "hf", output_path=output)
    for file in output.rglob("*"):  # all on the disk, for stock NeMo too
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
    print(time.perf_counter() - began, flush=True)


def memory(process):
    """Anonymous and shared memory of a process and its children, in bytes; pages that they share count once."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return total


def measure(who, stage, verify, source, output, limit=None):
    """Run one conversion: (seconds or None if it was killed, peak memory above the import of NeMo, that memory)."""
    shutil.rmtree(output, ignore_errors=True)
    for file in source.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--child", who, stage, verify, str(source), str(output)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    group = cgroup(limit, process.pid) if limit else None
    lines, peak = [], 0
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    while process.stdout.readline().strip() not in ("ready", ""):
        pass
    base = memory(process)
    reader.start()
    while process.poll() is None:
        began = time.perf_counter()
        try:
            peak = max(peak, memory(process))
        except psutil.NoSuchProcess:
            break
        # The kernel stops the process while it counts its pages: for a twentieth of the time, not for half.
        time.sleep(max(0.01, 19 * (time.perf_counter() - began)))
    process.wait()
    reader.join()
    if group:
        group.rmdir()
    seconds = float(lines[-1]) if process.returncode == 0 else None
    return seconds, peak - base, base


def cgroup(limit, pid):
    """Put a process into a new memory cgroup with a limit in bytes. Raises OSError where that can't be done."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"nemo_tutorial_{pid}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(int(limit)))
    (group / "cgroup.procs").write_text(str(pid))
    return group


def disk_speed(folder, size=2_500_000_000):
    """Bytes a second that `dd ... conv=fdatasync` writes."""
    file = folder / "dd"
    began = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={file}", "bs=10000000", f"count={size // 10_000_000}", "conv=fdatasync"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    file.unlink()
    return size / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="1B")
    parser.add_argument("--contestants", nargs="+", choices=("ours", "stock"), default=["ours", "stock"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write [a temporary folder]")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="conversion_"))
    folder.mkdir(exist_ok=True)
    hf, nemo = folder / "hf", folder / "nemo"
    if not hf.is_dir():
        make_model(hf, args.model)
    weights = sum(file.stat().st_size for file in hf.glob("*.safetensors"))
    speed = disk_speed(folder)
    results = {}
    for _ in range(args.rounds):
        for run in RUNS:
            who, stage, verify = run
            if who in args.contestants:
                source, output = (hf, folder / who) if stage == "import" else (nemo, folder / f"{who}_hf")
                results.setdefault(run, []).append(measure(*run, source, output))
                if run == ("ours", "import", "none"):  # the checkpoint that all exports read
                    shutil.rmtree(nemo, ignore_errors=True)
                    output.rename(nemo)
    rows = []
    for run, found in results.items():
        seconds, peak = statistics.median(s for s, *_ in found), max(p for _, p, _ in found)
        stock = results.get(("stock", run[1], "none"))
        share = f"{seconds / statistics.median(s for s, *_ in stock):.2f}" if stock else "-"
        passes = 2 + 2 * (run[2] == "tensors")  # read and written; read again on both sides
        rows.append(
            [*run, f"{seconds:.1f}", share, f"{peak / 1e9:.2f}", f"{peak / weights:.2f}"]
            + [f"{passes * weights / seconds / 1e9:.2f}", f"{passes * weights / seconds / speed:.2f}"]
        )
    terminal.describe("conversion", [("model", f"{args.model}, {terminal.gigabytes(weights)}, bf16")])
    terminal.describe("disk", [("dd", f"{speed / 1e9:.2f} GB/s written")])
    print()
    header = ["who", "what", "verify", "seconds", "of stock", "peak GB", "of weights", "GB/s", "of dd"]
    terminal.table(header, rows)
    for who, stage in ((who, stage) for stage in ("import", "export") for who in args.contestants):
        limit = results["ours", stage, "none"][0][2] + weights / 2
        source, output = (hf, folder / who) if stage == "import" else (nemo, folder / f"{who}_hf")
        try:
            seconds, *_ = measure(who, stage, "none", source, output, limit)
        except OSError as error:
            print(f"not run in a cgroup of {limit / 1e9:.2f} GB: {error}")
            break
        end = f"{seconds:.1f} s" if seconds else "killed"
        print(f"in a cgroup of {limit / 1e9:.2f} GB (NeMo's import and half the model): {who} {stage}: {end}")
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

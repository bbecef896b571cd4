"""The memory estimate of --dry_run against what gpu.py measured: PyTorch's peak of every cell in gpu.json, in GiB.

python benchmarks/memory.py
"""

import dataclasses
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import memory, models, performance, preflight, terminal

ROOT = Path(__file__).resolve().parents[1]
SHARED = {
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
NAMES = "num_hidden_layers hidden_size intermediate_size num_attention_heads head_dim tie_word_embeddings vocab_size"
SHAPES = {
    "1b_4": (4, 2048, 8192, 32, 64, True, 16384),
    "1b": (16, 2048, 8192, 32, 64, True, 128256),
    "3b": (28, 3072, 8192, 24, 128, True, 128256),
    "8b": (32, 4096, 14336, 32, 128, False, 128256),
}
DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.uint8": "fp8"}
WHOLE = "2026-11-30 12"  # until then Adam made float32 copies of all small states at once (now adam.in_parts)
RECIPES = {"tensorwise": "current_scaling", "blockwise": "subchannel_scaling", "mxfp8": "mxfp8"}


def shape(name):
    """The models.Model of a shape that gpu.py trains."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(SHARED | dict(zip(NAMES.split(), SHAPES[name]))))
        return models.from_config(path)


def flags(cell, name):
    """The training script's flags that a cell of gpu.json, a contestant's, stands for."""
    packs = re.search(r"packed_(\d)", name)
    seq = cell["seq"] * int(packs[1] if packs else 1)
    pretrain, settings = cell["kind"] == "pretrain", cell["settings"]
    path = ROOT / ("pretraining/pretrain.py" if pretrain else "finetuning/finetune.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tp, pp, cp, dp = cell.get("layout", (1, 1, 1, 1))
    words = f"-D x --dry_run --accelerator gpu -G {tp * pp * cp * dp} -T {tp} -P {pp} -C {cp}"
    words += f" -m {cell['micro_batch_size']} -s {seq} -g {cell['gbs']}"
    words += " --performance off" if name.startswith("stock") else ""
    words += " --virtual_pipeline_model_parallel_size 2" if "+vpp" in name else ""
    if "fp8" in settings:
        words += " --fp8"
        words += f" --fp8_recipe {RECIPES[settings['fp8_recipe']]}" if settings["fp8_recipe"] in RECIPES else ""
    words += f" --peft lora --lora_rank {settings['dim']}" if cell["kind"] == "lora" else ""
    if settings.get("recompute_granularity"):
        words += f" --recompute {settings['recompute_granularity']}"
        if settings["recompute_granularity"] == "selective":
            words += f" --recompute_modules {' '.join(settings['recompute_modules'])}"
    if settings.get("use_precision_aware_optimizer"):
        words += " --use_precision_aware_optimizer"
        for name in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            words += f" --{name} {DTYPES[settings[name]]}"
    args = script.parse_args(words.split())
    preflight.fill_hardware(args)
    args.sequence_parallel = tp > 1
    return args


def cells():
    """(row, contestant, measured cell, Estimate) of every cell that has a measured peak and flags of the tutorial."""
    for row, found in json.loads((ROOT / "benchmarks/gpu.json").read_text())["rows"].items():
        for name, cell in found.items():
            name = name.split(" @")[0]
            if "settings" not in cell or cell.get("padding", 0) > 0.1 or "+fa3_" in name:
                continue  # a peer; rows padded to their micro batch's longest, shorter than --seq_length says; a trial
            if cell.get("allocated_gb") and cell.get("model") in SHAPES and cell["kind"] in ("pretrain", "sft", "lora"):
                model, args = shape(cell["model"]), flags(cell, name)
                dropped = set(re.findall(r"-(\w+)", name))  # settings that it was measured without
                kept = [setting for setting in performance.SETTINGS if setting.name.replace(" ", "_") not in dropped]
                with mock.patch.object(performance, "SETTINGS", kept):
                    estimate = memory.estimate(model, args)
                if cell["date"] < WHOLE:
                    stepped = estimate.optimizer / memory.state_bytes(args)[1]
                    estimate = dataclasses.replace(estimate, step=memory.step_bytes(args) * stepped)
                yield row, name, cell, estimate


if __name__ == "__main__":
    rows = []
    for row, name, cell, estimate in cells():
        parts = (
            estimate.weights,
            estimate.gradients,
            estimate.optimizer,
            max(estimate.activations, estimate.step),
        )
        found = estimate.allocated / memory.GIB
        off = f"{found / cell['allocated_gb'] - 1:+.1%}"
        split = " + ".join(f"{part / memory.GIB:.1f}" for part in parts)
        rows.append([row, name, cell["allocated_gb"], f"{found:.1f}", off, split])
    parts = "weights + gradients + optimizer + activations, or the optimizer's step"
    terminal.table(["row", "contestant", "measured", "estimate", "off by", parts], rows)

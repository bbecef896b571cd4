"""An 8B shape there and back on a GPU with Transformer Engine, and the same checkpoint in the no-GPU mode.

From the repository root (a GPU with 40 GB, 50 GB of disk, 32 GB of memory):

    python benchmarks/conversion_gpu.py

It imports and exports a random Llama of that shape by the scripts, with --verify logits: every tensor compared, and
NeMo's logits (Transformer Engine, bf16) with transformers'. Then it loads the checkpoint with CUDA_VISIBLE_DEVICES
empty, into Megatron's own layers, and compares every parameter with what is on the disk; imports the model that way
too, and compares the two checkpoints.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conversion import SHAPES, make_model

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]


def script(name, *flags):
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "convert_ckpt" / name), *map(str, flags)]
    subprocess.run(command, check=True)
    print(f"{name}: {time.monotonic() - began:.0f} s with the import of NeMo\n", flush=True)


def without_gpu(hf, nemo, again):
    """In a process that sees no GPU: load `nemo` as NeMo does, and import `hf` as `again`; compare all three."""
    from nemo_tutorial import conversion, models, weights

    began = time.monotonic()
    stored = weights.Megatron(nemo)
    model, _ = conversion.exporter(nemo).nemo_load(nemo)
    loaded = conversion.nemo_parameters(model)
    assert loaded.keys() == stored.meta.keys(), loaded.keys() ^ stored.meta.keys()
    other = [name for name in loaded if not loaded[name].detach().equal(stored[name])]
    kinds = {type(layer).__module__ for layer in model.modules() if "Linear" in type(layer).__name__}
    print(f"no-GPU mode: {len(loaded)} parameters loaded, {len(other)} differ ({time.monotonic() - began:.0f} s)")
    print(f"  its linear layers are of {', '.join(sorted(kinds))}", flush=True)
    del model, loaded
    began = time.monotonic()
    conversion.import_model(hf, models.from_hf(hf), again)
    imported = weights.Megatron(again)
    assert imported.meta.keys() == stored.meta.keys(), imported.meta.keys() ^ stored.meta.keys()
    differ = [name for name in stored.meta if not imported[name].equal(stored[name])]
    print(
        f"no-GPU mode: imported, {len(differ)} of {len(stored.meta)} tensors differ from the GPU's import "
        f"({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    sys.exit(bool(other or differ))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="8B")
    parser.add_argument("--folder", type=Path, help="where to write; kept, with the model in it [a temporary folder]")
    parser.add_argument("--without_gpu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="conversion_gpu_"))
    folder.mkdir(exist_ok=True)
    hf, nemo, back, again = (folder / name for name in ("hf", "nemo", "back", "again"))
    if args.without_gpu:
        return without_gpu(hf, nemo, again)
    if not hf.is_dir():
        began = time.monotonic()
        make_model(hf, args.model)
        print(f"made a random model: {time.monotonic() - began:.0f} s", flush=True)
    script("convert_from_hf_to_nemo.py", "--source", hf, "--output_path", nemo, "--overwrite", "--verify", "logits")
    script("convert_from_nemo_to_hf.py", "--source", nemo, "--output_path", back, "--overwrite", "--verify", "logits")
    shutil.rmtree(back)  # the disk is needed for the next
    shutil.rmtree(again, ignore_errors=True)
    command = [sys.executable, __file__, "--without_gpu", "--folder", str(folder)]
    code = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}).returncode
    if not args.folder:
        shutil.rmtree(folder)
    sys.exit(code)


if __name__ == "__main__":
    main()

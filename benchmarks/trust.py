"""How long a checkpoint's metadata takes to be read before it is trusted, against reading its opcodes with pickletools.

    python benchmarks/trust.py --layers 80 --ranks 32

Makes the weights/.metadata of a model of that many layers, saved in that many parts with its optimizer.
"""

import argparse
import pickle
import pickletools
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nemo_tutorial import trust  # noqa: E402


def make(file, layers, ranks):
    """Six tensors and two moments of each, a layer at a time; each rank has a part of each."""
    import torch
    from torch.distributed.checkpoint import filesystem, metadata

    entries, stored = {}, {}
    for kind in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.fp32_param."):
        for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "input_layernorm", "pre_mlp_layernorm"):
            key, chunks = f"{kind}module.decoder.layers.{name}.weight", []
            for layer in range(layers):
                for rank in range(ranks):
                    offsets, sizes = torch.Size([layer, rank * 1024, 0]), torch.Size([1, 1024, 8192])
                    index = metadata.MetadataIndex(key, offsets, len(chunks))
                    stored[index] = filesystem._StorageInfo(f"__{rank}_0.distcp", layer * 16_777_216, 16_777_216)
                    chunks.append(metadata.ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            size = torch.Size([layers, ranks * 1024, 8192])
            entries[key] = metadata.TensorStorageMetadata(metadata.TensorProperties(dtype=torch.float32), size, chunks)
    file.write_bytes(pickle.dumps(metadata.Metadata(entries, storage_data=stored)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--ranks", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "weights", ".metadata")
        file.parent.mkdir()
        make(file, args.layers, args.ranks)
        content = file.read_bytes()
        for what, read in (
            ("trust.problems", lambda: trust.problems(folder)),
            ("pickletools.genops", lambda: sum(1 for _ in pickletools.genops(content))),
            ("pickle.loads", lambda: pickle.loads(content)),
        ):
            seconds = []
            for _ in range(3):
                began = time.process_time()
                read()
                seconds.append(time.process_time() - began)
            print(f"{what}: {len(content) / 1e6:.1f} MB in {min(seconds):.2f} to {max(seconds):.2f} s of CPU")


if __name__ == "__main__":
    main()

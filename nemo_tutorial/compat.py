"""The only place that asks which version or feature is there."""

import contextlib
import inspect
import os
import sys
import time
from pathlib import Path

BUILDING = 180  # seconds after which a build that goes on is none any more; here one took half a minute
LOOKING = 15  # and after which a look at what is built already is none: it takes a second


def supported(function, **kwargs):
    """The part of `kwargs` that `function` takes in this version of NeMo or NeMo-Run."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in kwargs.items() if name in parameters}


def replace(owner, name, ours):
    """Put `ours` there if what is there has the same parameters, as in another version it may not; whether it was."""
    theirs = getattr(owner, name, None)
    same = theirs and inspect.signature(theirs).parameters.keys() == inspect.signature(ours).parameters.keys()
    if same:
        setattr(owner, name, ours)
    return bool(same)


def wait_for_build():
    """To be called before NeMo is imported: where CUDA's compiler is, Megatron 0.15 then builds an allocator, once.

    Each import takes torch's lock, if only to see that it is built. A process that is killed meanwhile leaves it, and
    whoever imports NeMo after it waits for ever, without a word. So wait here for a lock that is young, and remove one
    that is old.
    """
    choose_architecture()
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    pattern = "managed_alloc_runtime/lock"
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"
        pattern = f"*/{pattern}"
    for lock in Path(root).glob(pattern):
        said = False
        with contextlib.suppress(FileNotFoundError):
            while time.time() - lock.stat().st_mtime < (LOOKING if _is_built(lock.parent) else BUILDING):
                if not said:
                    print(f"waiting for another process, which compiles for NeMo: {lock}", file=sys.stderr, flush=True)
                    said = True
                time.sleep(0.5)
            lock.unlink()
            print(f"removed {lock}: the process that compiled for NeMo was killed", file=sys.stderr, flush=True)


def _is_built(folder):
    """Whether the newest of a build's files is the library, ninja's own (.ninja_log) left out."""
    files = [path for path in folder.iterdir() if path.name != "lock" and not path.name.startswith(".")]
    return bool(files) and max(files, key=lambda path: path.stat().st_mtime).suffix == ".so"


def choose_architecture():
    """Say what that allocator is built for, where torch would ask GPUs of which there is none: IndexError."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")


def fp8_plugin(recipe):
    """NeMo's precision plugin for an FP8 recipe. Raises ValueError if this container's NeMo lacks it."""
    from nemo.collections.llm.recipes.precision import mixed_precision

    names = {
        "delayed_scaling": "bf16_with_fp8_mixed",
        "current_scaling": "bf16_with_fp8_current_scaling_mixed",
        "subchannel_scaling": "bf16_with_fp8_subchannel_scaling_mixed",
        "mxfp8": "bf16_with_mxfp8_mixed",
    }
    factory = getattr(mixed_precision, names[recipe], None)
    if factory is None:
        raise ValueError(f"--fp8_recipe {recipe}: this NeMo has no {names[recipe]}; use a newer container")
    return factory()


def scheduler(name, flag):
    """NeMo's learning-rate scheduler of that name. Raises ValueError if this container's NeMo lacks it."""
    from nemo.lightning.pytorch.optim import lr_scheduler

    found = getattr(lr_scheduler, name, None)
    if found is None:
        raise ValueError(f"{flag}: this NeMo has no {name}; use --lr_decay cosine, or a newer container")
    return found


def counts_tokens():
    """Whether NeMo's loss says of how many tokens it is, so that Megatron can average over them (NeMo 2.4, not 2.2)."""
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    return "num_valid_tokens" in MaskedTokenLossReduction.forward.__code__.co_varnames


def versions():
    """Versions of what a run depends on; a missing package is left out."""
    from importlib import metadata

    found = {}
    for name in ("nemo_toolkit", "nemo_run", "megatron-core", "torch", "transformer_engine", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found

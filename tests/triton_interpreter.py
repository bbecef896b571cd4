"""Triton where there is none: a kernel's own body, run by PyTorch for all programs at once.

What one program may not do fails here too: reading or writing outside of a tensor, two writes to one place.
"""

import contextlib
import importlib
import sys
from types import ModuleType, SimpleNamespace

import torch

launched = []  # names of kernels


class Pointer:
    """A place in a tensor, or many."""

    def __init__(self, flat, at=0):
        self.flat, self.at = flat, at

    def __add__(self, offset):
        return Pointer(self.flat, self.at + offset)

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.flat.dtype)

    def chosen(self, mask):
        mask = torch.as_tensor(True if mask is None else mask)
        at, mask = torch.broadcast_tensors(self.at, mask)
        assert at[mask].min() >= 0 and at[mask].max() < len(self.flat), "outside of its tensor"
        return at, mask


class Kernel:
    def __init__(self, body):
        self.body = body

    def __getitem__(self, grid):
        def launch(*args, num_warps):
            launched.append(self.body.__name__)
            language.grid = grid
            self.body(*(Pointer(arg.view(-1)) if torch.is_tensor(arg) else arg for arg in args))

        return launch


def load(pointer, mask=None, other=0.0):
    at, mask = pointer.chosen(mask)
    return torch.where(mask, pointer.flat[at.where(mask, 0)], torch.tensor(other, dtype=pointer.flat.dtype))


def store(pointer, value, mask=None):
    at, mask = pointer.chosen(mask)
    assert value.dtype == pointer.flat.dtype and len(at[mask].unique()) == mask.sum(), "two writes to one place"
    pointer.flat[at[mask]] = value.broadcast_to(at.shape)[mask]


language = ModuleType("triton.language")
language.constexpr, language.float32, language.int64 = object, torch.float32, torch.int64
language.load, language.store, language.where, language.arange = load, store, torch.where, torch.arange
language.program_id = lambda axis: torch.arange(language.grid[axis])[:, None]


@contextlib.contextmanager
def rope():
    """nemo_tutorial.rope, imported with this as its Triton."""
    for name in ("torch._dynamo.utils", "megatron.core.transformer.attention"):  # these look for the real one
        importlib.import_module(name)
    triton = ModuleType("triton")
    triton.jit, triton.language = Kernel, language
    triton.next_power_of_2 = lambda number: 1 << (number - 1).bit_length()
    before = {name: sys.modules.pop(name, None) for name in ("triton", "triton.language", "nemo_tutorial.rope")}
    sys.modules |= {"triton": triton, "triton.language": language}
    try:
        module = importlib.import_module("nemo_tutorial.rope")
        sys.modules |= {name: found for name, found in before.items() if found and name != "nemo_tutorial.rope"}
        for name in ("triton", "triton.language"):
            if not before[name]:
                del sys.modules[name]
        yield module
    finally:
        sys.modules.pop("nemo_tutorial.rope", None)

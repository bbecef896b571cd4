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


def flat(tensor):
    """From its first number to its last, and what lies between its rows."""
    return tensor.as_strided((1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())),), (1,))


class Kernel:
    def __init__(self, body):
        self.body = body

    def __call__(self, *args):
        return self.body(*args)  # by another kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            launched.append(self.body.__name__)
            language.grid = grid
            self.body(*(Pointer(flat(arg)) if torch.is_tensor(arg) else arg for arg in args))

        return launch


def load(pointer, mask=None, other=0.0):
    at, mask = pointer.chosen(mask)
    return torch.where(mask, pointer.flat[at.where(mask, 0)], torch.tensor(other, dtype=pointer.flat.dtype))


def store(pointer, value, mask=None):
    at, mask = pointer.chosen(mask)
    assert value.dtype == pointer.flat.dtype and len(at[mask].unique()) == mask.sum(), "two writes to one place"
    pointer.flat[at[mask]] = value.broadcast_to(at.shape)[mask]


def program_id(axis):
    """Of all programs: behind them as many dimensions as a program's own tensors have, one in a grid of one."""
    grid = language.grid
    return torch.arange(grid[axis]).view(*(-1 if i == axis else 1 for i in range(len(grid))), *[1] * len(grid))


def dot(a, b, total=0.0):
    return a.float() @ b.float() + total


language = ModuleType("triton.language")
language.constexpr, language.float32, language.int64 = object, torch.float32, torch.int64
language.load, language.store, language.where, language.arange = load, store, torch.where, torch.arange
language.program_id, language.dot, language.trans = program_id, dot, lambda x: x.mT
language.zeros = lambda shape, dtype: torch.zeros(shape, dtype=dtype)
libdevice = SimpleNamespace(fast_expf=torch.exp, fast_dividef=lambda a, b: a / b)


@contextlib.contextmanager
def imported(name):
    """The module nemo_tutorial.`name`, imported with this as its Triton."""
    name = f"nemo_tutorial.{name}"
    for user in ("torch._dynamo.utils", "megatron.core.transformer.attention", "nemo.collections.llm"):
        importlib.import_module(user)  # these look for the real one
    triton, extra = ModuleType("triton"), ModuleType("triton.language.extra")
    triton.jit, triton.language, extra.libdevice = Kernel, language, libdevice
    triton.next_power_of_2 = lambda number: 1 << (number - 1).bit_length()
    triton.cdiv = lambda a, b: -(-a // b)
    ours = {"triton": triton, "triton.language": language, "triton.language.extra": extra}
    before = {known: sys.modules.pop(known, None) for known in (*ours, name)}
    sys.modules |= ours
    try:
        module = importlib.import_module(name)
        for known in ours:
            del sys.modules[known]
        sys.modules |= {known: found for known, found in before.items() if found and known != name}
        yield module
    finally:
        sys.modules.pop(name, None)

"""bf16 products computed in float32, as the no-GPU mode does where a CPU has none."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.nemo

INSIDE = """
import torch
from nemo_tutorial import products


def tensors(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def result_and_gradients(function, values, dtype):
    *factors, gradient = (value.to(dtype) for value in values)
    for factor in factors:
        factor.requires_grad_()
    result = function(*factors)
    assert result.dtype is dtype
    return [result.detach(), *torch.autograd.grad(result, factors, gradient)]


# Large enough that a sum in another order is rounded to another bf16 somewhere.
two = tensors((1536, 800), (256, 800), (1536, 256))
three = tensors((4, 1536, 800), (4, 256, 800), (4, 1536, 256))
cases = {
    "mm": (lambda a, b: a.mm(b.t()), two),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b.t(), beta=0.5, alpha=2), [two[2][0], *two]),
    "linear": (torch.nn.functional.linear, [three[0], two[1], two[2][0], three[0].matmul(two[1].t())]),
    "matmul": (lambda a, b: torch.matmul(a, b.transpose(-1, -2)), three),
    "bmm": (lambda a, b: torch.bmm(a, b.transpose(1, 2)), three),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b.transpose(1, 2), beta=0.5, alpha=2), [three[2][:1], *three]),
    "einsum": (lambda a, b: torch.einsum("hik,hjk->ihj", a, b), [*three[:2], three[2].transpose(0, 1)]),
}
expected = {name: result_and_gradients(*case, torch.float32) for name, case in cases.items()}
whole = torch.arange(6).view(2, 3), torch.arange(3, 15).view(3, 4)
products.compute_in_float32()
for name, case in cases.items():
    for place, (want, same, rounded) in enumerate(
        zip(expected[name], *(result_and_gradients(*case, dtype) for dtype in (torch.float32, torch.bfloat16)))
    ):
        assert torch.equal(want, same) and want.stride() == same.stride(), (name, place, "float32")
        assert torch.equal(want.bfloat16(), rounded) and want.stride() == rounded.stride(), (name, place, "bf16")
assert whole[0].mm(whole[1]).tolist() == [[29, 32, 35, 38], [92, 104, 116, 128]]
dirty = torch.full((1, 1536, 256), torch.nan).bfloat16()
assert not torch.baddbmm(dirty, three[0], three[1].transpose(1, 2), beta=0.0).isnan().any()  # Megatron's buffer
try:
    two[0].mm(two[1].t().float())
except RuntimeError as error:
    assert "dtype" in str(error)
else:
    raise AssertionError("factors of two dtypes were multiplied")
"""


def test_results_and_gradients_are_those_of_float32_rounded():
    """Bit for bit, also what only a backward pass computes; float32's own stay as they were, as do whole numbers'."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", INSIDE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_no_gpu_mode_has_them_where_the_cpu_has_none():
    import torch

    from nemo_tutorial import cpu, products  # noqa: F401  (cpu: as in a rank)

    factor = torch.ones(4, 4, dtype=torch.bfloat16)
    with torch.autograd.profiler.profile() as profile:
        factor.mm(factor)
    converted = "aten::_to_copy" in {event.name for event in profile.function_events}
    assert converted == (products.are_slow() and not torch.cuda.is_available())

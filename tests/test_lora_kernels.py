"""What SwiGLU and the sum with the residual add of LoRA's: the kernels' own bodies, run by PyTorch.

In whole models: test_performance.py and test_adapters.py.
"""

from types import SimpleNamespace

import pytest
import triton_interpreter

pytestmark = pytest.mark.nemo
SHAPES = [(70, 24, 192, 80, 16, 16), (64, 16, 100, 24, 4, 32)]  # tokens, x, half of y, output, the adapters' ranks
ADAPTERS = 2, 3, 5, 6  # of the tensors below


def tensors(shape, dtype, device="cpu"):
    """y, x, A1, B1, W, A2, B2 and the residual; all but W want a gradient."""
    import torch

    tokens, m, k, n, rank1, rank2 = shape
    generator = torch.Generator().manual_seed(1)
    found = [
        torch.randn(size, generator=generator).div(size[-1] ** 0.5 if weight else 1)
        for weight, size in [
            (False, (tokens // 2, 2, 2 * k)),
            (False, (tokens // 2, 2, m)),
            *((True, size) for size in ((rank1, m), (2 * k, rank1), (n, k), (rank2, k), (n, rank2))),
            (False, (tokens // 2, 2, n)),
        ]
    ]
    return [tensor.to(device, dtype).requires_grad_(i != 4) for i, tensor in enumerate(found)]


def reference(y, x, a1, b1, w, a2, b2, residual):
    """An MLP whose first product is y, its adapters' scales 2 and 1.5, and the sum with the residual."""
    import torch

    gate, up = (y + 2 * (x @ a1.T) @ b1.T).chunk(2, -1)
    h = torch.nn.functional.silu(gate) * up
    return h @ w.T + 1.5 * (h @ a2.T) @ b2.T + residual


def by_kernels(lora_kernels, y, x, a1, b1, w, a2, b2, residual):
    import torch

    from nemo_tutorial import lora

    h, low = lora_kernels.SwiGLU.apply(y, lora.Down.apply(x, a1), b1, 2.0, a2)
    return lora_kernels.ResidualSum.apply(torch.nn.functional.linear(h, w), low, b2, 1.5, residual)


def compare(lora_kernels, inputs, error):
    """The output and all gradients are the reference's in float64, but for `error` of their norms."""
    import torch

    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    found, expected = by_kernels(lora_kernels, *inputs), reference(*exact)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(found)
    found.backward(grad)
    expected.backward(grad.double())
    pairs = [(found, expected)] + [(a.grad, b.grad) for a, b in zip(inputs, exact) if b.requires_grad]
    assert len(pairs) == 8
    for ours, theirs in pairs:
        assert ours.dtype == inputs[0].dtype and ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() < error * theirs.norm()


@pytest.fixture
def lora_kernels():
    with triton_interpreter.imported("lora_kernels") as module:
        yield module


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, error", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_values_and_gradients(lora_kernels, dtype, error, shape):
    import torch

    compare(lora_kernels, tensors(shape, getattr(torch, dtype)), error)


def test_gradients_are_added_to_megatrons_sums(lora_kernels):
    """Micro batch after micro batch, in float32; what autograd gets instead is marked as of no meaning."""
    import torch

    inputs = tensors(SHAPES[0], torch.float32)
    for i in ADAPTERS:
        inputs[i].main_grad, inputs[i].grad_added_to_main_grad = torch.ones_like(inputs[i]), False
    for _ in range(2):
        by_kernels(lora_kernels, *inputs).square().sum().backward()
    exact = [tensor.detach().requires_grad_() for tensor in inputs]
    reference(*exact).square().sum().backward()
    for i in ADAPTERS:
        assert inputs[i].grad_added_to_main_grad
        expected = 1 + 2 * exact[i].grad
        assert (inputs[i].main_grad - expected).norm() < 1e-6 * expected.norm()


def test_what_is_not_added_waits_only_where_megatron_adds_it(lora_kernels):
    """Not with dropout or a sum that is not fused, nor where a part of the layer is computed again by itself."""
    plain = {"bias_dropout_fusion": True, "hidden_dropout": 0.0, "recompute_granularity": None}
    plain |= {"recompute_modules": ["core_attn"]}

    def waits(**changes):
        return lora_kernels.residual_waits(SimpleNamespace(**plain | changes))

    assert waits() and waits(recompute_granularity="selective") and waits(recompute_granularity="full")
    assert not waits(hidden_dropout=0.1) and not waits(bias_dropout_fusion=False)
    assert not waits(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"])


def test_a_small_adapter_is_not_lost(lora_kernels):
    """A layer's output is rounded before NeMo adds the adapter's part, of which half or more is lost at first."""
    import torch
    from torch.nn.functional import silu

    from nemo_tutorial import lora

    y, x, a, b, _, a2, *_ = tensors((256, 128, 384, 128, 16, 16), torch.bfloat16)
    y, x, a, a2, none = y.detach(), x.detach(), a.detach(), a2.detach(), torch.zeros_like(b)
    b = (b.detach() * 4e-4).contiguous()  # about 1e-4, as after a step or two of that rate

    def swiglu(y):
        gate, up = y.chunk(2, -1)
        return silu(gate) * up

    def exact(b):
        return swiglu(y.double() + 2 * (x.double() @ a.double().T) @ b.double().T)

    def by_kernels(b):
        return lora_kernels.SwiGLU.apply(y, lora.Down.apply(x, a), b, 2.0, a2)[0].double()

    def as_nemo(b):
        return swiglu(lora.Up.apply(y.clone(), lora.Down.apply(x, a), b, 2.0).float()).bfloat16().double()

    effect = exact(b) - exact(none)
    for function, least, most in ((by_kernels, 0.95, 1.05), (as_nemo, 0, 0.6)):
        share = ((function(b) - function(none)) * effect).sum() / effect.square().sum()
        assert least < share < most, function

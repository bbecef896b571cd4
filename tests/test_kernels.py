"""Kernels that take the place of those that NeMo's layers call.

Those of a GPU are not here: operators of the same signature, computed by PyTorch, stand in for them.
"""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.nemo

# FlashAttention 3's own signatures, shortened to the arguments that are given.
FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, *, Tensor(a!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False,"
    " int num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq=None,"
    " Tensor(b!)? dk=None, Tensor(c!)? dv=None, *, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,"
    " int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False,"
    " bool deterministic=False) -> ()"
)


def reference(q, k, v, cuts, scale):
    """Causal attention of (b, s, h, d), or of each sample of (t, h, d) between `cuts`, in float32."""
    import torch
    import torch.nn.functional as F

    def one(*tensors):
        q, k, v = (tensor.transpose(1, 2).float() for tensor in tensors)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

    if cuts is None:
        return one(q, k, v)
    parts = [one(*(tensor[None, a:b] for tensor in (q, k, v)))[0] for a, b in zip(cuts, cuts[1:])]
    return torch.cat(parts)


@pytest.fixture
def operators():
    """A torch.ops.flash_attn_3 that takes and returns what the real one does; whether each bwd was `deterministic`."""
    import torch

    def fwd(q, k, v, *, out=None, cu_seqlens_q=None, softmax_scale=None, is_causal=False, num_splits=0, **others):
        assert is_causal and num_splits == 1 and all(tensor.stride(-1) == 1 for tensor in (q, k, v, out))
        cuts = cu_seqlens_q.tolist() if cu_seqlens_q is not None else None
        out.copy_(reference(q, k, v, cuts, softmax_scale))
        return tuple(torch.empty(1) for _ in range(4))

    def bwd(dout, q, k, v, out, lse, dq=None, dk=None, dv=None, *, cu_seqlens_q=None, softmax_scale=None, **others):
        told.append(others.get("deterministic", False))
        cuts = cu_seqlens_q.tolist() if cu_seqlens_q is not None else None
        with torch.enable_grad():
            inputs = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
            again = reference(*inputs, cuts, softmax_scale)
            for target, gradient in zip((dq, dk, dv), torch.autograd.grad(again, inputs, dout.float())):
                target.copy_(gradient)

    told = []
    library = torch.library.Library("flash_attn_3", "DEF")
    for signature, function in ((FORWARD, fwd), (BACKWARD, bwd)):
        library.define(signature)
        library.impl(signature.partition("(")[0], function, "CPU")
    yield told
    library._destroy()


def layer(**changes):
    """What of a TEDotProductAttention decides which way it goes."""
    config = SimpleNamespace(context_parallel_size=1, fp8_dot_product_attention=False)
    flash = SimpleNamespace(softmax_scale=0.3)
    usual = {"config": config, "flash_attention": flash, "window_size": (-1, 0), "attention_dropout": 0.0}
    return SimpleNamespace(**usual | {"training": True, "deterministic": False} | changes)


def drawn(*shape):
    """Query, key and value as Megatron's split of what linear_qkv gives: views of one tensor."""
    import torch

    *outer, groups, heads, size = shape
    together = torch.randn(*outer, groups, (heads + 2) * size, dtype=torch.bfloat16).requires_grad_()
    q, k, v = together.split([heads * size, size, size], -1)
    return together, q.reshape(*outer, groups * heads, size), k, v


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_gives_the_same(operators, packed, deterministic):
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_tutorial import kernels

    torch.manual_seed(1)
    cuts = [0, 5, 6, 24] if packed else None
    together, q, k, v = drawn(*((24,) if packed else (24, 3)), 2, 4, 64)
    params = None
    if packed:
        ends = torch.tensor(cuts, dtype=torch.int32)
        longest = torch.tensor(18)  # NeMo's is a tensor
        params = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
    self = layer(deterministic=deterministic)
    out = kernels.attention(self, q, k, v, None, AttnMaskType.causal, packed_seq_params=params)
    out.float().pow(2).sum().backward()
    assert operators == [deterministic]
    ours, together.grad = together.grad, None

    first = (lambda x: x) if packed else (lambda x: x.transpose(0, 1))
    expected = first(reference(first(q), first(k), first(v), cuts, 0.3).bfloat16()).flatten(-2)
    assert out.shape == expected.shape == (*q.shape[:-2], 512) and out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    expected.float().pow(2).sum().backward()
    torch.testing.assert_close(ours, together.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": (4, 0)},
        {"attention_dropout": 0.1},
        {"softmax_type": "learnable"},
        {"return_max_logit": True},
        {"config": SimpleNamespace(context_parallel_size=2, fp8_dot_product_attention=False)},
        {"config": SimpleNamespace(context_parallel_size=1, fp8_dot_product_attention=True)},
        {"mask": "no_mask"},
        {"mask": "padding_causal"},
        {"keys": 3},
        {"size": 80},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_what_flash_attention_does_not_compute_stays(monkeypatch, changes):
    import torch
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_tutorial import kernels

    monkeypatch.setattr(kernels, "STOCK_ATTENTION", lambda *args: "stock")
    mask = AttnMaskType[changes.pop("mask", "causal")]
    keys, dtype = changes.pop("keys", 6), getattr(torch, changes.pop("dtype", "bfloat16"))
    _, q, k, v = (tensor.to(dtype) for tensor in drawn(6, 1, 2, 4, changes.pop("size", 64)))
    assert kernels.attention(layer(**changes), q, k[:keys], v[:keys], None, mask) == "stock"


def test_without_dropout_in_validation(operators):
    """A model with dropout is validated with what it is trained with."""
    from megatron.core.transformer.enums import AttnMaskType

    from nemo_tutorial import kernels

    _, q, k, v = drawn(6, 1, 2, 4, 64)
    self = layer(attention_dropout=0.1, training=False)
    assert kernels.attention(self, q, k, v, None, AttnMaskType.causal).shape == (6, 1, 512)


@pytest.mark.parametrize(
    "capability, library, expected, warned",
    [
        ((9, 0), "package fails", None, True),
        ((8, 0), "loads", None, False),
        ((9, 0), "loads", "operators", False),
        ((9, 0), "fails", None, True),
        ((9, 0), "missing", None, False),
    ],
)
def test_where_flash_attention_is_used(monkeypatch, tmp_path, capsys, capability, library, expected, warned):
    import importlib.util

    import torch

    from nemo_tutorial import kernels

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    folder = tmp_path / "xformers/flash_attn_3"
    folder.mkdir(parents=True)
    if library != "missing":
        (folder / "_C.so").touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "xformers")])
    there = {"xformers": found} | ({"flash_attn_3": found} if library == "package fails" else {})
    monkeypatch.setattr(importlib.util, "find_spec", there.get)
    package = tmp_path / "flash_attn_3"
    package.mkdir()
    (package / "_C.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    ops = SimpleNamespace(flash_attn_3=SimpleNamespace())

    def load_library(path):
        if library == "fails":
            raise OSError("libcudart.so.12: cannot open shared object file")
        ops.flash_attn_3.bwd = True

    ops.load_library = load_library
    monkeypatch.setattr(torch, "ops", ops)
    assert kernels.flash_attention_3() == (ops.flash_attn_3 if expected else None)
    assert ("libcudart.so.12: cannot open" in capsys.readouterr().err) == warned


@pytest.mark.parametrize("beside", [False, True])
def test_the_runtime_beside_the_library(monkeypatch, tmp_path, beside):
    """cuDNN has chosen its CUDA runtime before a second one is loaded, for which the library is."""
    import torch

    from nemo_tutorial import kernels

    done = []
    monkeypatch.setattr(kernels, "choose_runtime_of_cudnn", lambda: done.append("cuDNN"))
    monkeypatch.setattr(kernels.ctypes, "CDLL", done.append)
    monkeypatch.setattr(torch, "ops", SimpleNamespace(load_library=done.append))
    runtime = tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.12"
    if beside:
        runtime.parent.mkdir(parents=True)
        runtime.touch()
    kernels.load_with_runtime(tmp_path / "_C.so")
    assert done == (["cuDNN", str(runtime)] if beside else []) + [str(tmp_path / "_C.so")]


@pytest.mark.parametrize(
    "kv_channels, heads, used", [(None, 32, True), (128, 64, True), (256, 32, False), (None, 64, False)]
)
def test_flash_attention_is_loaded_for_its_heads_alone(monkeypatch, capsys, kv_channels, heads, used):
    from nemo_tutorial import kernels

    monkeypatch.setattr(kernels, "flash_attention_3", lambda: True)
    monkeypatch.setattr(kernels, "te", SimpleNamespace(TEDotProductAttention=SimpleNamespace(forward=None)))
    config = SimpleNamespace(kv_channels=kv_channels, hidden_size=2048, num_attention_heads=heads)
    trainer = SimpleNamespace(is_global_zero=True)
    kernels.FlashAttention3().setup(trainer, SimpleNamespace(config=config), "fit")
    assert kernels.te.TEDotProductAttention.forward == (kernels.attention if used else None)
    assert ("attention: FlashAttention 3" in capsys.readouterr().out) == used


def test_swiglu(monkeypatch):
    """Where there is a bias, or the input is not kept in bf16, Megatron's own stays."""
    import torch

    from nemo_tutorial import kernels

    monkeypatch.setattr(kernels, "STOCK_SWIGLU", lambda *args: ("stock", *args[1:]))
    swiglu = kernels.swiglu_by(lambda x: ("op", x))
    x = torch.ones(2)
    assert swiglu(x, None, False, False) == ("op", x)
    assert swiglu(x, x)[0] == swiglu(x, None, True)[0] == swiglu(x, None, False, True)[0] == "stock"

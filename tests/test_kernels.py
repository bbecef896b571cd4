"""Kernels that take the place of those that NeMo's layers call.

Those of a GPU are not here: operators of the same signature, computed by PyTorch, stand in for them.
"""

from types import SimpleNamespace

import pytest
import triton_interpreter

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


def kernels_of_the_loss(calls):
    """Transformer Engine's two Triton kernels of the cross entropy, as functions of PyTorch's: a row a program."""
    import torch

    from nemo_tutorial import kernels

    def launched(function, arguments):
        class Kernel:
            arg_names = arguments

            def __getitem__(self, grid):
                return lambda *args, num_warps, **named: (
                    calls.append(function.__name__) or function(grid[0], **dict(zip(arguments, args)), **named)
                )

        return Kernel()

    def statistics(rows, X_ptr, X_stride, Y_ptr, Y_stride, m_d_X_y_ptr, m_d_X_y_stride, rank, n_cols, BLOCK_SIZE):
        assert (X_stride, Y_stride, m_d_X_y_stride) == (n_cols, 1, 1) and X_ptr.is_contiguous()
        x, y = X_ptr.view(rows, n_cols).float(), Y_ptr.view(-1) - rank * n_cols
        highest = x.amax(1)
        right = x.gather(1, y.clamp(0, n_cols - 1)[:, None])[:, 0].where((y >= 0) & (y < n_cols), -torch.inf)
        m_d_X_y_ptr.copy_(torch.stack((highest, (x - highest[:, None]).exp().sum(1), right), 1))

    def gradient(rows, X_ptr, X_stride, Y_ptr, Y_stride, loss_ptr, loss_stride, m_d_X_y_ptr, m_d_X_y_stride, **named):
        assert named["world_size"] == 1 and not named["reduce_loss"] and named["label_smoothing"] == 0
        columns, rank = named["n_cols"], named["rank"]
        x, y = X_ptr.view(rows, columns), Y_ptr.view(-1)
        highest, total, _ = m_d_X_y_ptr.unbind(-1)
        x.copy_((x.float() - highest[:, None]).exp() / total[:, None])
        x[y == named["ignore_idx"]] = 0
        for row in ((y >= rank * columns) & (y < (rank + 1) * columns)).nonzero()[:, 0].tolist():
            x[row, y[row] - rank * columns] -= 1
        loss_ptr.fill_(torch.nan)

    return launched(statistics, kernels.STATISTICS), launched(gradient, kernels.GRADIENT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_cross_entropy_in_two_passes(monkeypatch, ranks, dtype):
    """Loss and gradient of PyTorch's; rows without label, without gradient; the vocabulary on one rank or two."""
    import torch
    import torch.nn.functional as F

    from nemo_tutorial import kernels

    torch.manual_seed(1)
    logits = (3 * torch.randn(5, 3, 64)).to(getattr(torch, dtype))
    labels, grad = torch.randint(0, 64, (5, 3)), torch.rand(5, 3) * 1e-4
    labels[1, 2], grad[3, 0] = kernels.IGNORED, 0
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.float().flatten(0, 1), labels.flatten(), reduction="none").view(5, 3)
    expected.backward(grad)
    parts = [part.clone().requires_grad_() for part in logits.chunk(ranks, -1)]

    def gather(output, own, group):
        every = []
        for rank, part in enumerate(parts):
            every.append(torch.empty_like(own))
            statistics[(15,)](
                part.detach(), 64 // ranks, labels, 1, every[-1], 1, rank, 64 // ranks, BLOCK_SIZE=64, num_warps=8
            )
        output.copy_(torch.cat(every))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    calls = []
    statistics, gradient = kernels_of_the_loss(calls)
    cross_entropy = kernels.cross_entropy_by(statistics, gradient)
    for rank, part in enumerate(parts):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        given = part * 1  # as the output layer's
        before = given.detach().clone()
        loss = cross_entropy(given, labels, group if ranks > 1 else None)
        assert loss.dtype == torch.float32 and loss[1, 2] == 0
        torch.testing.assert_close(loss, expected.detach())
        assert given.equal(before) and calls.pop() == "statistics"
        loss.backward(grad)
        assert calls.pop() == "gradient"
        part_of = whole.grad.chunk(ranks, -1)[rank]
        torch.testing.assert_close(part.grad, part_of, rtol=1e-5 if dtype == "float32" else 0.01, atol=1e-10)
        assert not part.grad[1, 2].any() and not part.grad[3, 0].any()
        calls.clear()


@pytest.mark.parametrize("changed", [None, "kernel", "no kernel", "Megatron"])
def test_only_what_has_the_known_arguments_is_replaced(monkeypatch, changed):
    import sys

    from nemo_tutorial import kernels

    statistics, gradient = kernels_of_the_loss([])
    if changed == "kernel":
        gradient.arg_names = gradient.arg_names[:-1]
    module = SimpleNamespace(online_softmax_kernel=statistics, cross_entropy_kernel=gradient)
    if changed == "no kernel":
        del module.cross_entropy_kernel
    package = SimpleNamespace(cross_entropy=module)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.triton", package)

    def theirs(logits, labels, tp_group, is_cg_capturable=False):
        """Megatron 0.15's."""

    def older(logits, labels):
        """Megatron 0.12's."""

    stock = older if changed == "Megatron" else theirs
    monkeypatch.setattr(kernels.language_module, "te_parallel_cross_entropy", stock)
    kernels.CrossEntropy().setup(None, None, "fit")
    assert (kernels.language_module.te_parallel_cross_entropy is stock) == bool(changed)


def config_of(name, **changes):
    """One of NeMo's configs, not checked."""
    from nemo.collections import llm

    cls = getattr(llm, name)
    config = cls.__new__(cls)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize(
    "name, changes, turned, summed",
    [
        ("Llama32Config1B", {}, True, True),
        ("Llama2Config7B", {}, True, True),
        ("Llama32Config1B", {"rotary_percent": 0.5}, False, True),
        ("Llama32Config1B", {"rotary_interleaved": True}, False, True),
        ("Llama4Experts16Config", {}, False, False),  # has layers without positions
        ("Qwen3Config8B", {}, False, False),  # norms its queries
        ("Gemma2Config2B", {}, False, False),  # says itself that gradients are not summed up in products
    ],
)
def test_what_was_measured_on_llama_is_for_llama(monkeypatch, name, changes, turned, summed):
    from nemo_tutorial import kernels

    self_attention = kernels.megatron_attention.SelfAttention
    for attribute in ("forward", "get_query_key_value_tensors"):
        monkeypatch.setattr(self_attention, attribute, getattr(self_attention, attribute))
    for attribute in ("_grad_accum_fusion_available", "fused_weight_gradient_mlp_cuda"):
        monkeypatch.setattr(kernels.layers, attribute, None, raising=False)
    config = config_of(name, gradient_accumulation_fusion=False, **changes)
    with triton_interpreter.imported("rope") as rope:
        for callback in (kernels.FusedRoPE(), kernels.GradientsInProduct()):
            callback.setup(None, SimpleNamespace(config=config), "fit")
        assert (self_attention.forward is rope.attention) == turned
        assert (self_attention.get_query_key_value_tensors is rope.split_and_turned) == turned
    assert config.gradient_accumulation_fusion == summed


def test_an_older_megatron_splits_itself(monkeypatch):
    from nemo_tutorial import kernels

    def older(self, hidden_states, key_value_states=None):
        """Megatron 0.12's."""

    self_attention = kernels.megatron_attention.SelfAttention
    monkeypatch.setattr(self_attention, "get_query_key_value_tensors", older)
    kernels.FusedRoPE().setup(None, SimpleNamespace(config=config_of("Llama32Config1B")), "fit")
    assert self_attention.get_query_key_value_tensors is older


def test_apex_keeps_its_own_sum(monkeypatch):
    from nemo_tutorial import kernels

    monkeypatch.setattr(kernels.layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(kernels.layers, "fused_weight_gradient_mlp_cuda", "Apex's", raising=False)
    config = config_of("Llama32Config1B", gradient_accumulation_fusion=True)
    kernels.GradientsInProduct().setup(None, SimpleNamespace(config=config), "fit")
    assert kernels.layers.fused_weight_gradient_mlp_cuda == "Apex's"

"""Queries, keys and values that are split and turned in one pass: the kernel's own body, run by PyTorch."""

from types import SimpleNamespace

import pytest
import triton_interpreter

pytestmark = pytest.mark.nemo


@pytest.fixture
def rope():
    with triton_interpreter.imported("rope") as module:
        yield module


def frequencies(positions, d):
    """Megatron's (positions, 1, 1, d)."""
    import torch

    each = torch.outer(torch.arange(float(positions)), 100 ** -torch.arange(0, 1, 2 / d))
    return torch.cat((each, each), -1)[:, None, None]


def megatrons(mixed, table, n, d):
    """Split and turned by Megatron's own functions; `table` has the frequencies of each token."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    q, k, v = mixed.split((n * d, d, d), -1)
    q = q.reshape(*q.shape[:2], -1, d)
    return _apply_rotary_pos_emb_bshd(q, table), _apply_rotary_pos_emb_bshd(k, table), v


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("groups, n", [(2, 3), (3, 1), (1, 5)])
@pytest.mark.parametrize("cuts", [None, [0, 5, 9, 16], [0, 5, 9]], ids=str)
def test_they_are_megatrons(rope, dtype, groups, n, cuts):
    """Values and gradients, of samples of 16 tokens and of packs, also with something behind the last sample."""
    import torch

    torch.manual_seed(1)
    d, tokens, b = 8, 16, 2 if cuts is None else 1
    mixed = torch.randn(tokens, b, groups, (n + 2) * d).to(getattr(torch, dtype)).requires_grad_()
    table, packed = frequencies(tokens if cuts is None else 7, d), None
    if cuts:
        ends = torch.tensor(cuts, dtype=torch.int32)
        packed = SimpleNamespace(cu_seqlens_q=ends, cu_seqlens_q_padded=None)
    found = rope.SplitAndTurn.apply(mixed, *rope.angles(table, packed, tokens))
    if cuts:
        table = torch.cat([table[: b - a] for a, b in zip(cuts, [*cuts[1:], tokens])])
    whole = mixed.detach().float().requires_grad_()
    expected = megatrons(whole, table, n, d)
    grads = [torch.randn_like(part).to(mixed.dtype) for part in expected]
    # As another attention gives them: not in one piece.
    torch.autograd.backward(found, [grad.transpose(0, 1).contiguous().transpose(0, 1) for grad in grads])
    torch.autograd.backward(expected, [grad.float() for grad in grads])
    rounded = {"rtol": 2**-8, "atol": 1e-6} if dtype == "bfloat16" else {"rtol": 1e-6, "atol": 1e-6}
    for ours, theirs in zip((*found, mixed.grad), (*expected, whole.grad)):
        assert ours.dtype == mixed.dtype and ours.is_contiguous()
        torch.testing.assert_close(ours.float(), theirs, **rounded)


def test_all_layers_ask_once(rope):
    """The angles stay with Megatron's frequencies, which it keeps, and with each pack; padded ends go first."""
    import torch

    table = frequencies(9, 4)
    assert rope.angles(table, None, 9)[0] is rope.angles(table, None, 9)[0]
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = SimpleNamespace(cu_seqlens_q=None, cu_seqlens_q_padded=ends)
    cos, sin = rope.angles(table, packed, 6)
    assert rope.angles(table, packed, 6)[1] is sin and cos.equal(table.angles[0][[0, 1, 0, 1, 2, 3]])


def test_inference_is_megatrons(rope, monkeypatch):
    """With an inference context, or without positions, nothing is turned before Megatron does."""
    seen = []

    def stock(self, *args, rotary_pos_emb, inference_context, packed_seq_params):
        seen.append((rotary_pos_emb, self.__dict__.get("positions")))

    monkeypatch.setattr(rope.Attention, "forward", stock)
    layer = SimpleNamespace()
    rope.attention(layer, rotary_pos_emb=None)
    rope.attention(layer, rotary_pos_emb="table", inference_context="static")
    rope.attention(layer, rotary_pos_emb="table", packed_seq_params="pack")
    assert seen == [(None, None), ("table", None), (None, ("table", "pack"))]
    monkeypatch.setattr(rope, "STOCK_SPLIT", lambda self, *args: args)
    del layer.positions
    assert rope.split_and_turned(layer, "x") == ("x", None, True)

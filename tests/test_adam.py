"""Transformer Engine's Adam with small states: what its checkpoints hold, and its step in parts. On a GPU: test_gpu."""

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.nemo


def rounded(masters):
    """(bf16 weights, int16 remainders) as Transformer Engine's kernel keeps float32 weights: the upper 16 bits, one
    more if the lower ones, as a signed number, are negative."""
    import torch

    bits = masters.view(torch.int32)
    low = (bits & 0xFFFF).to(torch.int32)
    low = torch.where(low >= 2**15, low - 2**16, low)
    return ((bits >> 16) + (low < 0)).short().view(torch.bfloat16), low.short()


def test_float32_weights_come_back_to_the_last_bit():
    import torch

    from nemo_tutorial import adam

    torch.manual_seed(1)
    masters = torch.cat([torch.randn(100_000) * 0.02, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-38, 3e38])])
    weights, kept = rounded(masters)
    assert adam.master_weights(weights, kept).view(torch.int32).equal(masters.view(torch.int32))
    assert adam.remainders(weights, masters).equal(kept)
    assert (kept != 0).sum() > 90_000


def test_weights_that_another_optimizer_rounded():
    """Half of the last bit it rounds to even, Adam away from zero: then the last bit of float32 is another."""
    import torch

    from nemo_tutorial import adam

    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x3F807FFF]).int().view(torch.float32)
    halves = torch.cat([halves, -halves])
    weights = halves.bfloat16()
    back = adam.master_weights(weights, adam.remainders(weights, halves))
    off = (back.view(torch.int32) - halves.view(torch.int32)).abs()
    assert off.tolist() == [1, 0, 0, 0] * 2
    assert back.bfloat16().equal(weights)


def test_a_checkpoint_has_weights_and_is_loaded_from_them(monkeypatch):
    """Megatron's two functions, of a parameter of which Adam keeps remainders, and of one of which it does not."""
    import torch

    from nemo_tutorial import adam

    masters = torch.randn(64) * 0.02
    weights, kept = rounded(masters)
    inner = SimpleNamespace(param_groups=[{"params": []}, {"params": [None, weights]}], store_param_remainders=True)
    optimizer = SimpleNamespace(model_param_group_index_map={"w": (1, 1)}, optimizer=inner)
    moments, given = torch.zeros(64), {}
    monkeypatch.setattr(adam, "STOCK_GET", lambda self, name: {"param": kept, "exp_avg": moments})
    monkeypatch.setattr(adam, "STOCK_SET", lambda self, name, tensors: given.update(tensors))
    found = adam.states(optimizer, "w")
    assert found["param"].equal(masters) and found["exp_avg"] is moments
    adam.set_states(optimizer, "w", found)
    assert given["param"].equal(kept) and given["exp_avg"] is moments
    inner.store_param_remainders = False
    adam.set_states(optimizer, "w", found)
    assert given["param"] is found["param"]


def test_a_step_in_parts_is_the_whole_step():
    """PyTorch's AdamW, of two groups, one with a tensor above the limit; the groups are as they were."""
    import torch

    from nemo_tutorial import adam

    class InParts(torch.optim.AdamW):
        step = adam.in_parts(lambda self: (sizes.append(elements(self)), torch.optim.AdamW.step(self)), 100)

    def elements(optimizer):
        return [tensor.numel() for group in optimizer.param_groups for tensor in group["params"]]

    def made(cls):
        torch.manual_seed(1)
        tensors = [torch.randn(size, requires_grad=True) for size in (60, 40, 1, 250, 30)]
        return tensors, cls([{"params": tensors[:4]}, {"params": tensors[4:], "weight_decay": 0.0}], lr=0.1)

    sizes = []
    whole, parts = made(torch.optim.AdamW), made(InParts)
    for _ in range(3):
        for tensors, optimizer in (whole, parts):
            for tensor in tensors:
                tensor.grad = tensor.detach().sin()
            optimizer.step()
    assert sizes == [[60, 40], [1], [250], [30]] * 3
    assert all(a.equal(b) for a, b in zip(whole[0], parts[0]))
    assert [len(group["params"]) for group in parts[1].param_groups] == [4, 1]


def test_a_group_counts_its_steps_once():
    """Transformer Engine counts in the group, from nothing."""
    import torch

    from nemo_tutorial import adam

    counts = []

    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            counts.append(group["step"])

    groups = [{"params": [torch.zeros(8), torch.zeros(8)]}, {"params": []}]
    optimizer = SimpleNamespace(param_groups=groups)
    for _ in range(2):
        adam.in_parts(step, 10)(optimizer)
    assert counts == [1, 1, 2, 2] and groups[0]["step"] == 2 and "step" not in groups[1]


@pytest.mark.parametrize("master_weights", [True, False])
def test_megatron_asks_for_states_itself(master_weights):
    """Of Adam with the float32 weights; else it gets them, as they are."""
    import torch

    from nemo_tutorial import adam

    class Adam(torch.optim.AdamW):
        state_dict = adam.groups(torch.optim.AdamW.state_dict)

    weight = torch.ones(4, requires_grad=True)
    optimizer = Adam([weight], lr=0.5)
    optimizer.master_weights = master_weights
    weight.sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert bool(saved["state"]) != master_weights and saved["param_groups"][0]["lr"] == 0.5


@pytest.mark.parametrize("fails", [False, True])
def test_states_are_made_before_megatron_asks(fails):
    """Of each parameter that has none, remainders of bf16 alone; they are there to stay while it loads, not after."""
    import torch

    from nemo_tutorial import adam

    class Adam(torch.optim.SGD):
        store_param_remainders, made = True, []

        def initialize_state(self, param, store_param_remainders):
            self.made.append((param, store_param_remainders))
            self.state[param]["exp_avg"] = torch.ones(1)

    def load(self, found):
        before = dict(inner.state)
        assert len(before) == 3
        inner.load_state_dict({"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": found})
        assert inner.state == before and all(inner.state[weight] is state for weight, state in before.items())
        if fails:
            raise RuntimeError

    weights = [torch.zeros(1), torch.zeros(1).bfloat16(), torch.zeros(1)]
    inner = Adam([{"params": weights[:2]}, {"params": weights[2:]}], lr=1)
    inner.state[weights[2]]["exp_avg"] = torch.zeros(1)
    found = [group | {"lr": 2} for group in inner.state_dict()["param_groups"]]
    ours = adam.with_states(load, Adam)
    if fails:
        with pytest.raises(RuntimeError):
            ours(SimpleNamespace(optimizer=inner), found)
    else:
        ours(SimpleNamespace(optimizer=inner), found)
    assert inner.made == [(weights[0], False), (weights[1], True)] and inner.param_groups[1]["lr"] == 2
    Adam.made.clear()
    inner.load_state_dict({"state": {0: {"exp_avg": torch.full([1], 3.0)}}, "param_groups": found})
    assert inner.state[weights[0]]["exp_avg"] == 3


def test_another_optimizer_is_loaded_as_it_was():
    from nemo_tutorial import adam

    loaded = []
    optimizer = SimpleNamespace(optimizer=SimpleNamespace())
    adam.with_states(lambda self, found: loaded.append((self, found)), dict)(optimizer, "found")
    assert loaded == [(optimizer, "found")] and not vars(optimizer.optimizer)

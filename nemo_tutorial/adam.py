"""Transformer Engine's Adam in Megatron's distributed optimizer: the memory that it takes, and what is saved of it.

Ours, for a load by Megatron 0.15 holds all states twice, so that a run may fit and not go on. With states smaller than
float32 (`--use_precision_aware_optimizer`) none can go on: of a float32 weight Adam keeps the 16 bits that the bf16
weight lacks, which a checkpoint then holds in place of the weight, and which loading refuses (Megatron-LM's #4222). And
a step and a save each make float32 copies of the moments of all parameters at once: of 8B 60 GiB.
"""

import contextlib
import functools

import torch
from lightning.pytorch import Callback
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_tutorial import compat, memory

STOCK_GET = getattr(DistributedOptimizer, "_get_main_param_and_optimizer_states", None)  # not in an older Megatron
STOCK_SET = getattr(DistributedOptimizer, "_set_main_param_and_optimizer_states", None)


class StatesOnce(Callback):
    """Has all of the process' Adams hold their states once while they are loaded: see with_states."""

    def setup(self, trainer, pl_module, stage):
        with contextlib.suppress(ImportError):  # without a GPU there is none
            from transformer_engine.pytorch.optimizers import FusedAdam

            DistributedOptimizer.load_state_dict = with_states(DistributedOptimizer.load_state_dict, FusedAdam)


class SmallStates(Callback):
    """Has all of the process' Adams step in parts, and checkpoints hold what those of other runs hold."""

    def setup(self, trainer, pl_module, stage):
        from transformer_engine.pytorch.optimizers import FusedAdam

        if compat.replace(DistributedOptimizer, "_get_main_param_and_optimizer_states", states):
            compat.replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states)
        FusedAdam.step = in_parts(FusedAdam.step)
        FusedAdam.state_dict = groups(FusedAdam.state_dict)


def master_weights(weights, remainders):
    """The float32 weights of which Adam rounded `weights` (bf16) and kept `remainders` (int16)."""
    return ((weights.view(torch.int16).int() << 16) + remainders.int()).view(torch.float32)


def remainders(weights, masters):
    """What Adam keeps (int16) of float32 `masters` beside `weights` (bf16), which are those rounded."""
    lacking = masters.view(torch.int32) - (weights.view(torch.int16).int() << 16)
    return lacking.clamp(-(2**15), 2**15 - 1).short()  # above: a half was rounded down, where Adam rounds up


def _weights(optimizer, model_param):
    """The rank's own part of a parameter, if Adam keeps remainders of it: of bf16, not of FP8; else None."""
    group, order = optimizer.model_param_group_index_map[model_param]
    weights = optimizer.optimizer.param_groups[group]["params"][order].detach()
    kept = getattr(optimizer.optimizer, "store_param_remainders", False)
    return weights if kept and type(weights) is torch.Tensor and weights.dtype == torch.bfloat16 else None


def states(self, model_param):
    """DistributedOptimizer's _get_main_param_and_optimizer_states, with the whole float32 weights."""
    found, weights = STOCK_GET(self, model_param), _weights(self, model_param)
    if weights is not None:
        found["param"] = master_weights(weights, found["param"])
    return found


def set_states(self, model_param, tensors):
    """DistributedOptimizer's _set_main_param_and_optimizer_states, of whole float32 weights."""
    weights = _weights(self, model_param)
    if weights is not None:
        tensors = tensors | {"param": remainders(weights, tensors["param"].to(weights.device))}
    STOCK_SET(self, model_param, tensors)


def in_parts(step, limit=memory.STEPPED):
    """An optimizer's `step`, without closure, of so many parameters at a time, or a tensor if that has more."""

    def step_in_parts(self):
        every = self.param_groups
        try:
            for group in every:
                part = {}
                for parameters in parts(group["params"], limit):
                    part = group | {"params": parameters}  # with the count of steps as it was
                    self.param_groups = [part]
                    step(self)
                if "step" in part:
                    group["step"] = part["step"]
        finally:
            self.param_groups = every

    return step_in_parts


def parts(parameters, limit):
    """Lists of one tensor or more, of `limit` elements at most if it is more."""
    part, size = [], 0
    for parameter in parameters:
        if part and size + parameter.numel() > limit:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += parameter.numel()
    if part:
        yield part


def with_states(load, adam):
    """DistributedOptimizer's `load_state_dict`, for which an optimizer of class `adam` makes its states before.

    They are there to stay: Megatron sets each at last. In place of states that are not there it makes others, on the
    GPU, and Adam would make all of them once more to copy those that it is given into them.
    """

    def load_state_dict(self, state_dict):
        inner = self.optimizer
        if not isinstance(inner, adam):
            return load(self, state_dict)
        for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
            if not inner.state[parameter]:
                kept = getattr(inner, "store_param_remainders", False) and parameter.dtype == torch.bfloat16
                kept = compat.supported(adam.initialize_state, store_param_remainders=kept)  # a newer one's
                inner.initialize_state(parameter, **kept)
        inner.load_state_dict = functools.partial(load_groups, inner)
        try:
            load(self, state_dict)
        finally:
            del inner.load_state_dict

    return load_state_dict


def groups(stock):
    """FusedAdam's `state_dict`, without the states: Megatron asks each for its own, and leaves these away."""

    def state_dict(self):
        if not self.master_weights:  # Megatron's own, as with most recipes of FP8: it copies into states that are there
            return stock(self)
        return torch.optim.Optimizer.state_dict(self) | {"state": {}}

    return state_dict


def load_groups(self, state_dict):
    """An optimizer's `load_state_dict`, of all but the states."""
    states = self.state
    torch.optim.Optimizer.load_state_dict(self, state_dict | {"state": {}})
    self.state = states

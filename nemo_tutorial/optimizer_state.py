"""A checkpoint's state of Megatron's distributed optimizer: each replica of the model writes and reads some parameters.

Ours, for Megatron's "fully_reshardable" format, which this still is, gathers all of it in the memory of every rank, on
the GPU a whole bucket at a time: of 8B parameters 96 GB a rank, and without buckets 32 GB or more on each GPU. And
where it pads buckets, as with a number of replicas that is no power of two, it takes the state of one parameter from
where another's lies, without an error. Here a parameter's state comes together on one rank, one tensor at a time.
"""

import dataclasses

import torch
from lightning.pytorch import Callback
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemo_tutorial import compat

STATES = ("param", "exp_avg", "exp_avg_sq")  # Megatron's names of the float32 weights and of Adam's moments


class SharedByReplicas(Callback):
    """Has all of the process' distributed optimizers save and load so."""

    def setup(self, trainer, pl_module, stage):
        compat.replace(DistributedOptimizer, "sharded_param_state_fully_reshardable", sharded_state)
        compat.replace(DistributedOptimizer, "load_parameter_state_from_fully_reshardable", load_state)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        # The model has its weights by now: those that other replicas read are there twice, while the states are loaded.
        checkpoint.pop("state_dict", None)


def parameters(optimizer):
    """Of each: (number, parameter, owner, (first, last + 1) of its elements that are this rank's, or None).

    Numbers and owners are the same on all replicas, by their ranks in `optimizer.data_parallel_group`; each owns about
    as many elements as another.
    """
    shares = {}
    for buffer in optimizer.gbuf_ranges:
        for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
            shares |= {parameter: ranges["param"] for parameter, ranges in bucket["param_map"].items()}
    owned = [0] * optimizer.data_parallel_group.size()
    every = (parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map)
    for number, parameter in enumerate(every):
        owner = owned.index(min(owned))
        owned[owner] += parameter.numel()
        share = shares.get(parameter)
        yield number, parameter, owner, share and (share.start, share.end)


@torch.no_grad()
def sharded_state(self, model_sharded_state_dict, is_loading=False, metadata=None):
    """DistributedOptimizer's sharded_param_state_fully_reshardable: {number: {state: ShardedTensor}} of what is owned.

    To be loaded, every rank asks for the smallest parameter as well: one that has nothing to load would be left out
    where the others take their shares of the rest.
    """
    found, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_model = {sharded.data: sharded for sharded in nested_values(found)}
    group, every = self.data_parallel_group, list(parameters(self))
    smallest = min(every, key=lambda each: each[1].numel())[0]
    state = {}
    for number, parameter, owner, share in every:
        owns = group.rank() == owner
        if is_loading and (owns or number == smallest):
            state[number] = {name: torch.empty(parameter.shape, dtype=torch.float32) for name in STATES}
        elif not is_loading:
            own = self._get_main_param_and_optimizer_states(parameter) if share else {}
            for name in STATES:
                whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
                if share:
                    whole[slice(*share)] = own[name].detach()
                # The sum of its bits, of which all but one rank have zeros.
                destination = torch.distributed.get_global_rank(group, owner)
                torch.distributed.reduce(whole.view(torch.int32), destination, group=group)
                if owns:
                    state.setdefault(number, {})[name] = whole.view(parameter.shape).to("cpu", copy=True)
        main = owns and not self.distributed_optimizer_instance_id
        for name, tensor in state.get(number, {}).items():
            state[number][name] = as_sharded(name, tensor, of_model[parameter], main)
    return state


def as_sharded(name, tensor, of_model, main):
    """The ShardedTensor, or factory of some, of a parameter's state, laid out as the parameter itself."""
    fields = {"key": f"optimizer.state.{name}.{of_model.key}", "data": tensor}
    fields["replica_id"] = (*of_model.replica_id[:2], 0 if main else 1)  # the last: among replicas of the model
    if not isinstance(of_model, ShardedTensorFactory):
        fields["dtype"] = tensor.dtype
    found = dataclasses.replace(of_model, **fields)
    found.validate_metadata_integrity()
    return found


@torch.no_grad()
def load_state(self, state_dict):
    """DistributedOptimizer's load_parameter_state_from_fully_reshardable, of {number: {state: tensor}}.

    Raises ValueError, on all replicas, if the float32 weights are not those of the model, which is loaded by then.
    """
    group, every = self.data_parallel_group, list(parameters(self))
    wrong = torch.zeros(1, device=every[0][1].device)
    for number, parameter, owner, share in every:
        own = {}
        for name in STATES:
            whole = torch.empty(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if group.rank() == owner:
                whole.copy_(state_dict[number].pop(name).flatten())
            torch.distributed.broadcast(whole, torch.distributed.get_global_rank(group, owner), group=group)
            own[name] = whole[slice(*share)].clone() if share else None
        if share:
            if type(parameter.detach()) is torch.Tensor:  # not in FP8
                rounded = own["param"].to(parameter.dtype)
                off = (rounded != parameter.detach().flatten()[slice(*share)]).float().mean()
                wrong = wrong.maximum(off)  # a half may be rounded either way
            self._set_main_param_and_optimizer_states(parameter, own)
    torch.distributed.all_reduce(wrong, op=torch.distributed.ReduceOp.MAX, group=group)
    if wrong > 0.01:
        raise ValueError(
            "the optimizer's float32 weights in the checkpoint are not those of its model: NeMo, or these scripts "
            "before December 2026, saved it with a number of replicas that is no power of two, or with "
            "--use_precision_aware_optimizer. Its model is right: begin another run with it, by another --experiment "
            "and --nemo_model"
        )

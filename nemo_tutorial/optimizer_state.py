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


def parameters(optimizer):
    """Of all its parameters: (number, parameter, owner, [(rank, first, last + 1)]: who has which elements of it).

    The same on all replicas, whose ranks in `optimizer.data_parallel_group` count. Each owns about as many elements.
    """
    ranks = range(optimizer.data_parallel_group.size())
    owned, number = [0 for _ in ranks], 0
    for buffer in optimizer.buffers:
        for parameter, (start, end, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            share = bucket.grad_data.numel() // len(ranks)  # of the bucket, a rank's
            pieces = []
            for rank in ranks:
                first = bucket.offset + rank * share - start
                piece = max(0, first), min(end - start, first + share)
                pieces += [(rank, *piece)] if piece[0] < piece[1] else []
            owner = owned.index(min(owned))
            owned[owner] += end - start
            yield number, parameter, owner, pieces
            number += 1


def gathered(piece, size, owner, pieces, group):
    """The whole (size,) on `owner`, of the pieces that the ranks have, or of none; None elsewhere. On their device."""
    rank, whole, transfers = group.rank(), None, []
    if rank == owner:
        whole = torch.empty(size, device=piece.device, dtype=piece.dtype)
        for holder, first, end in pieces:
            if holder == rank:
                whole[first:end] = piece
            else:
                transfers.append((torch.distributed.irecv, whole[first:end], holder))
    elif piece.numel():
        transfers.append((torch.distributed.isend, piece, owner))
    exchange(transfers, group)
    return whole


def scattered(whole, device, owner, pieces, group):
    """This rank's piece of the `whole` that `owner` has; None if it has none. float32, on the device."""
    rank, piece, transfers = group.rank(), None, []
    for holder, first, end in pieces:
        if holder == rank == owner:
            piece = whole[first:end]
        elif holder == rank:
            piece = torch.empty(end - first, device=device)
            transfers.append((torch.distributed.irecv, piece, owner))
        elif rank == owner:
            transfers.append((torch.distributed.isend, whole[first:end], holder))
    exchange(transfers, group)
    return piece


def exchange(transfers, group):
    """Sends and receives, (function, contiguous tensor, the other's rank in the group), all at once."""
    if transfers:
        operations = [
            torch.distributed.P2POp(function, tensor, torch.distributed.get_global_rank(group, other), group)
            for function, tensor, other in transfers
        ]
        for request in torch.distributed.batch_isend_irecv(operations):
            request.wait()


@torch.no_grad()
def sharded_state(self, model_sharded_state_dict, is_loading=False, metadata=None):
    """DistributedOptimizer's sharded_param_state_fully_reshardable: {number: {state: ShardedTensor}} of what is owned.

    To be loaded, every rank asks for the smallest parameter as well: one that has nothing to load would be left out
    where the others take their pieces of the rest.
    """
    found, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_model = {sharded.data: sharded for sharded in nested_values(found)}
    group, every = self.data_parallel_group, list(parameters(self))
    smallest = min(every, key=lambda each: each[1].numel())[0]
    torch.distributed.barrier(group)  # NCCL connects all ranks of a group at its first call only
    state = {}
    for number, parameter, owner, pieces in every:
        owns = group.rank() == owner
        if is_loading and (owns or number == smallest):
            state[number] = {name: torch.empty(parameter.shape) for name in STATES}
        elif not is_loading:
            has = any(holder == group.rank() for holder, *_ in pieces)
            own = self._get_main_param_and_optimizer_states(parameter) if has else {}
            for name in STATES:
                piece = (
                    own[name].detach().to(parameter.device, torch.float32) if has else parameter.new_empty(0).float()
                )
                whole = gathered(piece, parameter.numel(), owner, pieces, group)
                if owns:
                    state.setdefault(number, {})[name] = whole.view(parameter.shape).to("cpu", copy=True)
        for name, tensor in state.get(number, {}).items():
            state[number][name] = as_sharded(name, tensor, of_model[parameter], main=owns)
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
    """DistributedOptimizer's load_parameter_state_from_fully_reshardable, of {number: {state: tensor}}."""
    group = self.data_parallel_group
    torch.distributed.barrier(group)
    for number, parameter, owner, pieces in parameters(self):
        own = {}
        for name in STATES:
            whole = None
            if group.rank() == owner:
                whole = state_dict[number].pop(name).to(parameter.device).flatten()
            own[name] = scattered(whole, parameter.device, owner, pieces, group)
        if own["param"] is not None:
            self._set_main_param_and_optimizer_states(parameter, own)

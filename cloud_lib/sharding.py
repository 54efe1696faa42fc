"""Training state spread over the processes (FSDP), and put together again.

A copy of the model is sharded and trained: each process keeps its part of the parameters, gradients and AdamW's
moments, and holds all parameters only during a step. The model itself stays whole everywhere, for evaluation and
checkpoints, which are therefore the same for any number of processes, with and without sharding.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, device: torch.device, world_size: int) -> FSDPModule:
    """A copy of the model, sharded over all processes as a whole (the packed forward goes around the layers' own)."""
    mesh = init_device_mesh(device.type, (world_size,))
    return fully_shard(copy.deepcopy(model), mesh=mesh, reshard_after_forward=False)


def set_last(sharded: FSDPModule, last: bool) -> None:
    """Whether the next micro-batch is the step's last: then gradients are summed and parameters given back.

    Processes may so have different numbers of micro-batches: each gathers and sums once per step.
    """
    sharded.set_requires_gradient_sync(last)
    sharded.set_reshard_after_backward(last)


@torch.no_grad()
def gather(sharded: nn.Module, model: nn.Module) -> None:
    """Copy the parameters of the sharded copy into the whole model (called by all processes)."""
    for target, source in zip(model.parameters(), sharded.parameters(), strict=True):
        target.copy_(_whole(source))


@torch.no_grad()
def scatter(model: nn.Module, sharded: nn.Module) -> None:
    """Copy the parameters of the whole model into the sharded copy (called by all processes)."""
    for target, source in zip(sharded.parameters(), model.parameters(), strict=True):
        target.copy_(_part(source, target))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state dict with whole tensors (called by all processes)."""
    state = optimizer.state_dict()
    return state | {"state": {i: {name: _whole(value) for name, value in values.items()}
                              for i, values in state["state"].items()}}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict of whole tensors (called by all processes)."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {i: {name: _part(value, parameters[i]) for name, value in values.items()}
             for i, values in state["state"].items()}
    optimizer.load_state_dict(state | {"state": parts})


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor; numbers, such as AdamW's step, stay whole."""
    if not isinstance(like, DTensor) or value.ndim == 0:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

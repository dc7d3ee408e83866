"""Optimizers of which each process keeps a part of the state: ZeRO stage 1 (arXiv:1910.02054)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def owners(parameters: list[nn.Parameter], num_processes: int) -> dict[nn.Parameter, int]:
    """The process that updates each parameter: the largest go first, each to the process with the fewest entries."""
    load = [0] * num_processes
    found: dict[nn.Parameter, int] = {}
    for parameter in sorted(parameters, key=lambda each: -each.numel()):
        found[parameter] = process = load.index(min(load))
        load[process] += parameter.numel()
    return found


def shard(optimizer: torch.optim.Optimizer) -> None:
    """From now on each process updates a part of the parameters, and sends it to the others.

    Only that part has a state, which is what takes memory: weights and gradients stay whole. As every parameter is
    updated as before, if elsewhere, the weights are the same bit for bit.

    Args:
        optimizer: of the same parameters in all processes of the default group. It must treat parameters apart, as all
            of torch's do.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    owner = owners(parameters, torch.distributed.get_world_size())
    mine = torch.distributed.get_rank()

    def keep_own_gradients(*_: Any) -> None:
        for parameter in parameters:
            if owner[parameter] != mine:
                parameter.grad = None  # optimizers pass over it, and make no state for it

    def send_updates(*_: Any) -> None:
        sent: list[Tensor] = [parameter.detach() for parameter in parameters]
        work = [
            torch.distributed.broadcast(tensor, src=owner[parameter], async_op=True)
            for parameter, tensor in zip(parameters, sent, strict=True)
        ]
        for each in work:
            each.wait()

    def forget_others(*_: Any) -> None:
        for parameter in parameters:
            if owner[parameter] != mine:
                optimizer.state.pop(parameter, None)

    optimizer.register_step_pre_hook(keep_own_gradients)
    optimizer.register_step_post_hook(send_updates)
    optimizer.register_load_state_dict_post_hook(forget_others)

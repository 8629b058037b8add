"""Several processes, one gradient.

Every process holds the whole model and takes its rows of every forward pass (`rows.share`). The loss of each is
divided by the weight of the WHOLE step, which all know beforehand, so the plain sum of the gradients over the
processes is the gradient of the big batch, also when rows have different lengths. (Averaging over processes, each
divided by its own tokens, is not: a rank with few trained tokens would count as much as one with many.)

`torchrun --nproc-per-node N` sets up the environment; a process started alone is rank 0 of 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["add_up", "add_up_gradients", "rank_and_size"]


def rank_and_size() -> tuple[int, int]:
    """(which of the processes this is, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(values: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(values)
    return values


def add_up_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients over the processes, a dtype at a time in one message."""
    if rank_and_size()[1] == 1:
        return
    held: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:  # no row of this process touched it
            parameter.grad = torch.zeros_like(parameter)
        held.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in held.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

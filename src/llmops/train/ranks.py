"""Several processes, one gradient.

Every process holds the whole model and takes its rows of every forward pass (`rows.share`). The loss of each is
divided by the weight of the WHOLE step, which all know beforehand, so the plain sum of the gradients over the
processes is the gradient of the big batch, also when rows have different lengths. (Averaging over processes, each
divided by its own tokens, is not: a rank with few trained tokens would count as much as one with many.)

`torchrun --nproc-per-node N -m llmops tune RECIPE` sets up the environment, `start` reads it; a process started alone
is rank 0 of 1. Rank 0 plans, scores and writes. The others `hear` which step is to be trained, take part in it, and
wait again.

A failure must not leave the others waiting. All ranks meet in `agree`: before a training, once in each of its steps,
at every look, and after it. A rank that fails anywhere brings its reason to its next meeting (`together` sees to it),
and everybody leaves the training there. A rank that dies breaks its connections, and one that hangs runs into the
timeout (30 minutes); both raise in the others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from llmops.errors import StepError

__all__ = ["RankError", "add_up", "add_up_gradients", "agree", "all_the_same", "hear", "rank_and_size", "start", "stop",
           "tell", "together"]

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
FIGURES = 4  # numbers that a meeting may add up: every meeting sends as many, so that any two of them fit together
_control: list[Any] = []  # the group that orders travel in: waiting for one may take as long as scoring does


class RankError(StepError):
    """A failure that all ranks know of: they have left the training together."""


def start(device: str = "auto", timeout: timedelta = TIMEOUT) -> None:
    """Join the other processes of a `torchrun`: gloo for tensors on the CPU, nccl for those on this rank's GPU.

    device: as `runtime.device` of a recipe. Raises StepError when a node has fewer GPUs than processes, or when the
    device is one GPU by number, which all processes would share.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if ":" in device or local >= count:
            raise StepError(f"{os.environ['WORLD_SIZE']} processes on runtime.device {device}, and process {local} of "
                            f"this node sees {count} GPU(s); expected one GPU for each; set runtime.device: cuda, and "
                            "--nproc-per-node to the number of GPUs")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    _control[:] = [dist.new_group(backend="gloo", timeout=timedelta(days=100))]


def stop() -> None:
    """Leave the other processes."""
    _control.clear()
    dist.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """(which of the processes this is, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def tell(order: Any) -> None:
    """From rank 0 to all that `hear`: any picklable thing; None sends them home."""
    if rank_and_size()[1] > 1 and _control:
        dist.broadcast_object_list([order], src=0, group=_control[0])


def hear() -> Any:
    """What rank 0 tells next."""
    held: list[Any] = [None]
    dist.broadcast_object_list(held, src=0, group=_control[0])
    return held[0]


def agree(figures: Sequence[float] = (), trouble: str | None = None) -> list[float]:
    """Meet: the sums of `figures` (at most three) over the processes. Raises RankError when any of them is in trouble.

    The error is raised on all of them, the one in trouble included, and names the rank.
    """
    rank, size = rank_and_size()
    if size == 1:
        if trouble is not None:
            raise RankError(trouble)
        return list(figures)
    sums = torch.zeros(FIGURES, dtype=torch.float64)
    sums[0] = float(trouble is not None)
    sums[1:1 + len(figures)] = torch.tensor(figures, dtype=torch.float64)
    dist.all_reduce(sums)
    if sums[0] > 0:
        told: list[Any] = [None] * size
        dist.all_gather_object(told, trouble)
        raise RankError("; ".join(text if number == rank else f"rank {number} of {size}: {text}"
                                  for number, text in enumerate(told) if text is not None))
    return [float(value) for value in sums[1:1 + len(figures)]]


def all_the_same(what: dict[str, Any]) -> None:
    """Raise RankError unless every process came with the same `what`."""
    if rank_and_size()[1] == 1:
        return
    found: list[Any] = [None] * rank_and_size()[1]
    dist.all_gather_object(found, what)
    for name, value in what.items():
        values = [one[name] for one in found]
        if any(one != values[0] for one in values):
            raise RankError(f"the ranks do not agree on {name}: {values}; this one has {value}; expected the same "
                            "model, data and store on all of them; a store on several machines has to be one shared "
                            "folder")


def together(step: Callable[[], T]) -> T:
    """Run a step that all ranks run. When one fails, the others fail with its reason rather than wait for it."""
    try:
        result = step()
    except RankError:
        raise
    except Exception as error:
        if rank_and_size()[1] > 1:
            with contextlib.suppress(RankError):  # the others hear of it; here the error itself goes on
                agree(trouble=f"{type(error).__name__}: {error}")
        raise
    agree()
    return result


def add_up(values: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(values)
    return values


def add_up_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients over the processes, a dtype at a time in one message.

    A parameter that no row of this process touched counts as zero; one that no process touched keeps no gradient.
    """
    if rank_and_size()[1] == 1:
        return
    every = list(parameters)
    touched = torch.tensor([float(parameter.grad is not None) for parameter in every])
    dist.all_reduce(touched)
    held: dict[torch.dtype, list[Tensor]] = {}
    for parameter, anywhere in zip(every, touched.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        held.setdefault(parameter.dtype, []).append(parameter.grad)
    for gradients in held.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

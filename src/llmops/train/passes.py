"""A forward pass: its precision, the loss over rows that are only looked at, and memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmops.models.token_loss import next_token_loss
from llmops.train.ranks import agree, rank_and_size
from llmops.train.rows import TrainingSet, to_device

__all__ = ["Loss", "autocast", "first_line", "mean_loss", "out_of_memory"]

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]  # -> the SUM of the loss over the batch


def mean_loss(model: nn.Module, rows: TrainingSet, loss: Loss = next_token_loss, *, batch_size: int = 8) -> float:
    """Loss per unit of weight (nats per trained token) over all of `rows`, without a gradient.

    Raises torch.OutOfMemoryError, on every rank, when memory runs out on one.
    """
    mode, (rank, size) = model.training, rank_and_size()
    device = next(model.parameters()).device
    total, reason = 0.0, ""
    model.eval()
    try:
        with torch.no_grad(), autocast(device):
            for at in range(0, len(rows), batch_size):
                indices = list(range(len(rows)))[at:at + batch_size][rank::size]
                if indices:
                    total += float(loss(model, to_device(rows.batch(indices), device)))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = first_line(error)
    finally:
        model.train(mode)
    ran_out, total = agree([float(bool(reason)), total])
    if ran_out:
        raise torch.OutOfMemoryError(reason or "on another rank")
    return total / max(1, sum(rows.weights))


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, nothing on a CPU. No gradient scaler: bfloat16 has the exponents of float32."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)  # type: ignore[no-any-return]
    return nullcontext()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says so, in the words of any allocator that torch goes through."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text \
        or "out of memory" in text or "not enough memory" in text or "alloc_failed" in text


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]

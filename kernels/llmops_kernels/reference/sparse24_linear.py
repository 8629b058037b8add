"""2:4 weights: how they are packed and unpacked, and the product, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CHUNK", "pack", "places_width", "unpack"]

CHUNK = 64  # groups of four columns whose places are packed together: 32 bytes


def places_width(columns: int) -> int:
    """Bytes of places in a row."""
    return -(-columns // (4 * CHUNK)) * (CHUNK // 2)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values (N, K / 2), places (N, bytes) uint8) of a dense weight (N, K) that is 2:4.

    A group with fewer than two numbers keeps its first zeros too. Raises ValueError with the first group of more.
    """
    if weight.dim() != 2 or weight.dtype not in (torch.float16, torch.bfloat16) or weight.shape[1] % 4:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; expected (N, K) float16 or bfloat16 with K "
                         f"a multiple of 4")
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, 4)
    there = groups != 0
    over = there.sum(-1) > 2
    if bool(over.any()):
        row, group = (int(i) for i in over.nonzero()[0])
        raise ValueError(f"weight is not 2:4: {int(over.sum())} of {over.numel()} groups of four columns hold more "
                         f"than two numbers, the first in row {row}, columns {4 * group} to {4 * group + 3}; prune "
                         f"it to 2:4 first")
    order = torch.arange(4, device=weight.device) + 4 * (~there).to(torch.int64)
    kept = (order.sort(-1).values[..., :2] % 4).sort(-1).values
    values = groups.gather(-1, kept).reshape(rows, columns // 2).contiguous()
    nibbles = torch.zeros(rows, places_width(columns) * 2, dtype=torch.uint8, device=weight.device)
    nibbles[:, :columns // 4] = (kept[..., 0] | kept[..., 1] << 2).to(torch.uint8)
    halves = nibbles.view(rows, -1, 2, CHUNK // 2)
    return values, (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1).contiguous()


def unpack(values: Tensor, places: Tensor) -> Tensor:
    """The dense weight (N, K)."""
    rows, groups = values.shape[0], values.shape[1] // 2
    halves = places.view(rows, -1, CHUNK // 2)
    nibbles = torch.stack([halves & 15, halves >> 4], 2).reshape(rows, -1)[:, :groups].to(torch.int64)
    made = values.new_zeros(rows, groups, 4)
    made.scatter_(-1, torch.stack([nibbles & 3, nibbles >> 2], -1), values.view(rows, groups, 2))
    return made.view(rows, groups * 4)

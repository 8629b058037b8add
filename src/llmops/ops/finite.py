"""Whether a tensor holds NaN or infinity, in one pass that allocates nothing."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["all_finite"]


def all_finite(x: Tensor) -> bool:
    """Whether every entry of x is finite.

    A sum takes a quarter of the time of least and most, and is finite only where all entries are; where it is not,
    finite ones may have overflowed, and least and most (both NaN where one entry is) decide.
    """
    x = x.detach()
    return not x.numel() or bool(x.sum().isfinite()) or bool(torch.stack(torch.aminmax(x)).isfinite().all())

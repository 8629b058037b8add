"""Round to nearest: the floor that every other quantizer has to beat.

No data: a group of weights gets a scale that makes its range fit, and each weight goes to the nearest code (the
equations are in `grid.py`). Optionally the range is searched: at 3 and 2 bits a narrower one, which clips a few
weights, leaves less squared error.

Deliberate difference from the peers: the scale is rounded to the dtype in which it will be stored *before* the codes
are computed, and the codes are computed in float32. Rounding it afterwards (bfloat16 keeps 8 bits of it) would make
the codes nearest to a grid that is not the one on disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmops.methods.quantize.grid import check, fit, grouped
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["rtn"]


def rtn(W: Tensor, *, bits: int, group_size: int = -1, symmetric: bool = True, clip: str = "absmax",
        dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Quantize `W` (out, in), floating point, to `bits` (2..8) with one scale per `group_size` columns (-1: per row).

    clip: "absmax", or "mse" for the range of least squared error of each group. dtype: in which the scale is stored,
    W's own by default. Cost: one pass over W, 36 with "mse". Raises LlmopsError when the group size does not divide the
    columns, bits are out of range, or W holds NaN or infinity.
    """
    check(W, bits)
    G = grouped(W, group_size).float()  # (out, groups, group)
    grid = fit(G, bits, symmetric, dtype or W.dtype, clip)
    return grid.weight(grid.steps(G), group_size)

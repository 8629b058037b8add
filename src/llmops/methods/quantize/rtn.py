"""Round to nearest: the floor that every other quantizer has to beat.

No data: a group of weights gets a scale that makes its range fit, and each weight goes to the nearest code (the
equations are in `grid.py`). Optionally the range is searched: at 3 and 2 bits a narrower one, which clips a few
weights, leaves less squared error.

Deliberate difference from the peers: the scale is rounded to the dtype in which it will be stored *before* the codes
are computed, and the codes are computed in float32. Rounding it afterwards (bfloat16 keeps 8 bits of it) would make
the codes nearest to a grid that is not the one on disk.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from llmops.methods.quantize.floats import FloatFormat, FloatWeight, bound
from llmops.methods.quantize.grid import Kind, check, fit, group_of, grouped
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["rtn"]


@overload
def rtn(W: Tensor, *, bits: int, group_size: int = ..., symmetric: bool = ..., clip: str = ...,
        dtype: torch.dtype | None = ...) -> QuantizedWeight: ...


@overload
def rtn(W: Tensor, *, bits: FloatFormat, group_size: int = ..., symmetric: bool = ..., clip: str = ...,
        dtype: torch.dtype | None = ...) -> FloatWeight: ...


def rtn(W: Tensor, *, bits: Kind, group_size: int = -1, symmetric: bool = True, clip: str = "absmax",
        dtype: torch.dtype | None = None) -> QuantizedWeight | FloatWeight:
    """Quantize `W` (out, in), floating point, to `bits` (2..8) with one scale per `group_size` columns (-1: per row).

    bits may be a `FloatFormat` instead (`floats.py`), which fixes its own group size.

    clip: "absmax", or "mse" for the range of least squared error of each group. dtype: in which the scale is stored,
    W's own by default. Cost: one pass over W, 5 up to 4 bits, 36 with "mse". Raises LlmopsError when the group size
    does not divide the columns, bits are out of range, or W holds NaN or infinity.
    """
    check(W, bits)
    G = grouped(W, group_of(bits, group_size)).float()  # (out, groups, group)
    grid = fit(G, bound(bits, W), symmetric, dtype or W.dtype, clip)
    return grid.weight(grid.steps(G), group_size)

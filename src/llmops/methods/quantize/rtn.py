"""Round to nearest: the floor that every other quantizer has to beat.

No data, no search: a group of weights gets the scale that makes its range fit, and each weight goes to the nearest
code.

    symmetric    s = max|W| / ((2^b - 1) / 2)                      q = clamp(round(W / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = (max(W, 0) - min(W, 0)) / (2^b - 1)           q = clamp(round(W / s) + z, ...)
                 z = clamp(round(-2^(b-1) - min(W, 0) / s), ...)

This is compressed-tensors' convention (dividing by 7.5 at 4 bits, where others divide by 7 or by a signed 8), so that
its readers find what they expect. Zero is always representable, also when no weight of the group has its sign.

Deliberate difference from the peers: the scale is rounded to the dtype in which it will be stored *before* the codes
are computed, and the codes are computed in float32. Rounding it afterwards (bfloat16 keeps 8 bits of it) would make
the codes nearest to a grid that is not the one on disk.

Left out: a search for the scale that minimises the squared error (that is another method), and g_idx.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["grouped", "rtn", "scale_and_zero"]


def rtn(W: Tensor, *, bits: int, group_size: int = -1, symmetric: bool = True) -> QuantizedWeight:
    """Quantize `W` (out, in), floating point, to `bits` (2..8) with one scale per `group_size` columns (-1: per row).

    The scale is stored in W's dtype. Cost: one pass over W. Raises LlmopsError when the group size does not divide the
    columns, bits are out of range, or W holds NaN or infinity.
    """
    if not 2 <= bits <= 8:
        raise LlmopsError(f"bits is {bits}; expected 2 to 8")
    if not bool(torch.isfinite(W).all()):
        raise LlmopsError("the weight holds NaN or infinity; expected finite values (was training stable?)")
    G = grouped(W, group_size).float()  # (out, groups, group)
    scale, zero = scale_and_zero(G, bits, symmetric, W.dtype)
    half = 1 << (bits - 1)
    codes = torch.round(G / scale.float().unsqueeze(-1))
    if zero is not None:
        codes += zero.float().unsqueeze(-1)
    codes = codes.clamp_(-half, half - 1).to(torch.int8).view(W.shape)
    return QuantizedWeight(codes, scale, zero, bits, group_size)


def grouped(W: Tensor, group_size: int) -> Tensor:
    """(out, in) -> (out, groups, group). Raises LlmopsError when the groups do not come out even."""
    rows, columns = W.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise LlmopsError(f"group_size {group_size} does not divide the {columns} input features of a layer; expected "
                          f"-1 (a whole row) or a divisor such as {_largest_divisor(columns)}")
    return W.reshape(rows, columns // size, size)


def scale_and_zero(G: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale (out, groups) in `dtype`, and zero point (out, groups) int8 or None, of grouped float32 weights G."""
    half = 1 << (bits - 1)
    low, high = G.amin(-1).clamp(max=0), G.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (span / (2 * half - 1)).to(dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)  # an all-zero group must not divide by zero
    if symmetric:
        return scale, None
    zero = torch.round(-half - low / scale.float()).clamp(-half, half - 1)
    return scale, zero.to(torch.int8)


def _largest_divisor(columns: int) -> int:
    return next((size for size in (128, 64, 32, 16, 8) if columns % size == 0), columns)

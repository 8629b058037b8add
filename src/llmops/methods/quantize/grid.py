"""The grid that a group of weights is rounded to: shared by every quantizer, so that all mean the same by a scale.

    symmetric    s = max|W| / ((2^b - 1) / 2)                      q = clamp(round(W / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = (max(W, 0) - min(W, 0)) / (2^b - 1)           q = clamp(round(W / s) + z, ...)
                 z = clamp(round(-2^(b-1) - min(W, 0) / s), ...)

This is compressed-tensors' convention (dividing by 7.5 at 4 bits, where others divide by 7 or by a signed 8), so that
its readers find what they expect. Zero is always representable, also when no weight of the group has its sign: a
pruned weight stays exactly zero under every quantizer here.

A scale is rounded to the dtype in which it will be stored *before* any code is computed with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["SHRINK", "Grid", "check", "fit", "grid_between", "grouped", "searched"]

#: Fractions of a group's range that the searched clip tries, the whole range first.
SHRINK = tuple(1 - step / 50 for step in range(36))


@dataclass(frozen=True)
class Grid:
    """scale: (out, groups) in its stored dtype; zero: (out, groups) int8, or None when symmetric; bits: 2 to 8."""

    scale: Tensor
    zero: Tensor | None
    bits: int

    def bounds(self) -> tuple[Tensor | float, Tensor | float]:
        """Smallest and largest W / s on the grid: floats, or (out, groups) when every group has its zero point."""
        half = 1 << (self.bits - 1)
        if self.zero is None:
            return float(-half), float(half - 1)
        zero = self.zero.float()
        return -half - zero, half - 1 - zero

    def steps(self, G: Tensor) -> Tensor:
        """round(G / s) within the grid, float32: the codes less their zero point. G: (out, groups, group)."""
        low, high = (bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound for bound in self.bounds())
        return torch.round(G / self.scale.float().unsqueeze(-1)).clamp(low, high)  # type: ignore[arg-type]

    def nearest(self, G: Tensor) -> Tensor:
        """The point of the grid nearest to each weight, float32. G: (out, groups, group)."""
        return self.steps(G) * self.scale.float().unsqueeze(-1)

    def weight(self, steps: Tensor, group_size: int) -> QuantizedWeight:
        """The quantized weight of `steps` (out, groups, group), as `steps()` gives them."""
        codes = steps if self.zero is None else steps + self.zero.float().unsqueeze(-1)
        return QuantizedWeight(codes.to(torch.int8).flatten(1), self.scale, self.zero, self.bits, group_size)


def check(W: Tensor, bits: int) -> None:
    """Raises LlmopsError unless bits are 2..8 and every weight is finite."""
    if not 2 <= bits <= 8:
        raise LlmopsError(f"bits is {bits}; expected 2 to 8")
    if not bool(torch.isfinite(W).all()):
        raise LlmopsError("the weight holds NaN or infinity; expected finite values (was training stable?)")


def grouped(W: Tensor, group_size: int) -> Tensor:
    """(out, in) -> (out, groups, group). Raises LlmopsError when the groups do not come out even."""
    rows, columns = W.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise LlmopsError(f"group_size {group_size} does not divide the {columns} input features of a layer; expected "
                          f"-1 (a whole row) or a divisor such as {_largest_divisor(columns)}")
    return W.reshape(rows, columns // size, size)


def fit(G: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, clip: str = "absmax",
        importance: Tensor | None = None) -> Grid:
    """The grid of G (out, groups, group), float32. clip: "absmax" (the whole range fits) or "mse" (see `searched`)."""
    if clip == "mse":
        return searched(G, bits, symmetric, dtype, importance)
    if clip != "absmax":
        raise LlmopsError(f'unknown clip "{clip}"; expected absmax or mse')
    return grid_between(G.amin(-1), G.amax(-1), bits, symmetric, dtype)


def grid_between(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid:
    """The grid over [low, high], (out, groups) float32, widened to hold zero; its scale is stored in `dtype`."""
    half = 1 << (bits - 1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    scale = (span / (2 * half - 1)).to(dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)  # an all-zero group must not divide by zero
    if symmetric:
        return Grid(scale, None, bits)
    zero = torch.round(-half - low / scale.float()).clamp(-half, half - 1)
    return Grid(scale, zero.to(torch.int8), bits)


def searched(G: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """The grid over p [min, max] whose p of `SHRINK` leaves the least squared error, chosen for every group.

    A narrower range clips the few outermost weights and rounds all others more finely. p = 1 is tried first and only a
    lower error replaces it. importance: (groups, group) or (1, 1) weights of the squared errors; all equal by default.
    Cost: len(SHRINK) passes over G.
    """
    low, high = G.amin(-1), G.amax(-1)
    best = grid_between(low, high, bits, symmetric, dtype)
    least = _error(G, best, importance)
    scale, zero = best.scale.clone(), None if best.zero is None else best.zero.clone()
    for p in SHRINK[1:]:
        tried = grid_between(low * p, high * p, bits, symmetric, dtype)
        error = _error(G, tried, importance)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, tried.scale, scale)
        if zero is not None and tried.zero is not None:
            zero = torch.where(better, tried.zero, zero)
    return Grid(scale, zero, bits)


def _error(G: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """(out, groups) sum of squared errors."""
    squared = (grid.nearest(G) - G).square_()
    return (squared if importance is None else squared.mul_(importance)).sum(-1)


def _largest_divisor(columns: int) -> int:
    return next((size for size in (128, 64, 32, 16, 8) if columns % size == 0), columns)

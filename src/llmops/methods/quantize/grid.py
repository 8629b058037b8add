"""The grid that a group of weights is rounded to: shared by every quantizer, so that all mean the same by a scale.

    symmetric    s = max|W| / ((2^b - 1) / 2)                      q = clamp(round(W / s), -2^(b-1), 2^(b-1) - 1)
    asymmetric   s = (max(W, 0) - min(W, 0)) / (2^b - 1)           q = clamp(round(W / s) + z, ...)
                 z = clamp(round(-2^(b-1) - min(W, 0) / s), ...)

Zero is always representable, also when no weight of the group has its sign: a pruned weight stays exactly zero under
every quantizer here.

A symmetric grid has one step more below zero than above: at 2 bits two against one. So at 4 bits and below every group
may have a negative scale, which turns its grid round, and may lie with its longer side on its largest weight:
s = +-max|W| / 2^(b-1), as GGUF's Q4_0 and AutoRound have it, 1/16 finer at 4 bits, 1/4 at 2. Whichever of these leaves
the least squared error is taken. Every reader multiplies code by scale, so none needs to know. Dividing by
2^(b-1) - 1 (AutoAWQ) is coarser there.

Above 4 bits a sixteenth of a step is nothing, but the largest weight still is: the first line puts it half a step
beyond the last code (or on a tie), where it errs by half a step when all others err by 0.29 on average. So s may
also be max|W| / (2^(b-1) - 1) or / 2^(b-1), which have it on a code above or below zero, whichever of the three
errs least; an asymmetric grid is widened likewise. In groups of 32 that is a sixth less squared error at 8 bits.

A scale is rounded to the dtype in which it will be stored *before* any code is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, overload

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize.floats import FloatFormat, FloatGrid, float_between
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.ops.finite import all_finite

__all__ = ["SHRINK", "TURNED", "AnyGrid", "Grid", "Kind", "both_ways", "check", "fit", "grid_between", "group_of",
           "grouped", "searched"]

#: What codes are: integers of so many bits, or floating point numbers (`floats.py`).
Kind = int | FloatFormat

#: Most bits at which the longer side of a symmetric grid counts.
TURNED = 4
#: Fractions of a group's range that the searched clip tries up to 4 bits, the whole range first.
SHRINK = tuple(1 - step / 50 for step in range(36))
#: Most that the searched clip takes off the largest code above 4 bits, in quarters of a step.
QUARTERS = 24


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
        return torch.div(G, self.scale.float().unsqueeze(-1)).round_().clamp_(low, high)  # type: ignore[arg-type]

    def nearest(self, G: Tensor) -> Tensor:
        """The point of the grid nearest to each weight, float32. G: (out, groups, group)."""
        return self.steps(G).mul_(self.scale.float().unsqueeze(-1))

    def pooled(self, error: Tensor) -> Tensor:
        """(out, groups) errors, summed over the rows that share a scale: none do."""
        return error

    def where(self, better: Tensor, other: Grid) -> Grid:
        """This grid where `better` (out, groups), `other` elsewhere."""
        zero = None if self.zero is None or other.zero is None else torch.where(better, self.zero, other.zero)
        return Grid(torch.where(better, self.scale, other.scale), zero, self.bits)

    def of(self, rows: slice) -> Grid:
        """The grid of some rows alone."""
        return Grid(self.scale[rows], None if self.zero is None else self.zero[rows], self.bits)

    def part(self, g: int) -> Grid:
        """The grid of group g alone."""
        return Grid(self.scale[:, g:g + 1], None if self.zero is None else self.zero[:, g:g + 1], self.bits)

    def joined(self, parts: list[Grid]) -> Grid:
        """The grid of all groups out of those of each."""
        zeros = [part.zero for part in parts if part.zero is not None]
        return Grid(torch.cat([part.scale for part in parts], 1), torch.cat(zeros, 1) if zeros else None, self.bits)

    def rounder(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What writes the steps of W_:j / scale (out,) of a column into a second tensor; of a grid of one group."""
        low, high = (bound[:, 0] if isinstance(bound, Tensor) else bound for bound in self.bounds())
        return lambda ratio, steps: torch.clamp(ratio, low, high, out=steps).round_()  # the bounds are whole numbers

    def weight(self, steps: Tensor, group_size: int) -> QuantizedWeight:
        """The quantized weight of `steps` (out, groups, group), as `steps()` gives them."""
        codes = steps if self.zero is None else steps + self.zero.float().unsqueeze(-1)
        return QuantizedWeight(codes.to(torch.int8).flatten(1), self.scale, self.zero, self.bits, group_size)


AnyGrid = Grid | FloatGrid


def check(W: Tensor, bits: Kind) -> None:
    """Raises LlmopsError unless bits are 2..8 (or name a float format) and every weight is finite."""
    if isinstance(bits, int) and not 2 <= bits <= 8:
        raise LlmopsError(f"bits is {bits}; expected 2 to 8")
    if not all_finite(W):
        raise LlmopsError("the weight holds NaN or infinity; expected finite values (was training stable?)")


def group_of(bits: Kind, group_size: int) -> int:
    """Columns that share a scale: what a float format fixes, else `group_size`."""
    return bits.group_size if isinstance(bits, FloatFormat) else group_size


def grouped(W: Tensor, group_size: int) -> Tensor:
    """(out, in) -> (out, groups, group). Raises LlmopsError when the groups do not come out even."""
    rows, columns = W.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or columns % size:
        raise LlmopsError(f"group_size {group_size} does not divide the {columns} input features of a layer; expected "
                          f"-1 (a whole row) or a divisor such as {_largest_divisor(columns)}")
    return W.reshape(rows, columns // size, size)


@overload
def fit(G: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, clip: str = ...,
        importance: Tensor | None = ..., quick: bool = ...) -> Grid: ...


@overload
def fit(G: Tensor, bits: Kind, symmetric: bool, dtype: torch.dtype, clip: str = ...,
        importance: Tensor | None = ..., quick: bool = ...) -> AnyGrid: ...


def fit(G: Tensor, bits: Kind, symmetric: bool, dtype: torch.dtype, clip: str = "absmax",
        importance: Tensor | None = None, quick: bool = False) -> AnyGrid:
    """The grid of G (out, groups, group), float32. clip: "absmax" (up to the largest weight) or "mse" (`searched`).

    quick: try every sixth range and then those around the best, the same way round, 10 or 11 instead of 37: at most
    0.5 % more squared error (LOG.md; a group's error may have more than one valley). Above
    4 bits every second of 25: clipping gains nothing there, but of many ranges close to the whole one some suit a group
    by chance.
    """
    if clip == "mse" and isinstance(bits, int) and bits > TURNED:
        return searched(G, bits, symmetric, dtype, importance, _near(bits, 2 if quick else 1))
    if clip == "mse":
        return (searched(G, bits, symmetric, dtype, importance, _spread(bits, symmetric), 2) if quick
                else searched(G, bits, symmetric, dtype, importance))
    if clip != "absmax":
        raise LlmopsError(f'unknown clip "{clip}"; expected absmax or mse')
    if len(_whole(bits, symmetric)) > 1:
        return searched(G, bits, symmetric, dtype, ranges=())
    return grid_between(G.amin(-1), G.amax(-1), bits, symmetric, dtype)


def _whole(bits: Kind, symmetric: bool) -> tuple[float, ...]:
    """Fractions of the range that end at the largest weight: half a step short of it, and, turned the right way, on it
    (absmax / 7.5 and / 8 at 4 bits); above 4 bits / 127.5, / 127 and / 128."""
    if not isinstance(bits, int):
        return (1.0,)
    if bits > TURNED:
        return (1.0, *(_fraction(bits, quarters) for quarters in (0, 4)))
    return (1.0, 1 - 0.5**bits) if symmetric else (1.0,)


def _near(bits: int, stride: int) -> tuple[float, ...]:
    """Fractions close to the whole range, above 4 bits."""
    return tuple(_fraction(bits, quarters) for quarters in range(0, QUARTERS + 1, stride) if quarters not in (0, 2, 4))


def _spread(bits: Kind, symmetric: bool) -> tuple[float, ...]:
    """Fractions so far apart that two to either side leave few out, from where the neighbours of `_whole` end."""
    return SHRINK[{2: 17, 3: 11, 4: 8}[bits]::6] if symmetric and isinstance(bits, int) else SHRINK[4::4]


def _fraction(bits: int, quarters: int) -> float:
    """Of the range, for a scale of max|W| / (2^(bits-1) - 1 + quarters / 4)."""
    return float((2**bits - 1) / (2**bits - 2 + quarters / 2))


@overload
def grid_between(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Grid: ...


@overload
def grid_between(low: Tensor, high: Tensor, bits: Kind, symmetric: bool, dtype: torch.dtype) -> AnyGrid: ...


def grid_between(low: Tensor, high: Tensor, bits: Kind, symmetric: bool, dtype: torch.dtype) -> AnyGrid:
    """The grid over [low, high], (out, groups) float32, widened to hold zero; its scale is stored in `dtype`."""
    if isinstance(bits, FloatFormat):
        return float_between(low, high, bits, dtype)
    half = 1 << (bits - 1)
    span = 2 * torch.maximum(-low, high) if symmetric else high.clamp(min=0) - low.clamp(max=0)
    scale = (span / (2 * half - 1)).to(dtype)
    scale = scale.masked_fill_(scale == 0, torch.finfo(dtype).eps)  # an all-zero group must not divide by zero
    if symmetric:
        return Grid(scale, None, bits)
    zero = torch.round(-half - low.clamp(max=0) / scale.float()).clamp(-half, half - 1)
    return Grid(scale, zero.to(torch.int8), bits)


def both_ways(grid: AnyGrid) -> tuple[Any, ...]:
    """The grid, and where its longer side counts (integers, symmetric, at most 4 bits) the grid turned round."""
    if isinstance(grid, Grid) and grid.zero is None and grid.bits <= TURNED:
        return grid, Grid(-grid.scale, None, grid.bits)
    return (grid,)


def searched(G: Tensor, bits: Kind, symmetric: bool, dtype: torch.dtype, importance: Tensor | None = None,
             ranges: tuple[float, ...] = SHRINK[1:], finer: int = 0) -> AnyGrid:
    """The grid over p [min, max] whose p of `ranges` or 1 leaves the least squared error, chosen for every scale.

    A narrower range clips the few outermost weights and rounds all others more finely. p = 1 is tried first and only a
    lower error replaces it. A scale that is a power of two has its neighbours tried instead. importance: weights of the
    squared errors, (groups, group) or (1, 1); all equal by default. finer: of integers, how far around the best p, in
    steps of SHRINK, a second round looks, the same way round. Cost: len(ranges) passes over G, twice as many where a
    grid can be turned round; a few rows and groups at a time, transposed: passes along the rows are twice as fast as
    along groups of 32.
    """
    if isinstance(bits, FloatFormat):
        G = G.detach().contiguous()
        return _searched_floats(G, G.amin(-1), G.amax(-1), bits, dtype, importance)
    rows, groups, size = G.shape
    beside = min(rows, max(_BESIDE, 2 * AT_ONCE // size))  # no scale hangs on another: stay within a cache
    some = max(1, 2 * AT_ONCE // (beside * size))
    scale = torch.empty(rows, groups, dtype=dtype, device=G.device)
    zero = None if symmetric else torch.empty_like(scale, dtype=torch.int8)
    for r, g in product(range(0, rows, beside), range(0, groups, some)):
        part = G[r:r + beside, g:g + some].detach().permute(1, 2, 0).contiguous()
        weights = importance[g:g + some] if importance is not None and len(importance) > 1 else importance
        found = _searched(part, bits, symmetric, dtype, weights, ranges, finer)
        scale[r:r + beside, g:g + some] = found.scale.t()
        if zero is not None and found.zero is not None:
            zero[r:r + beside, g:g + some] = found.zero.t()
    return Grid(scale, zero, bits)


AT_ONCE = 1 << 17  # numbers that `searched` tries at once
_BESIDE = 64  # fewest rows side by side, where there are as many


def _searched(G: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, importance: Tensor | None,
              ranges: tuple[float, ...], finer: int) -> Grid:
    """`searched` for G (groups, group, out); scale and zero of what it returns are (groups, out)."""
    low, high = G.amin(1), G.amax(1)
    p = torch.tensor((*_whole(bits, symmetric), *ranges), device=G.device).view(-1, 1, 1)
    grids = both_ways(grid_between(low * p, high * p, bits, symmetric, dtype))
    best, at, least = _best(G, grids, importance)
    if not finer:
        return best
    beside = torch.tensor([way * step / 50 for step in range(1, finer + 1) for way in (-1, 1)], device=G.device)
    p = (p.take(at % len(p)) + beside.view(-1, 1, 1)).clamp_(max=1)
    near = grid_between(low * p, high * p, bits, symmetric, dtype)
    if len(grids) > 1:  # it lies as the best does
        near = Grid(near.scale.copysign_(best.scale), None, bits)
    found, _, error = _best(G, (near,), importance)
    return best.where(error >= least, found)


def _best(G: Tensor, tried: tuple[Grid, ...], importance: Tensor | None) -> tuple[Grid, Tensor, Tensor]:
    """For each group the first with the least error of all that the grids `tried` hold, whose scales are (ranges,
    groups, out); its number, and that error. G: (groups, group, out).

    The second of two is the first turned round: both have the same ratios G / s, but for their sign, and differ in
    where these are clamped.
    """
    grid = tried[0]
    count, groups, rows = grid.scale.shape
    low, high = (bound.unsqueeze(-2) if isinstance(bound, Tensor) else bound for bound in grid.bounds())
    scale = torch.cat([each.scale for each in tried]) if len(tried) > 1 else grid.scale
    wide = scale.float()
    errors: list[list[Tensor]] = [[] for _ in tried]
    weights = None if importance is None or importance.numel() == 1 else importance.expand(count, groups, -1)
    for here in _parts(count, G.numel()):  # several ranges in one pass where G is small
        ratio = G / wide[here].unsqueeze(-2)  # (ranges, groups, group, out)
        rounded, squared = ratio.round(), torch.empty_like(ratio)
        weighed = weights[here].reshape(-1, 1, G.shape[1]) if weights is not None else None
        for found, end in zip(errors, ((low, high), (-high, -low)), strict=False):
            bottom, top = (each[here] if isinstance(each, Tensor) else each for each in end)
            torch.clamp(rounded, bottom, top, out=squared)
            torch.ops.aten.mse_loss.out(squared, ratio, 0, out=squared)  # (a - b)^2, each, in one pass
            found.append(squared.sum(-2) if weighed is None else torch.bmm(weighed, squared.flatten(0, 1)))
    error = torch.cat([part.view(-1, groups, rows) for found in errors for part in found]).mul_(wide.square())
    least, at = error.min(0, keepdim=True)
    zero = None if grid.zero is None else grid.zero.gather(0, at)[0]
    return Grid(scale.gather(0, at)[0], zero, grid.bits), at[0], least[0]


def _parts(count: int, numbers: int) -> list[slice]:
    """`count` passes over so many numbers, as many at a time as AT_ONCE lets and all parts alike."""
    parts = -(-count * numbers // AT_ONCE)
    every = max(1, -(-count // parts))
    return [slice(first, min(first + every, count)) for first in range(0, count, every)]


def _searched_floats(G: Tensor, low: Tensor, high: Tensor, kind: FloatFormat, dtype: torch.dtype,
                     importance: Tensor | None) -> FloatGrid:
    best = float_between(low, high, kind, dtype)
    least = best.pooled(_error(G, best, importance))
    for p in kind.ranges or SHRINK:
        tried = float_between(low * p, high * p, kind, dtype)
        error = tried.pooled(_error(G, tried, importance))
        better = error < least
        least, best = torch.where(better, error, least), tried.where(better, best)
    return best


def _error(G: Tensor, grid: AnyGrid, importance: Tensor | None) -> Tensor:
    """(out, groups) sum of squared errors, weighted."""
    squared = grid.nearest(G).sub_(G).square_()
    return squared.sum(-1) if importance is None else squared.mul_(importance).sum(-1)


def _largest_divisor(columns: int) -> int:
    return next((size for size in (128, 64, 32, 16, 8) if columns % size == 0), columns)

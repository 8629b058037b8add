"""HQQ: half-quadratic quantization, no data (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Models").

Least squares lets the few outliers of a group decide where its grid lies. HQQ asks for a small l_p "norm" of the error
instead, p < 1, which would rather leave a few large errors than many middling ones:

    min over z, s   sum_ij |W_ij - s (q_ij - z)|^p          q = clamp(round(W / s) + z)

split in two by an auxiliary error W_e that a growing beta ties to the true one, each half with a closed solution:

    W_e <- shrink(W - s (q - z)),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z   <- mean over the group of  q - (W - W_e) / s
    beta <- kappa beta

    paper   here        paper      here
    W_e     error       beta       beta
    z       zero        p, kappa   P, KAPPA

Deliberate differences: the zero point is an integer, as the stored formats have it, so z is rounded after every update
and the scale, which the paper leaves alone, takes up the rest: s <- <q - z, W - W_e> / |q - z|^2, rounded to its
stored dtype. Errors are shrunk in units of s, so that beta means the same whatever the size of the weights. Every
group keeps the best of all its iterates in the l_p norm, the plain asymmetric grid included: it is never worse than
`rtn` there. Left out: the paper's grouping along the output, which no kernel here reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize.grid import Grid, check, fit, grouped
from llmops.methods.quantize.slabs import slabs
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["P", "hqq", "lp_error"]

P = 0.7
KAPPA = 1.01


def hqq(W: Tensor, *, bits: int, group_size: int = 64, iterations: int = 20, beta: float = 10.0,
        dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Quantize `W` (out, in) asymmetrically, with the grid of least l_p error of `iterations` half-quadratic steps.

    dtype: of the stored scale, W's own by default. Cost: about 10 passes over W an iteration, some rows at a time.
    Raises LlmopsError as `rtn` does, or when iterations are negative.
    """
    check(W, bits)
    if iterations < 0:
        raise LlmopsError(f"iterations is {iterations}; expected 0 or more")
    made = [_solved(W[rows], bits, group_size, iterations, beta, dtype or W.dtype) for rows in slabs(W)]
    zeros = [each.zero_point for each in made if each.zero_point is not None]
    return QuantizedWeight(torch.cat([each.codes for each in made]), torch.cat([each.scale for each in made]),
                           torch.cat(zeros), bits, group_size)


def _solved(W: Tensor, bits: int, group_size: int, iterations: int, beta: float, dtype: torch.dtype) -> QuantizedWeight:
    """`hqq` of some rows."""
    G = grouped(W, group_size).float()
    grid = best = fit(G, bits, False, dtype)
    least = lp_error(G, grid)
    for _ in range(iterations):
        grid = _updated(G, grid, beta)
        error = lp_error(G, grid)
        better = error < least
        least = torch.where(better, error, least)
        best = _where(better, grid, best)
        beta *= KAPPA
    return best.weight(best.steps(G), group_size)


def lp_error(G: Tensor, grid: Grid) -> Tensor:
    """(out, groups) sum |W - s (q - z)|^p. G: (out, groups, group) float32."""
    return (grid.nearest(G) - G).abs_().pow_(P).sum(-1)


def _updated(G: Tensor, grid: Grid, beta: float) -> Grid:
    """One half-quadratic step: shrink the error, move the zero point, fit the scale."""
    assert grid.zero is not None
    half = 1 << (grid.bits - 1)
    scale, zero = grid.scale.float().unsqueeze(-1), grid.zero.float().unsqueeze(-1)
    steps = grid.steps(G)  # q - z
    error = G / scale - steps
    size = error.abs()
    error = error.sign() * (size - size.clamp(min=1e-12).pow(P - 1) / beta).clamp_(min=0)
    wanted = G / scale - error  # (W - W_e) / s
    codes = steps + zero
    zero = torch.round((codes - wanted).mean(-1, keepdim=True)).clamp_(-half, half - 1)
    steps = codes - zero
    power = steps.square().sum(-1)
    ratio = (steps * wanted).sum(-1) / torch.where(power == 0, torch.ones_like(power), power)
    fitted = (scale.squeeze(-1) * torch.where(ratio > 0, ratio, torch.ones_like(ratio))).to(grid.scale.dtype)
    fitted = torch.where(fitted == 0, grid.scale, fitted)
    return Grid(fitted, zero.squeeze(-1).to(torch.int8), grid.bits)


def _where(better: Tensor, new: Grid, old: Grid) -> Grid:
    assert new.zero is not None and old.zero is not None
    return Grid(torch.where(better, new.scale, old.scale), torch.where(better, new.zero, old.zero), new.bits)

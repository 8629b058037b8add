"""How much of each decoder block to prune, when all together have to lose a fixed share.

    owl          Outlier Weighed Layerwise sparsity (Yin et al. 2023, arXiv 2310.05175): a block with more outliers, the
                 entries of |W_ij| ||X_j|| above M times their mean, keeps more
                     D_i = share of outliers (eq. 2);   S_i in [S - lambda, S + lambda],   S_i falling with D_i (3.3)
    sensitivity  the divergence that pruning one block alone to each of a few sparsities does to the output, measured;
                 the sparsities that add up to the least, under the average, as an integer program (`solve`)

Both know numbers only. Deliberate differences: means are weighted by the number of weights of a block, so that the
average sparsity is that of the model also when blocks differ in size; where D is the same everywhere, so is S.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize.allocation import allocate

__all__ = ["grid_around", "outlier_share", "owl_ratios", "solve_ratios"]


def outlier_share(scores: Sequence[Tensor], factor: float = 5.0) -> float:
    """Share of a block's entries above `factor` times the mean of all of them (eq. 2). scores: of its layers, >= 0."""
    total = sum(float(S.double().sum()) for S in scores)
    count = sum(S.numel() for S in scores)
    edge = factor * total / count
    return float(sum(int((edge < S).sum()) for S in scores) / count)


def owl_ratios(shares: Sequence[float], weights: Sequence[int], sparsity: float, reach: float = 0.08) -> list[float]:
    """Sparsity of each block, within 2 `reach` of each other, `sparsity` on average. shares: outliers of each block;
    weights: how many weights each has.

    Raises LlmopsError when a block would get a sparsity outside (0, 1).
    """
    spread = max(shares) - min(shares)
    scaled = [2 * reach * (share - min(shares)) / spread if spread > 0 else 0.0 for share in shares]
    mean = sum(s * w for s, w in zip(scaled, weights, strict=True)) / sum(weights)
    found = [sparsity - (s - mean) for s in scaled]
    wrong = [each for each in found if not 0 < each < 1]
    if wrong:
        raise LlmopsError(f"a reach of {reach} around sparsity {sparsity} gives a block {wrong[0]:.3f}; expected "
                          "sparsities within 0 and 1: a smaller reach")
    return found


def grid_around(sparsity: float, reach: float, points: int = 5) -> list[float]:
    """Sparsities to measure, evenly spaced over sparsity +- reach, cut to (0, 1); the asked one is among them."""
    half = points // 2
    found = [sparsity + reach * (i - half) / half for i in range(2 * half + 1)]
    return [round(s, 6) for s in found if 0 < s < 1]


def solve_ratios(costs: Sequence[Sequence[float]], grid: Sequence[float], weights: Sequence[int],
                 sparsity: float) -> list[float]:
    """Sparsity of each block from `grid` with the least total cost, at least `sparsity` on average.

    costs: (blocks, grid). Exact (HiGHS). Raises LlmopsError when even the largest of the grid is too little.
    """
    sizes = [[w - round(s * w) for s in grid] for w in weights]  # what stays
    budget = sum(w - round(sparsity * w) for w in weights)
    if sum(min(row) for row in sizes) > budget:
        raise LlmopsError(f"sparsity {sparsity} on average cannot be had from {list(grid)}; expected larger ones too")
    choice = allocate(costs, sizes, budget)
    return [grid[c] for c in choice]

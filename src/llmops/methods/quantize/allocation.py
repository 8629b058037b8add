"""Which group of layers gets how many bits: a multiple-choice knapsack, solved exactly.

Every group g of layers (those that must share a scheme) takes one candidate c, which costs accuracy s_gc and takes
b_gc bits. Costs are taken to add up, so the best choice within a budget B is the integer program

    min  sum_gc s_gc x_gc      subject to   sum_c x_gc = 1 for every g,   sum_gc b_gc x_gc <= B,   x_gc in {0, 1}

(Sinha and Zoltners 1979; for bits of layers HAWQ-V3, Yao et al. 2021, arXiv 2011.10680, section 3.4). It is solved by
HiGHS through `scipy.optimize.milp` with no gap left open, not by a greedy walk down the ratios, which stops short
of the budget or takes the wrong one of two groups where the sizes differ. No torch here: a recipe's budget is checked
with the same sizes before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from llmops.errors import LlmopsError

__all__ = ["allocate", "smallest", "stored_bits"]

_SCALE = 1e6  # of the largest cost: HiGHS stops within an absolute 1e-6 of the optimum, which is then 1e-12 of it
Table = Sequence[Sequence[float]]
Sizes = Sequence[Sequence[int]]


def stored_bits(rows: int, columns: int, *, bits: int, group_size: int, symmetric: bool, scale_bits: int = 16) -> int:
    """Bits that a (rows, columns) weight takes on disk as `pack-quantized`: codes, scales, zero points, with the bits
    that fill up the last word of each row (none where 32 divides columns x bits)."""
    groups = 1 if group_size == -1 else -(-columns // group_size)
    zeros = 0 if symmetric else _words(rows * bits) * groups
    return rows * _words(columns * bits) + rows * groups * scale_bits + zeros


def _words(bits: int) -> int:
    return -(-bits // 32) * 32


def smallest(sizes: Sizes) -> int:
    """The smallest budget that any choice fits in."""
    return sum(min(each) for each in sizes)


def allocate(costs: Table, sizes: Sizes, budget: int) -> list[int]:
    """The candidate of each group: the least total cost within `budget`.

    costs: (groups, candidates), any finite numbers (a measured cost can be below 0); sizes: bits of each, the same
    shape, rows may differ in length. Raises LlmopsError when nothing fits, naming the smallest budget that does.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not costs or [len(row) for row in costs] != [len(row) for row in sizes] or not all(costs):
        raise LlmopsError(f"{len(costs)} rows of costs and {len(sizes)} of sizes; expected at least one group, and a "
                          "cost and a size for each candidate of each")
    if not np.isfinite([cost for row in costs for cost in row]).all():
        raise LlmopsError("a cost is NaN or infinite; expected finite numbers: did the model compute any?")
    if budget < smallest(sizes):
        raise LlmopsError(f"a budget of {budget:,} bits; expected at least {smallest(sizes):,}, what the smallest "
                          "candidates take")
    unit = gcd(*(size for row in sizes for size in row))  # small whole numbers: the solver's tolerance decides nothing
    weights = np.array([size // unit for row in sizes for size in row], dtype=float)
    flat = np.array([cost for row in costs for cost in row], dtype=float)
    owner = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    one_each = LinearConstraint((owner == np.arange(len(costs))[:, None]).astype(float), 1, 1)
    room = LinearConstraint(weights[None], -np.inf, float(budget // unit))
    scale = float(np.abs(flat).max()) or 1.0
    found = milp(flat * (_SCALE / scale), constraints=[one_each, room], integrality=np.ones(len(flat)),
                 bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0})
    if found.x is None:
        raise LlmopsError(f"the integer program of the bits was not solved ({found.message}); expected a solution: "
                          "give fewer candidates")
    firsts = np.searchsorted(owner, np.arange(len(costs)))
    return [int(np.argmax(found.x[first:first + len(row)])) for first, row in zip(firsts, costs, strict=True)]

"""The knapsack of bits against all choices, one by one."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from llmops.errors import LlmopsError
from llmops.methods.quantize import packing, rtn
from llmops.methods.quantize.allocation import allocate, smallest, stored_bits

Row = tuple[list[float], list[int]]


def best(costs: list[list[float]], sizes: list[list[int]], budget: int) -> float:
    """The least cost of all choices that fit."""
    every = itertools.product(*(range(len(row)) for row in costs))
    fit = [sum(costs[g][c] for g, c in enumerate(choice)) for choice in every
           if sum(sizes[g][c] for g, c in enumerate(choice)) <= budget]
    return min(fit)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_is_better(seed: int) -> None:
    draw = random.Random(seed)
    groups = [draw.randint(1, 4) for _ in range(draw.randint(1, 6))]
    spread = draw.choice([1.0, 1e-3, 1e3])
    costs = [[spread * draw.expovariate(1) ** 3 - (0.1 if seed % 3 == 0 else 0) for _ in range(n)] for n in groups]
    sizes = [[draw.randint(1, 40) * draw.choice([64, 96, 4096]) for _ in range(n)] for n in groups]
    low, high = smallest(sizes), sum(max(each) for each in sizes)
    for budget in (low, (low + high) // 2, low + (high - low) // 7, high, 2 * high):
        choice = allocate(costs, sizes, budget)
        assert sum(sizes[g][c] for g, c in enumerate(choice)) <= budget
        found = sum(costs[g][c] for g, c in enumerate(choice))
        assert found == pytest.approx(best(costs, sizes, budget), rel=1e-9, abs=1e-9 * spread)
        assert choice == allocate(costs, sizes, budget)


def test_a_budget_is_kept_to_the_bit_at_the_size_of_real_models() -> None:
    """Seventy thousand million bits, where a tolerance of 1e-6 would be seventy thousand of them too many."""
    draw = random.Random(1)
    sizes = [[4096 * draw.choice([4096, 14336]) * bits for bits in (2, 3, 4, 8)] for _ in range(128)]
    costs = [[draw.random() / bits ** 2 for bits in (2, 3, 4, 8)] for _ in sizes]
    exact = sum(row[draw.randrange(4)] for row in sizes)
    for budget in (exact, exact - 1):
        assert sum(row[c] for row, c in zip(sizes, allocate(costs, sizes, budget), strict=True)) <= budget


def test_more_room_never_costs_more() -> None:
    draw = random.Random(2)
    costs = [[draw.random() for _ in range(4)] for _ in range(12)]
    sizes = [[16 * draw.randint(1, 9) for _ in range(4)] for _ in range(12)]
    totals = [sum(costs[g][c] for g, c in enumerate(allocate(costs, sizes, budget)))
              for budget in range(smallest(sizes), sum(map(max, sizes)), 64)]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(LlmopsError, match="a budget of 5 bits; expected at least 6, what the smallest"):
        allocate([[1.0, 0.0], [1.0, 0.0]], [[2, 4], [4, 6]], 5)
    with pytest.raises(LlmopsError, match="a cost is NaN or infinite"):
        allocate([[float("nan")]], [[1]], 5)
    with pytest.raises(LlmopsError, match="1 rows of costs and 2 of sizes"):
        allocate([[1.0]], [[1], [1]], 5)
    with pytest.raises(LlmopsError, match="0 rows of costs"):
        allocate([], [], 5)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 32, True), (3, 32, False), (4, 64, False), (8, -1, True),
                                                          (3, -1, True)])
def test_sizes_are_those_of_the_packed_tensors(bits: int, group: int, symmetric: bool) -> None:
    for rows, columns in ((96, 192), (40, 64)):
        W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        weight = rtn(W, bits=bits, group_size=group, symmetric=symmetric)
        parts = packing.pack(weight)
        stored = sum(8 * part.numel() * part.element_size() for name, part in parts.items() if name != "weight_shape")
        assert stored == stored_bits(rows, columns, bits=bits, group_size=group, symmetric=symmetric)
        if rows == 96:  # whole words
            assert stored == pytest.approx(weight.bits_per_weight * weight.codes.numel())

"""How much of each block goes: OWL against its formula, the measured budget against every choice there is."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from llmops.errors import LlmopsError
from llmops.methods.prune.magnitude import global_threshold
from llmops.methods.prune.ratios import grid_around, outlier_share, owl_ratios, solve_ratios


def test_outliers_are_those_above_the_factor_times_the_mean_of_the_block() -> None:
    scores = [torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 40]]), torch.ones(2, 4)]
    mean = 55 / 16
    assert outlier_share(scores, 5) == pytest.approx(1 / 16)
    assert outlier_share(scores, 40 / mean) == 0  # above, not at


def test_owl_is_the_papers_formula_and_keeps_the_average() -> None:
    shares, weights = [0.01, 0.05, 0.02, 0.02], [10, 10, 30, 10]
    found = owl_ratios(shares, weights, 0.6, 0.08)
    assert sum(s * w for s, w in zip(found, weights, strict=True)) / 60 == pytest.approx(0.6)
    assert max(found) - min(found) == pytest.approx(0.16) and found.index(min(found)) == 1
    assert found[0] > found[2] == found[3] > found[1]
    equal = [1, 1, 1, 1]  # blocks of one size: S_i = 1 - D'_i + mean(D') - (1 - S), as published
    scaled = [(d - 0.01) / 0.04 * 0.16 for d in shares]
    assert owl_ratios(shares, equal, 0.6) == pytest.approx([0.6 - d + sum(scaled) / 4 for d in scaled])
    assert owl_ratios([0.1, 0.1], [1, 1], 0.5) == [0.5, 0.5]
    with pytest.raises(LlmopsError, match="a smaller reach"):
        owl_ratios([0.0, 1.0], [1, 1], 0.05, 0.2)


def test_the_measured_choice_is_the_least_of_all_choices() -> None:
    generator = torch.Generator().manual_seed(0)
    grid, weights = [0.4, 0.5, 0.6], [10, 20, 30, 40]
    costs = torch.rand(4, 3, generator=generator).cumsum(1).tolist()
    found = solve_ratios(costs, grid, weights, 0.5)

    def cost(choice: tuple[float, ...]) -> float:
        return sum(row[grid.index(s)] for row, s in zip(costs, choice, strict=True))

    fine = [choice for choice in product(grid, repeat=4)
            if sum(s * w for s, w in zip(choice, weights, strict=True)) >= 50 - 1e-9]
    assert cost(tuple(found)) == pytest.approx(min(map(cost, fine)))
    assert sum(s * w for s, w in zip(found, weights, strict=True)) >= 50 - 1e-9
    with pytest.raises(LlmopsError, match="cannot be had"):
        solve_ratios(costs, [0.1, 0.2, 0.3], weights, 0.5)
    assert 0.5 in grid_around(0.5, 0.1) and grid_around(0.05, 0.1) == [0.05, 0.1, 0.15]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_global_threshold_is_where_a_sort_of_everything_cuts(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = [(torch.randn(30, 20, generator=generator) * size).to(dtype) for size in (1e-3, 1, 40)]
    whole = torch.cat([w.abs().float().flatten() for w in layers]).sort().values
    for sparsity in (0.1, 0.5, 0.9):
        edge, ties = global_threshold(lambda: layers, sparsity)
        count = round(sparsity * 1800)
        assert edge == float(whole[count - 1]) and ties == count - int((whole < edge).sum())
    assert global_threshold(lambda: layers, 0) == (0.0, 0)
    assert global_threshold(lambda: [torch.zeros(10)], 0.5) == (0.0, 5)

"""Magnitude and Wanda masks: against brute force, exact counts, determinism with ties, and through a saved tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmops.errors import LlmopsError
from llmops.methods.prune import MASKS, STATISTICS, magnitude_mask, wanda_mask
from llmops.methods.prune.patterns import MOST_SILENCED, keep_mask, parse_pattern, silenced_rows
from llmops.recipe.pruning_checks import ALIVE


def made(rows: int = 12, columns: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator) * 10


def lowest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_wanda_matches_a_loop_over_rows(sparsity: float) -> None:
    W, x_norm = made()
    mask = wanda_mask(W, x_norm, sparsity)
    for row in range(W.shape[0]):
        scores = [abs(float(W[row, j])) * float(x_norm[j]) for j in range(W.shape[1])]
        dropped = lowest(scores, round(sparsity * W.shape[1]))
        assert {j for j in range(W.shape[1]) if not mask[row, j]} == dropped


def test_magnitude_matches_a_loop_over_the_layer() -> None:
    W, _ = made()
    dropped = lowest([abs(float(w)) for w in W.flatten()], round(0.3 * W.numel()))
    assert {i for i, keep in enumerate(magnitude_mask(W, 0.3).flatten().tolist()) if not keep} == dropped


@pytest.mark.parametrize(("pattern", "zeros", "every"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_patterns_drop_the_lowest_of_every_group(pattern: str, zeros: int, every: int) -> None:
    W, x_norm = made()
    for mask, score in ((magnitude_mask(W, zeros / every, pattern), W.abs()),
                        (wanda_mask(W, x_norm, zeros / every, pattern), W.abs() * x_norm)):
        for keep, group in zip(mask.view(-1, every).tolist(), score.view(-1, every).tolist(), strict=True):
            assert {i for i in range(every) if not keep[i]} == lowest(group, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsity_is_exact_even_when_every_score_ties(dtype: torch.dtype) -> None:
    W = torch.ones(8, 60, dtype=dtype)
    assert int((~magnitude_mask(W, 0.35)).sum()) == round(0.35 * 480)
    by_row = wanda_mask(W, torch.ones(60), 0.35)
    assert (~by_row).sum(1).tolist() == [21] * 8
    assert not by_row[0, :21].any() and by_row[0, 21:].all()  # of equals, the first go
    coarse = torch.randint(-3, 4, (64, 60), generator=torch.Generator().manual_seed(1)).to(dtype)
    assert int((~magnitude_mask(coarse, 0.5)).sum()) == coarse.numel() // 2


def test_wanda_keeps_more_of_the_output_than_magnitude_when_features_differ_in_size() -> None:
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(256, 64, generator=generator) * torch.logspace(-2, 1, 64)
    W, _ = made(seed=6)
    exact = X @ W.T

    def lost(mask: torch.Tensor) -> float:
        return float((X @ (W * mask).T - exact).norm() / exact.norm())

    assert lost(wanda_mask(W, X.norm(dim=0), 0.5)) < 0.5 * lost(magnitude_mask(W, 0.5))


def test_scaling_the_activations_changes_nothing_and_so_does_repeating_the_call() -> None:
    W, x_norm = made()
    first = wanda_mask(W, x_norm, 0.5)
    assert torch.equal(first, wanda_mask(W.clone(), x_norm * 8, 0.5))
    assert torch.equal(magnitude_mask(W, 0.5, "2:4"), magnitude_mask(W.clone(), 0.5, "2:4"))


def test_zeros_survive_saving_in_bfloat16(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    W, x_norm = made()
    mask = wanda_mask(W, x_norm, 0.5, "2:4")
    save_file({"W": (W * mask).to(torch.bfloat16)}, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["W"] != 0, mask)


def test_refuses_with_what_was_given_and_expected() -> None:
    W, x_norm = made()
    with pytest.raises(LlmopsError, match="expected 0.5, the only sparsity that 2:4"):
        magnitude_mask(W, 0.4, "2:4")
    with pytest.raises(LlmopsError, match="expected a multiple of 4"):
        keep_mask(torch.ones(2, 6), 0.5, "2:4")
    with pytest.raises(LlmopsError, match="expected unstructured, or N:M"):
        parse_pattern("4:2")
    with pytest.raises(LlmopsError, match=r"x_norm is \(63,\); expected \(64,\)"):
        wanda_mask(W, x_norm[:-1], 0.5)
    with pytest.raises(LlmopsError, match="sparsity is 1.0"):
        magnitude_mask(W, 1.0)
    with pytest.raises(LlmopsError, match="score is NaN"):
        wanda_mask(W, x_norm * float("nan"), 0.5)


def test_every_mask_names_the_statistic_it_needs() -> None:
    assert MASKS.keys() == STATISTICS.keys()
    assert MASKS["wanda"] is wanda_mask


def test_the_check_of_recipes_knows_how_many_rows_may_fall_silent() -> None:
    assert ALIVE == 1 - MOST_SILENCED
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    with pytest.raises(LlmopsError, match="rows would be zero"):
        silenced_rows(W, magnitude_mask(W, 1 - ALIVE / 128 + 1e-3))

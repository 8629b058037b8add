"""SparseGPT against Optimal Brain Surgeon solved one column and one row at a time, and what must hold for any layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from llmops.errors import LlmopsError, StepError
from llmops.methods.prune.sparsegpt import factorize, sparsegpt
from llmops.methods.prune.wanda import wanda_mask


def made(rows: int = 6, columns: int = 32, tokens: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W and H of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    X = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    X *= torch.logspace(-1, 1, columns, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), 2 / tokens * X.T @ X


def lowest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda i: (scores[i], i))[:count])


def brute_force(W: torch.Tensor, H: torch.Tensor, sparsity: float, damping: float, block: int,
                every: int = 0, zeros: int = 0) -> torch.Tensor:
    """OBS, columns from left to right: the inverse of what is left of H is computed anew for every one, in float64."""
    W, n = W.clone(), W.shape[1]
    H = H + damping * H.diagonal().mean() * torch.eye(n, dtype=H.dtype)
    costs = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(n)])
    keep = torch.ones(W.shape, dtype=torch.bool)
    for j in range(n):
        if not every and j % block == 0:
            stop = min(n, j + block)
            S = (W[:, j:stop].square() / costs[j:stop]).flatten().tolist()
            for at in lowest(S, round(sparsity * len(S))):
                keep[at // (stop - j), j + at % (stop - j)] = False
        if every and j % every == 0:
            for row in range(len(W)):
                S = (W[row, j:j + every].square() / costs[j:j + every]).tolist()
                for at in lowest(S, zeros):
                    keep[row, j + at] = False
        inverse = torch.linalg.inv(H[j:, j:])
        for row in range(len(W)):
            if not keep[row, j]:
                W[row, j:] -= W[row, j] / inverse[0, 0] * inverse[0]  # exactly zero at j
                W[row, j] = 0
    return W


def by_importance(W: torch.Tensor, H: torch.Tensor, every: int, solve: Callable[..., torch.Tensor]) -> torch.Tensor:
    """What `solve` makes of columns in groups of `every`, the group with the largest inputs first."""
    means = [float(H.diagonal()[at:at + every].mean()) for at in range(0, len(H), every)]
    places = [at * every + i for at in sorted(range(len(means)), key=lambda at: -means[at]) for i in range(every)]
    assert places != sorted(places)
    found = torch.empty_like(W)
    found[:, places] = solve(W[:, places], H[places][:, places])
    return found


@pytest.mark.parametrize(("sparsity", "block"), [(0.5, 8), (0.3, 32), (0.7, 24)])
def test_unstructured_is_obs_column_by_column(sparsity: float, block: int) -> None:
    W, H = made()
    expected = brute_force(W, H, sparsity, 0.01, block)
    found, report = sparsegpt(W, H, sparsity, block=block)
    sorted_ = by_importance(W, H, 1, partial(brute_force, sparsity=sparsity, damping=0.01, block=block))
    assert torch.equal(sparsegpt(W, H, sparsity, block=block, order="activation")[0] != 0, sorted_ != 0)
    assert torch.equal(found != 0, expected != 0) and torch.equal(report.mask, expected != 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    change = found.double() - W
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    assert report.loss == pytest.approx(float(0.5 * (change @ damped @ change.T).trace()), rel=1e-3)


@pytest.mark.parametrize(("pattern", "zeros", "every"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_patterns_are_obs_within_each_group_of_a_row(pattern: str, zeros: int, every: int) -> None:
    W, H = made(columns=40)
    solve = partial(brute_force, sparsity=zeros / every, damping=0.01, block=0, every=every, zeros=zeros)
    for order, expected in (("none", solve(W, H)), ("activation", by_importance(W, H, every, solve))):
        found, _ = sparsegpt(W, H, zeros / every, pattern, block=16, order=order)
        assert torch.equal(found != 0, expected != 0), order
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
        assert ((found.view(-1, every) == 0).sum(1) == zeros).all()


def test_layers_that_share_a_factor_get_what_they_get_alone_and_it_is_for_one_pattern() -> None:
    W, H = made(8, 64, seed=7)
    factor = factorize(H.float(), "2:4")
    for each in (W, 2 * W.flip(0)):
        shared, report = sparsegpt(each, factor, 0.5, "2:4")
        alone, other = sparsegpt(each, H.float(), 0.5, "2:4")
        assert torch.equal(shared, alone) and report.loss == other.loss and report.damping == 0.01
    with pytest.raises(LlmopsError, match="factorised for pattern 2:4; expected 4:8"):
        sparsegpt(W, factor, 0.5, "4:8")
    with pytest.raises(LlmopsError, match='order "group"'):
        factorize(H, order="group")


def test_the_largest_inputs_first_lose_less_where_inputs_differ() -> None:
    lost = {order: sum(sparsegpt(*made(32, 64, seed=seed), 0.5, "2:4", order=order)[1].loss for seed in range(8))
            for order in ("auto", "none")}
    assert lost["auto"] < 0.75 * lost["none"]


def test_what_the_layer_gives_is_nearer_than_with_wandas_mask_and_with_its_own_mask_alone() -> None:
    W, H = made(64, 128, seed=3)

    def lost(new: torch.Tensor) -> float:
        return float(((new.double() - W) @ H @ (new.double() - W).T).trace())

    found, report = sparsegpt(W, H, 0.5, damping=0.01)  # these inputs are all there are
    wanda = W * wanda_mask(W, H.diagonal().sqrt(), 0.5)
    assert lost(found) < 0.75 * lost(wanda) and lost(found) < 0.75 * lost(W * report.mask)
    assert report.mask.float().mean() == 0.5


def test_the_same_whatever_the_constant_before_h_and_however_often() -> None:
    W, H = made(8, 64, seed=4)
    first, _ = sparsegpt(W, H, 0.5, "2:4")
    again, _ = sparsegpt(W.clone(), H * 16, 0.5, "2:4")
    assert torch.equal(first, again)


def test_zeros_of_a_pruned_parent_stay_and_count() -> None:
    W, H = made(16, 64, seed=5)
    once, report = sparsegpt(W, H, 0.25)
    twice, more = sparsegpt(once, H, 0.5)
    assert (twice[~report.mask] == 0).all() and int((~more.mask).sum()) == 512
    less, _ = sparsegpt(twice, H, 0.25)
    assert (less[~more.mask] == 0).all()
    pattern, _ = sparsegpt(once, H, 0.5, "2:4")
    assert (pattern[~report.mask] == 0).all()


def test_inputs_never_seen_go_first() -> None:
    W, H = made(8, 16, seed=6)
    H[3], H[:, 3] = 0, 0
    found, report = sparsegpt(W, H, 0.1)
    assert report.dead == 1 and (found[:, 3] == 0).all()


def test_damping_is_raised_and_told_never_given_up() -> None:
    W, _ = made(4, 16)
    H = torch.ones(16, 16)
    H[0, 0] = 0.5  # indefinite: damping has to make up for it
    found, report = sparsegpt(W, H, 0.5, "2:4", damping=1e-6)
    assert report.failed and report.damping > 1e-6 and torch.isfinite(found).all()
    with pytest.raises(StepError, match="could not be factorised with damping"):
        sparsegpt(W, -torch.eye(16) + 8 * torch.eye(16).flip(0), 0.5, "2:4")


def test_zeros_survive_saving_in_bfloat16(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    W, H = made()
    found, report = sparsegpt(W, H, 0.5)
    save_file({"W": found.to(torch.bfloat16)}, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["W"] != 0, report.mask)


def test_refuses_with_what_was_given_and_expected() -> None:
    W, H = made()
    with pytest.raises(LlmopsError, match=r"H is \(31, 31\); expected \(32, 32\)"):
        sparsegpt(W, H[1:, 1:], 0.5)
    with pytest.raises(LlmopsError, match="expected finite"):
        sparsegpt(W, H * float("nan"), 0.5)
    with pytest.raises(LlmopsError, match="sparsity is 1"):
        sparsegpt(W, H, 1.0)
    with pytest.raises(LlmopsError, match="expected a multiple of 4"):
        sparsegpt(W[:, :30], H[:30, :30], 0.5, "2:4")
    W[2] *= 1e-6
    with pytest.raises(LlmopsError, match="every weight of 1 of 6 rows"):
        sparsegpt(W, H, 0.5)

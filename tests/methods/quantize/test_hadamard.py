"""Hadamard matrices of many orders, and what a randomized one does to a vector."""

from __future__ import annotations

import pytest
import torch

from llmops.errors import LlmopsError
from llmops.methods.quantize import hadamard, randomized
from llmops.methods.quantize.hadamard import orders


def test_every_order_is_what_it_says() -> None:
    made = [n for n in range(1, 300) if orders(n) is not None]
    for n in made:
        H = hadamard(n)
        assert bool((H.abs() == 1).all()) and torch.equal(H @ H.t(), n * torch.eye(n)), n
    assert {n for n in range(4, 49, 4)} <= set(made)
    assert not [n for n in made if n > 2 and n % 4], "no Hadamard matrix has such an order"
    for hidden in (576, 896, 960, 1536, 2304, 2560, 2816, 2880, 3072, 3584, 5120, 6656, 18432):
        assert orders(hidden) is not None, hidden


@pytest.mark.parametrize("n", [1, 2, 8, 128])
def test_powers_of_two_are_sylvesters(n: int) -> None:
    from scipy.linalg import hadamard as sylvester

    assert torch.equal(hadamard(n), torch.tensor(sylvester(n), dtype=torch.float32))


@pytest.mark.parametrize(("n", "block"), [(1, 1), (2, 2), (64, 64), (256, 256), (768, 768), (240, 240), (144, 144),
                                          (46, 2), (52, 4), (92, 4), (184, 8), (7, 1)])
def test_applying_is_the_dense_product(n: int, block: int) -> None:
    Q = randomized(n, 3)
    dense = torch.block_diag(*[hadamard(block) for _ in range(n // block)]).double() / block ** 0.5
    dense = Q.signs.double().unsqueeze(1) * dense
    assert Q.block == block
    torch.testing.assert_close(dense @ dense.t(), torch.eye(n, dtype=torch.float64))
    X = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Q.apply(X).double(), X.double() @ dense, rtol=1e-5, atol=1e-5)
    side_by_side = torch.cat([X, 2 * X], -1)  # two heads, each by itself
    torch.testing.assert_close(Q.apply(side_by_side), torch.cat([Q.apply(X), 2 * Q.apply(X)], -1))


def test_one_large_feature_becomes_all_alike() -> None:
    for feature in (0, 17, 767):
        x = torch.zeros(768)
        x[feature] = 100.0
        torch.testing.assert_close(randomized(768, 1).apply(x).abs(), torch.full((768,), 100 / 768 ** 0.5))


def test_signs_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = randomized(128, 7).signs
    torch.manual_seed(6)
    assert torch.equal(first, randomized(128, 7).signs) and not torch.equal(first, randomized(128, 8).signs)
    assert 40 < int((first > 0).sum()) < 88


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(LlmopsError, match="no Hadamard matrix of order 6"):
        hadamard(6)
    with pytest.raises(LlmopsError, match="size 0; expected 1 or more"):
        randomized(0, 0)
    with pytest.raises(LlmopsError, match="100 features cannot be rotated by 64"):
        randomized(64, 0).apply(torch.ones(2, 100))

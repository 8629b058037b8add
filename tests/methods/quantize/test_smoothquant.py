"""SmoothQuant: the equation, what it leaves alone, and that it helps where it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize import rtn, smooth_factors


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(W, V, X): two layers on one input, of which a few features are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(200, 96, generator=generator)
    X[:, ::19] *= 80
    return torch.randn(32, 96, generator=generator), torch.randn(48, 96, generator=generator) * 0.3, X


def test_one_half_makes_both_ranges_alike_and_the_ends_flatten_one() -> None:
    W, V, X = made()
    x, w = X.abs().amax(0), torch.cat([W, V]).abs().amax(0)
    s = smooth_factors([W, V], x, alpha=0.5)
    torch.testing.assert_close(x / s, w * s)
    torch.testing.assert_close(w * smooth_factors([W, V], x, alpha=0.0), torch.ones(96))
    torch.testing.assert_close(x / smooth_factors([W, V], x, alpha=1.0), torch.ones(96))
    torch.testing.assert_close(smooth_factors([W, V], x, alpha=0.3), x ** 0.3 / w ** 0.7)


def test_the_product_stays_and_rounds_better() -> None:
    W, _, X = made()
    s = smooth_factors([W], X.abs().amax(0))
    exact = X.double() @ W.double().t()
    torch.testing.assert_close((X / s).double() @ (W * s).double().t(), exact, rtol=1e-4, atol=1e-3)

    def rounded(X: Tensor, W: Tensor) -> Tensor:
        """Both in 8 bits: one scale a token, one a row."""
        return rtn(X, bits=8).dequantize().double() @ rtn(W, bits=8).dequantize().double().t()

    plain, smooth = ((rounded(*pair) - exact).square().mean() for pair in ((X, W), (X / s, W * s)))
    assert smooth < 0.2 * plain


def test_features_never_seen_and_empty_columns_get_a_finite_factor() -> None:
    W, _, X = made()
    x = X.abs().amax(0)
    x[3], W[:, 5] = 0, 0
    s = smooth_factors([W], x)
    assert bool(torch.isfinite(s).all()) and bool((s > 0).all()) and torch.equal(s, smooth_factors([W], x))
    other = smooth_factors([W], torch.where(x == 0, x[x > 0].min(), x))
    torch.testing.assert_close(s, other)


def test_features_that_must_share_a_factor_do() -> None:
    W, _, X = made()
    s = smooth_factors([W], X.abs().amax(0), shared=lambda s: s.view(48, 2).mean(1).repeat_interleave(2))
    assert torch.equal(s[::2], s[1::2])


@pytest.mark.parametrize(("x", "alpha", "said"), [
    (torch.ones(96), 1.5, "alpha is 1.5; expected 0"), (torch.ones(95), 0.5, r"x_absmax is \(95,\)"),
    (torch.zeros(96), 0.5, "every input of the layer is zero")])
def test_wrong_calls_are_refused(x: Tensor, alpha: float, said: str) -> None:
    with pytest.raises(LlmopsError, match=said):
        smooth_factors([made()[0]], x, alpha=alpha)
    with pytest.raises(LlmopsError, match="at least one weight"):
        smooth_factors([], torch.ones(96))

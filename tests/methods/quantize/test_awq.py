"""AWQ: its loss against the inputs themselves, never worse than rounding, and the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize import awq_clip, awq_scales, packing, rtn
from llmops.methods.quantize.awq import input_size, output_error


def made(seed: int = 0, rows: int = 48, columns: int = 128, tokens: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """(W, X, H): inputs of which a few features are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, columns, generator=generator)
    X[:, ::17] *= 30
    return torch.randn(rows, columns, generator=generator) * 0.05, X, 2 / tokens * X.t() @ X


def test_the_loss_is_the_output_error_over_the_tokens() -> None:
    W, X, H = made()
    D = rtn(W, bits=3, group_size=32).dequantize() - W
    exact = (X.double() @ D.double().t()).square().sum(0) * 2 / len(X)
    torch.testing.assert_close(output_error(D, H).double(), exact, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(input_size(H), X.square().mean(0).sqrt(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_best_exponent_is_found_and_its_loss_is_true(bits: int, symmetric: bool) -> None:
    W, X, H = made()
    other, _, _ = made(seed=5, rows=32)
    found = awq_scales([W, other], H, bits=bits, group_size=32, symmetric=symmetric)
    losses = {}
    for step in range(21):  # brute force over the same exponents, on the tokens
        s = X.square().mean(0).sqrt() ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        losses[step / 20] = sum(
            float((X.double() @ (rtn(V * s, bits=bits, group_size=32, symmetric=symmetric).dequantize() / s - V
                                 ).double().t()).square().sum()) * 2 / len(X) for V in (W, other))
    assert losses[found.alpha] <= min(losses.values()) * 1.01
    assert found.loss == pytest.approx(losses[found.alpha], rel=1e-2)  # float32 may turn a tie
    assert found.identity_loss == pytest.approx(losses[0.0], rel=1e-2)
    assert found.loss < 0.8 * found.identity_loss


def test_without_candidates_the_factors_are_one() -> None:
    W, _, H = made()
    found = awq_scales([W], H, bits=4, group_size=32, steps=0)
    assert torch.equal(found.s, torch.ones(128)) and found.alpha == 0 and found.loss == found.identity_loss


def test_equal_inputs_leave_nothing_to_scale() -> None:
    W, _, _ = made()
    found = awq_scales([W], torch.eye(128), bits=4, group_size=32)
    assert found.alpha == 0 and torch.equal(found.s, torch.ones(128))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (64, False), (-1, True)])
def test_the_clip_never_loses_a_row(bits: int, group: int, symmetric: bool) -> None:
    W, _, H = made()
    plain = output_error(rtn(W, bits=bits, group_size=group, symmetric=symmetric).dequantize() - W, H)
    clipped = output_error(awq_clip(W, H, bits=bits, group_size=group, symmetric=symmetric).dequantize() - W, H)
    assert torch.all(clipped <= plain * (1 + 1e-5))
    assert clipped.sum() < (0.9 if bits == 2 else 1.0) * plain.sum()


def test_zeros_stay_it_is_deterministic_and_stored_as_computed() -> None:
    W, _, H = made()
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    W = (W * mask).bfloat16()
    s = awq_scales([W], H, bits=3, group_size=32).s
    assert torch.equal(s, awq_scales([W.clone()], H, bits=3, group_size=32).s)
    for symmetric in (True, False):
        first, second = (awq_clip(W.float() * s, H, bits=3, group_size=32, symmetric=symmetric, dtype=torch.bfloat16)
                         for _ in range(2))
        assert torch.equal(first.codes, second.codes) and first.scale.dtype == torch.bfloat16
        assert torch.all(first.dequantize()[W == 0] == 0)
        assert torch.equal(packing.unpack(packing.pack(first), bits=3, group_size=32).dequantize(), first.dequantize())


def test_refuses_what_it_cannot_use() -> None:
    W, _, H = made()
    with pytest.raises(LlmopsError, match="every input of the layer was zero"):
        awq_scales([W], H * 0, bits=4, group_size=32)
    with pytest.raises(LlmopsError, match="weight holds NaN"):
        awq_clip(W * float("nan"), H, bits=4)
    with pytest.raises(LlmopsError, match="group_size 48 does not divide"):
        awq_scales([W], H, bits=4, group_size=48)

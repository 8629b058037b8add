"""PiSSA and LoftQ against brute force, on weights whose answer is known."""

import pytest
import torch

from llmops.errors import LlmopsError
from llmops.methods.finetune.lora import adapted_weight, lora_delta, lora_plus_scale, scaling_of
from llmops.methods.finetune.starts import best_pair, difference_pair, loftq_init, pissa_init
from llmops.models.nf4 import round_trip


def weight(seed: int = 0, shape: tuple[int, int] = (48, 64)) -> torch.Tensor:
    """A matrix whose singular values fall, as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=generator))
    V, _ = torch.linalg.qr(torch.randn(shape[1], shape[0], generator=generator))
    return U @ torch.diag(0.9 ** torch.arange(shape[0])) @ V.T


@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_pissa_is_the_best_approximation_and_loses_nothing(scaling):
    W = weight()
    A, B, residual = pissa_init(W, 6, scaling)
    torch.testing.assert_close(residual + lora_delta(A, B, scaling), W, rtol=0, atol=1e-6)
    values = torch.linalg.svdvals(W)
    assert float(residual.norm()) == pytest.approx(float(values[6:].norm()), rel=1e-4)  # Eckart and Young
    assert float(torch.linalg.matrix_norm(residual, 2)) == pytest.approx(float(values[6]), rel=1e-4)
    for seed in range(20):  # no other pair of that rank comes nearer: alternating least squares from random starts
        X = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            Y = W @ torch.linalg.pinv(X.T)
            X = (torch.linalg.pinv(Y) @ W).T
        assert float((W - Y @ X.T).norm()) >= float(residual.norm()) * (1 - 1e-5)
    torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=1e-6)  # split evenly


def test_loftq_falls_with_its_turns_and_is_below_rounding_alone():
    W = weight(1)
    def rounded(left):
        return round_trip(left, "nf4", True)

    errors = []
    for turns in (1, 2, 3, 5):
        A, B, Q, before = loftq_init(W, 6, rounded, turns, scaling=2.0)
        assert torch.equal(Q, rounded(W - lora_delta(*before, 2.0)))
        errors.append(float((W - Q - lora_delta(A, B, 2.0)).norm()))
    plain = float((W - rounded(W)).norm())  # NF4 alone, which is also where QLoRA starts: its B A is zero
    assert errors[0] < plain and errors[1] < errors[0] and errors[2] < errors[1] and errors[3] <= errors[2]
    assert errors[-1] < 0.8 * plain


def test_loftq_of_one_turn_is_the_best_pair_for_what_rounding_lost():
    W = weight(2)
    A, B, Q, before = loftq_init(W, 4, lambda left: round_trip(left, "nf4", False), 1)
    assert torch.equal(Q, round_trip(W, "nf4", False)) and not before[0].any() and not before[1].any()
    expected = best_pair(W - Q, 4, 1.0)
    torch.testing.assert_close(lora_delta(A, B, 1.0), lora_delta(*expected, 1.0))


def test_the_same_weight_starts_the_same_way():
    first, second = pissa_init(weight(3), 5, 1.0), pissa_init(weight(3), 5, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_rank_above_the_weight_is_refused():
    with pytest.raises(LlmopsError, match="given rank 49 for a weight of 48 x 64; expected at most 48"):
        pissa_init(weight(), 49, 1.0)


def test_a_difference_of_two_pairs_is_one_pair_of_twice_the_rank():
    now, start = (torch.randn(3, 7), torch.randn(5, 3)), (torch.randn(3, 7), torch.randn(5, 3))
    A, B = difference_pair(now, start)
    assert A.shape == (6, 7) and B.shape == (5, 6)
    torch.testing.assert_close(B @ A, now[1] @ now[0] - start[1] @ start[0])


def test_scales():
    assert scaling_of(16, 32.0) == 2.0 and scaling_of(16, 32.0, rslora=True) == 8.0
    scale = lora_plus_scale(16.0)
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    assert scale(f"{layer}.lora_B.default.weight") == 16.0
    assert scale(f"{layer}.lora_A.default.weight") == scale(f"{layer}.lora_magnitude_vector.default.weight") == 1.0


def test_dora_weight_has_rows_of_the_trained_length():
    W, A, B, m = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2), torch.rand(5) + 0.5
    found = adapted_weight(W, A, B, 0.5, m)
    torch.testing.assert_close(found.norm(dim=1), m)
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(found, W + 0.5 * B @ A), torch.ones(5))
    unchanged = adapted_weight(W, A, torch.zeros(5, 2), 0.5, W.norm(dim=1))
    torch.testing.assert_close(unchanged, W)

"""Jensen-Shannon and skewed divergences, against sums written out and against the formulas of other tools."""

import math

import pytest
import torch
from torch.nn import functional as F

from llmops.methods.distill import distill_loss, divergence_of, jensen_shannon, skewed_kl, skewed_reverse_kl
from llmops.methods.distill.logits import DIVERGENCES, forward_kl, reverse_kl


def log_probs(seed: int, n: int = 5, v: int = 9) -> torch.Tensor:
    return (3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(-1)


P, Q = log_probs(0), log_probs(1)


def by_hand(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """KL(a || b) row by row, in plain Python."""
    return [sum(math.exp(x) * (x - y) for x, y in zip(row, other, strict=True))
            for row, other in zip(a.tolist(), b.tolist(), strict=True)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_the_sum_written_out(share):
    m = (share * P.exp() + (1 - share) * Q.exp()).log()
    expected = [share * one + (1 - share) * other for one, other in zip(by_hand(P, m), by_hand(Q, m), strict=True)]
    assert jensen_shannon(P, Q, share).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_jensen_shannon_is_that_of_gkd_trainers(share):
    """As trainers of GKD write it: `kl_div` with the mixture as its input, the teacher weighted with beta."""
    weight = torch.tensor(share, dtype=torch.float64)
    mixture = torch.logsumexp(torch.stack([Q + torch.log1p(-weight), P + torch.log(weight)]), dim=0)
    teacher = F.kl_div(mixture, P, reduction="none", log_target=True)
    student = F.kl_div(mixture, Q, reduction="none", log_target=True)
    torch.testing.assert_close(jensen_shannon(P, Q, share), (share * teacher + (1 - share) * student).sum(-1))


def test_jensen_shannon_is_bounded_symmetric_at_a_half_and_becomes_kl_at_its_ends():
    apart_p, apart_q = torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]])
    assert float(jensen_shannon(apart_p, apart_q, 0.5)) == pytest.approx(math.log(2))
    torch.testing.assert_close(jensen_shannon(P, Q, 0.5), jensen_shannon(Q, P, 0.5))
    torch.testing.assert_close(jensen_shannon(P, Q, 1e-8) / 1e-8, forward_kl(P, Q), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(jensen_shannon(P, Q, 1 - 1e-8) / 1e-8, reverse_kl(P, Q), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_skewed_divergences_are_the_sums_written_out(share):
    toward_q = (share * P.exp() + (1 - share) * Q.exp()).log()
    toward_p = ((1 - share) * P.exp() + share * Q.exp()).log()
    assert skewed_kl(P, Q, share).tolist() == pytest.approx(by_hand(P, toward_q))
    assert skewed_reverse_kl(P, Q, share).tolist() == pytest.approx(by_hand(Q, toward_p))
    assert bool((skewed_kl(P, Q, share) <= -math.log(share)).all())


def test_a_small_skew_is_plain_kl():
    torch.testing.assert_close(skewed_kl(P, Q, 1e-9), forward_kl(P, Q), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(skewed_reverse_kl(P, Q, 1e-9), reverse_kl(P, Q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_is_least_at_the_teacher_with_no_gradient_there(name):
    say = divergence_of(name)
    student = P.clone().requires_grad_()
    loss = say(P, student.log_softmax(-1)).sum()
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12 and float(student.grad.abs().max()) < 1e-12
    assert bool((say(P, Q) > 1e-3).all())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_squared_keeps_the_gradient_of_small_logits(name):
    def gradient(temperature):
        student = (0.01 * torch.arange(12.0).view(2, 6)).requires_grad_()
        teacher = 0.01 * torch.arange(12.0).flip(0).view(2, 6)
        distill_loss(student, teacher, torch.zeros(2, dtype=torch.long), temperature=temperature,
                     divergence=divergence_of(name)).backward()
        return student.grad

    torch.testing.assert_close(gradient(1.0), gradient(10.0), rtol=0.06, atol=1e-5)


def test_shares_outside_and_names_unknown_are_refused():
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            jensen_shannon(P, Q, share)
        with pytest.raises(ValueError, match="between 0 and 1"):
            skewed_kl(P, Q, share)
    with pytest.raises(ValueError, match='did you mean "forward_kl"'):
        divergence_of("foward_kl")

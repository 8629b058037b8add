"""The teacher's likeliest tokens and the rest, in memory and as bytes."""

import math

import numpy as np
import pytest
import torch

from llmops.methods.distill import distill_loss, divergence_of, outcomes_at, top_outcomes
from llmops.methods.distill.logits import DIVERGENCES
from llmops.methods.distill.signals import bytes_per_token, decode, encode


def logits(seed: int, n: int = 6, v: int = 12) -> torch.Tensor:
    return 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed))


def test_the_rest_is_the_mass_of_all_others_written_out():
    log_p, log_q = logits(0).log_softmax(-1), logits(1).log_softmax(-1)
    ids, taught = top_outcomes(log_p, 4)
    said = outcomes_at(log_q, ids)
    for row in range(6):
        best = sorted(range(12), key=lambda token: -float(log_p[row, token]))[:4]
        assert ids[row].tolist() == best
        for whole, summed in ((log_p, taught), (log_q, said)):
            expected = [math.exp(whole[row, token]) for token in best]
            expected.append(sum(math.exp(whole[row, token]) for token in range(12) if token not in best))
            assert summed[row].exp().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_fewer_outcomes_never_tell_more_and_all_tell_everything(name):
    zeros = torch.zeros(6, dtype=torch.long)
    losses = [float(distill_loss(logits(1), logits(0), zeros, top_k=k, divergence=divergence_of(name)))
              for k in (1, 2, 4, 8, 11, 12)]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(float(distill_loss(logits(1), logits(0), zeros,
                                                          divergence=divergence_of(name))))
    assert losses[-2] == pytest.approx(losses[-1], rel=1e-5)  # 11 and the rest are all twelve


def test_a_student_that_wastes_mass_on_the_rest_is_told_so():
    # renormalized over the top 2 both would look alike; with the rest the student pays for its mass outside of them
    teacher, student = torch.tensor([[4.0, 4.0, 0.0, 0.0]]), torch.tensor([[4.0, 4.0, 3.9, 3.9]])
    ids, taught = top_outcomes(teacher.log_softmax(-1), 2)
    said = outcomes_at(student.log_softmax(-1), ids)
    renormalized = [each[:, :2].log_softmax(-1) for each in (taught, said)]
    assert float(divergence_of("forward_kl")(*renormalized)) == pytest.approx(0, abs=1e-6)
    assert float(divergence_of("forward_kl")(taught, said)) > 0.4


def test_the_gradient_of_a_rest_that_is_nearly_nothing_is_finite():
    student = torch.tensor([[60.0, 0.0, -1.0]]).requires_grad_()
    ids = torch.tensor([[0]])
    (-outcomes_at(student.log_softmax(-1), ids)[0, 1]).backward()
    assert student.grad.isfinite().all() and float(student.grad.abs().max()) == pytest.approx(1, rel=1e-3)


def test_k_that_the_vocabulary_has_not_is_refused():
    for k in (0, 13):
        with pytest.raises(ValueError, match="expected 1 to that many"):
            top_outcomes(logits(0), k)
        with pytest.raises(ValueError, match="expected 1 to that many"):
            bytes_per_token(k, 12)


# ------------------------------------------------------------------------------------------------------------ as bytes


@pytest.mark.parametrize(("k", "vocabulary"), [(32, 1536), (32, 152_064), (5, 7), (1, 2), (9, 70_000)])
def test_what_was_written_is_read_again(k, vocabulary):
    draw = torch.Generator().manual_seed(k)
    ids = torch.stack([torch.randperm(vocabulary, generator=draw)[:k] for _ in range(4)])
    log_p = (4 * torch.randn(4, k + 1, generator=draw)).log_softmax(-1)
    lines = encode(ids, log_p, vocabulary)
    assert lines.shape == (4, bytes_per_token(k, vocabulary)) and lines.dtype == np.uint8
    found, told = decode(lines, k, vocabulary)
    assert torch.equal(found, ids)
    torch.testing.assert_close(told.exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(told, log_p, rtol=2**-10, atol=2e-3)
    assert np.array_equal(lines, encode(ids, log_p, vocabulary))


def test_a_large_vocabulary_takes_fewer_than_150_bytes_a_token():
    assert bytes_per_token(32, 1536) == 32 * 11 // 8 + 66 == 110
    assert bytes_per_token(32, 152_064) == 32 * 18 // 8 + 66 == 138


def test_mass_that_is_not_there_is_written_as_hardly_any():
    _, told = decode(encode(torch.tensor([[1, 0]]), torch.tensor([[0.0, -math.inf, -math.inf]]), 2), 2, 2)
    assert told[0, 0] == 0 and told[0, 1:].tolist() == [-100, -100]


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="expected 0 to 11"):
        encode(torch.tensor([[12]]), torch.zeros(1, 2), 12)

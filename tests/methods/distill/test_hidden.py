import pytest
import torch

from llmops.errors import LlmopsError
from llmops.methods.distill import hidden_loss, uniform_pairs
from llmops.methods.distill.hidden import projections


def states(seed: int, n: int = 5, d: int = 4) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_squared_distance_relative_to_the_teachers_size_written_out():
    student, teacher = [states(0), states(1)], [states(2), 100 * states(3)]
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        distance = sum((float(s[i, j]) - float(t[i, j])) ** 2 for i in range(5) for j in range(4))
        expected += distance / sum(float(t[i, j]) ** 2 for i in range(5) for j in range(4)) / 2
    assert float(hidden_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_what_equals_its_teacher_has_no_loss_and_silence_has_one_of_one():
    assert float(hidden_loss([states(0)], [states(0)])) == 0
    assert float(hidden_loss([torch.zeros(5, 4)], [states(0)])) == pytest.approx(1)


def test_every_pair_counts_alike_whatever_its_size():
    near, far = states(0), states(1)
    small = hidden_loss([near, far], [states(2), states(3)])
    assert float(hidden_loss([near, 1e3 * far], [states(2), 1e3 * states(3)])) == pytest.approx(float(small), rel=1e-5)


@pytest.mark.parametrize(("student", "teacher", "expected"), [
    (3, 6, [1, 3, 5]), (6, 6, [0, 1, 2, 3, 4, 5]), (4, 6, [1, 2, 4, 5]), (1, 6, [5]), (3, 2, [0, 0, 1])])
def test_layers_are_matched_at_the_same_share_of_the_depth_and_last_with_last(student, teacher, expected):
    assert uniform_pairs(student, teacher) == list(enumerate(expected))


@pytest.mark.parametrize(("student", "teacher"), [([], []), ([states(0)], []), ([states(0)], [states(0, d=8)])])
def test_states_that_cannot_be_compared_are_refused(student, teacher):
    with pytest.raises(LlmopsError, match="expected pairs of one shape"):
        hidden_loss(student, teacher)


def test_no_layers_are_refused():
    with pytest.raises(LlmopsError, match="at least one each"):
        uniform_pairs(0, 6)


def test_a_projection_is_learned_where_the_widths_differ():
    student, teacher = [states(0, d=3)], [states(1, d=4)]
    (W,) = projections(1, 3, 4, seed=0)
    torch.testing.assert_close(W.T @ W, torch.eye(3), atol=1e-6, rtol=0)
    expected = float((student[0] @ W.T - teacher[0]).square().sum() / teacher[0].square().sum())
    assert float(hidden_loss(student, teacher, [W])) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(W, projections(1, 3, 4, seed=0)[0]) and not torch.equal(W, projections(1, 3, 4, seed=1)[0])


def test_a_projection_that_fits_leaves_no_loss():
    student = states(0, n=9, d=3)
    W = states(5, n=4, d=3)
    assert float(hidden_loss([student], [student @ W.T], [W])) == pytest.approx(0, abs=1e-10)

import pytest
import torch
from torch.nn import functional as F

from llmops.methods.distill import distill_loss, kl_divergence


def logits(seed: int, n: int = 7, v: int = 11) -> torch.Tensor:
    return 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_the_sum_over_the_vocabulary_written_out(direction, temperature):
    student, teacher = logits(0), logits(1)
    p, q = (teacher / temperature).softmax(-1).double(), (student / temperature).softmax(-1).double()
    if direction == "reverse_kl":
        p, q = q, p
    expected = torch.tensor([sum(p[i, j] * (p[i, j] / q[i, j]).log() for j in range(11)) for i in range(7)])
    found = kl_divergence(student, teacher, temperature=temperature, direction=direction)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient():
    student = logits(0).requires_grad_()
    loss = distill_loss(student, logits(0), torch.zeros(7, dtype=torch.long))
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5
    assert float(student.grad.abs().max()) < 1e-5


def test_temperature_squared_keeps_the_gradient_of_small_logits():
    # with logits near zero the softmax is linear, and the gradient (q - p) / T times T^2 / T stays the same
    def gradient(temperature):
        student = (0.01 * logits(0)).requires_grad_()
        distill_loss(student, 0.01 * logits(1), torch.zeros(7, dtype=torch.long), temperature=temperature).backward()
        return student.grad

    torch.testing.assert_close(gradient(1.0), gradient(10.0), rtol=0.05, atol=1e-4)


def test_hard_labels_are_mixed_in_by_their_weight():
    student, teacher, labels = logits(0), logits(1), torch.arange(7)
    soft = distill_loss(student, teacher, labels)
    mixed = distill_loss(student, teacher, labels, hard_weight=0.25)
    hard = F.cross_entropy(student, labels, reduction="sum")
    torch.testing.assert_close(mixed, 0.75 * soft + 0.25 * hard)


def test_vocabularies_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        kl_divergence(logits(0, v=11), logits(1, v=12))

"""The loss of direct preference optimization: by hand, by symmetry, by its gradient."""

import math

import pytest
import torch

from llmops.errors import StepError
from llmops.methods.finetune.dpo import LOSSES, dpo_loss, reward_margin

#: log pi and log pi_ref of chosen and rejected: u = (-3 + 4) - (-6 + 5) = 2
PAIR = [torch.tensor([value]) for value in (-3.0, -6.0, -4.0, -5.0)]


@pytest.mark.parametrize(("kind", "beta", "smoothing", "expected"), [
    ("sigmoid", 0.5, 0.0, math.log(1 + math.exp(-1.0))),
    ("sigmoid", 0.5, 0.1, 0.9 * math.log(1 + math.exp(-1.0)) + 0.1 * math.log(1 + math.exp(1.0))),
    ("hinge", 0.1, 0.0, 0.8), ("hinge", 0.5, 0.0, 0.0), ("hinge", 1.0, 0.0, 0.0),
    ("ipo", 0.1, 0.0, (2 - 5) ** 2), ("ipo", 0.25, 0.0, 0.0)])
def test_by_hand(kind, beta, smoothing, expected):
    assert float(dpo_loss(*PAIR, beta=beta, kind=kind, label_smoothing=smoothing)) == pytest.approx(expected, abs=1e-6)
    assert float(reward_margin(*PAIR, beta=beta)) == pytest.approx(2 * beta)


def test_an_undecided_pair_costs_log_two_and_swapping_its_sides_changes_the_sign_of_the_margin():
    same = torch.tensor([-2.0, -7.0])
    torch.testing.assert_close(dpo_loss(same, same - 1, same, same - 1, beta=0.3), torch.full((2,), math.log(2)))
    chosen, rejected, reference_chosen, reference_rejected = PAIR
    swapped = (rejected, chosen, reference_rejected, reference_chosen)
    assert float(reward_margin(*swapped, beta=0.5)) == -float(reward_margin(*PAIR, beta=0.5))
    forth, back = (float(dpo_loss(*sides, beta=0.5)) for sides in (PAIR, swapped))
    assert back - forth == pytest.approx(1.0)  # -log sigma(-z) + log sigma(z) = z
    half = [float(dpo_loss(*sides, beta=0.5, label_smoothing=0.499999)) for sides in (PAIR, swapped)]
    assert half[0] == pytest.approx(half[1], abs=1e-5)  # labels that are right half of the time say nothing


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_by_as_much(kind):
    sides = [value.clone().requires_grad_() for value in PAIR]
    dpo_loss(*sides, beta=0.05, kind=kind).sum().backward()
    chosen, rejected = float(sides[0].grad), float(sides[1].grad)
    assert chosen < 0 < rejected and chosen == pytest.approx(-rejected)
    if kind == "sigmoid":  # the paper's gradient: -beta sigma(-beta u)
        assert chosen == pytest.approx(-0.05 / (1 + math.exp(0.1)))
    if kind == "hinge":
        assert chosen == pytest.approx(-0.05)


def test_only_ratios_to_the_reference_count():
    moved = [PAIR[0] - 11, PAIR[1] + 5, PAIR[2] - 11, PAIR[3] + 5]
    for kind in LOSSES:
        torch.testing.assert_close(dpo_loss(*moved, beta=0.2, kind=kind), dpo_loss(*PAIR, beta=0.2, kind=kind))


def test_far_margins_stay_finite():
    far = [torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), torch.zeros(2), torch.zeros(2)]
    assert dpo_loss(*far, beta=1.0, label_smoothing=0.1).isfinite().all()


@pytest.mark.parametrize(("options", "said"), [
    ({"beta": 0.1, "kind": "sigmoyd"}, 'unknown preference loss "sigmoyd".*did you mean "sigmoid"'),
    ({"beta": 0.0}, "beta is 0; expected a number above 0"),
    ({"beta": 0.1, "label_smoothing": 0.5}, "label_smoothing is 0.5 .* below 0.5"),
    ({"beta": 0.1, "label_smoothing": 0.1, "kind": "ipo"}, "with the loss ipo; .* loss sigmoid")])
def test_what_makes_no_sense_is_refused(options, said):
    with pytest.raises(StepError, match=said):
        dpo_loss(*PAIR, **options)

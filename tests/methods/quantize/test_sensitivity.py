"""Costs of fewer bits: formulas by hand, and a model small enough for its Fisher information to be written out."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmops.methods.quantize.sensitivity import divergence, fisher_cost, shift


def test_divergence_is_the_sum_over_tokens_of_the_textbook_formula() -> None:
    p, q = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    by_hand = sum(float((a.softmax(-1) * (a.softmax(-1) / b.softmax(-1)).log()).sum())
                  for a, b in zip(p.view(-1, 7), q.view(-1, 7), strict=True))
    assert float(divergence(p, q)) == pytest.approx(by_hand, rel=1e-5)
    assert float(divergence(p, p)) == 0 and float(divergence(p, p + 3.0)) < 1e-5  # a shift of all logits is none
    assert float(divergence(p.bfloat16(), q.bfloat16())) == pytest.approx(by_hand, rel=0.02)


def test_the_fisher_cost_is_the_divergence_to_second_order() -> None:
    """Logits W x of 3 labels for two tokens: F written out over all labels, against `shift`s of every labelling."""
    draw = torch.Generator().manual_seed(3)
    W, D = torch.randn(3, 4, generator=draw), 1e-2 * torch.randn(3, 4, generator=draw)
    x = torch.randn(2, 4, generator=draw)
    p = (x @ W.t()).softmax(-1)
    shifts, chance = [], []
    for labels in itertools.product(range(3), repeat=2):  # every draw of a crop's labels, with its probability
        G = torch.zeros(3, 4)
        for t, y in enumerate(labels):
            G += torch.outer(p[t] - torch.nn.functional.one_hot(torch.tensor(y), 3), x[t])
        shifts.append(shift(G[None], D))
        chance.append(float(p[0, labels[0]] * p[1, labels[1]]))
    expected = sum(c * fisher_cost(s, 2) for s, c in zip(shifts, chance, strict=True))
    measured = float(divergence(x @ W.t(), x @ (W + D).t())) / 2
    assert expected == pytest.approx(measured, rel=0.02)


def test_errors_of_a_group_are_added_before_they_are_squared() -> None:
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])
    assert fisher_cost({"q": a, "k": b}, 8) == 0.0
    assert fisher_cost({"q": a}, 8) == fisher_cost(a, 8) == pytest.approx(5 / 16)

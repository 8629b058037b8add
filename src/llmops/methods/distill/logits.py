"""Distillation on logits (Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network").

A teacher's distribution says more than the label: which wrong answers are nearly right. The student is trained on

    L = (1 - h) * T^2 * D + h * CE           per token, summed here, divided by the trained tokens by the loop

with p = softmax(teacher / T), q = softmax(student / T) and D one of DIVERGENCES: KL(p || q) ("forward", covers all of
the teacher's mass), KL(q || p) ("reverse", seeks its main mode; Gu et al. 2023, "MiniLLM"), their mixtures
(`jsd.py`, `skewed.py`). T^2 keeps the gradient's size the same at every temperature (section 2.1 of Hinton
et al.; to second order it holds for all of them). Sum over the vocabulary, never a mean: a mean would divide by V once
more. With `top_k` the divergence is taken over the teacher's k likeliest tokens and one outcome for all the rest
(`top_k.py`).

Paper -> here: z -> student, v -> teacher, T -> temperature, h -> hard_weight. Cost: the teacher's forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llmops.errors import unknown
from llmops.methods.distill.jsd import jensen_shannon
from llmops.methods.distill.skewed import skewed_kl, skewed_reverse_kl
from llmops.methods.distill.top_k import outcomes_at, top_outcomes

__all__ = ["DIVERGENCES", "Divergence", "distill_loss", "divergence_of", "kl_divergence", "log_softmax_at", "mixed"]

Divergence = Callable[[Tensor, Tensor], Tensor]  # (log p of the teacher, log q of the student), (N, V) each -> (N,)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each token, (N,)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) of each token, (N,)."""
    return forward_kl(log_q, log_p)


#: Name in a recipe -> (function, the option that it takes as its third argument, if it takes one).
DIVERGENCES: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "forward_kl": (forward_kl, None), "reverse_kl": (reverse_kl, None), "jensen_shannon": (jensen_shannon, "beta"),
    "skewed_kl": (skewed_kl, "skew"), "skewed_reverse_kl": (skewed_reverse_kl, "skew")}


def divergence_of(name: str, *, beta: float = 0.5, skew: float = 0.1) -> Divergence:
    """The divergence that a recipe names, with its share filled in. Raises ValueError for a name that is none."""
    if name not in DIVERGENCES:
        raise ValueError(unknown("divergence", name, DIVERGENCES))
    function, option = DIVERGENCES[name]
    return function if option is None else partial(function, share={"beta": beta, "skew": skew}[option])


def log_softmax_at(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T) in float32, (N, V)."""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0,
                  direction: Literal["forward_kl", "reverse_kl"] = "forward_kl") -> Tensor:
    """KL of each token, (N,). student, teacher: logits (N, V) of the same vocabulary."""
    _check_shapes(student, teacher)
    return divergence_of(direction)(log_softmax_at(teacher, temperature), log_softmax_at(student, temperature))


def distill_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 1.0,
                 divergence: Divergence = forward_kl, top_k: int | None = None, hard_weight: float = 0.0) -> Tensor:
    """Sum over tokens of the mixed loss. student, teacher: logits (N, V); labels: (N,) token ids.

    top_k: over so many of the teacher's likeliest tokens and the rest as one; None: over all of them.
    """
    _check_shapes(student, teacher)
    log_p, log_q = log_softmax_at(teacher, temperature), log_softmax_at(student, temperature)
    if top_k is not None and top_k < log_p.shape[-1]:
        ids, log_p = top_outcomes(log_p, top_k)
        log_q = outcomes_at(log_q, ids)
    return mixed(divergence(log_p, log_q).sum() * temperature**2, student, labels, hard_weight)


def mixed(soft: Tensor, student: Tensor, labels: Tensor, hard_weight: float) -> Tensor:
    """(1 - h) soft + h CE, sums over tokens both. student: logits (N, V); labels: (N,)."""
    if hard_weight == 0:
        return soft
    hard: Tensor = F.cross_entropy(student.float(), labels, reduction="sum")
    return torch.lerp(soft, hard, hard_weight)


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ in "
                         "shape; both must be (tokens, vocabulary) of one vocabulary")

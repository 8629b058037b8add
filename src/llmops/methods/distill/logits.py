"""Distillation on logits (Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network").

A teacher's distribution says more than the label: which wrong answers are nearly right. The student is trained on

    L = (1 - h) * T^2 * KL + h * CE          per token, summed here, divided by the trained tokens by the loop

with p = softmax(teacher / T), q = softmax(student / T); KL(p || q) ("forward", covers all of the teacher's mass) or
KL(q || p) ("reverse", seeks its main mode; Gu et al. 2023, "MiniLLM"). T^2 keeps the gradient's size the same at every
temperature (section 2.1 of Hinton et al.). Sum over the vocabulary, never a mean: a mean would divide by V once more.

Paper -> here: z -> student, v -> teacher, T -> temperature, h -> hard_weight. Cost: the teacher's forward pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distill_loss", "kl_divergence"]


def kl_divergence(student: Tensor, teacher: Tensor, *, temperature: float = 1.0,
                  direction: Literal["forward_kl", "reverse_kl"] = "forward_kl") -> Tensor:
    """KL of each token, (N,). student, teacher: logits (N, V) of the same vocabulary."""
    if student.shape != teacher.shape:
        raise ValueError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ in "
                         "shape; both must be (tokens, vocabulary) of one vocabulary")
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    if direction == "reverse_kl":
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def distill_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 1.0,
                 direction: Literal["forward_kl", "reverse_kl"] = "forward_kl", hard_weight: float = 0.0) -> Tensor:
    """Sum over tokens of the mixed loss. student, teacher: logits (N, V); labels: (N,) token ids."""
    soft = kl_divergence(student, teacher, temperature=temperature, direction=direction).sum() * temperature**2
    if hard_weight == 0:
        return soft
    hard: Tensor = F.cross_entropy(student.float(), labels, reduction="sum")
    return torch.lerp(soft, hard, hard_weight)

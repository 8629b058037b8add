"""Matching attention (Wang et al. 2020, "MiniLM", eq. 6): where each token of the student looks, as its teacher does.

    A = softmax(Q K^T / sqrt(d), over the keys a query may see)
    L_attention = 1/|pairs| sum_(i, j) mean over heads and queries of KL(A_j of the teacher || A_i of the student)

Needs no projection: whatever the widths, a distribution is over the same tokens. Heads are compared one by one where
both have as many; otherwise the mean over the heads of each, for heads that were left out, or were never there, have no
counterpart. Paper -> here: A^T -> teacher, A^S -> student. Deliberate differences: every layer has a pair (`hidden.py`)
rather than the last alone, and value relations are left out: hidden states are matched by `hidden_loss`.

Cost: a matrix of length x length for every row, layer and head. Shapes: H heads, G key-value heads, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["attention_loss", "attention_map"]


def attention_map(query: Tensor, key: Tensor, scaling: float, window: int | None = None) -> Tensor:
    """(H, L, L) log-probabilities of one row, -inf where a query does not see a key. query: (H, L, d); key: (G, L, d).

    window: a query sees so many tokens, itself included; None: all before it.
    """
    scores = query.float() @ key.float().repeat_interleave(query.shape[0] // key.shape[0], 0).mT * scaling
    places = torch.arange(query.shape[1], device=query.device)
    distance = places[:, None] - places[None, :]
    unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return scores.masked_fill(unseen, float("-inf")).log_softmax(-1)


def attention_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over the pairs and the queries of the KL in nats. student, teacher: maps (H, L, L), in pairs.

    Raises LlmopsError for maps of rows of unlike length, or as many of one as not of the other.
    """
    if not student or [s.shape[1:] for s in student] != [t.shape[1:] for t in teacher]:
        raise LlmopsError(f"attention maps {[tuple(s.shape) for s in student][:3]} of the student against "
                          f"{[tuple(t.shape) for t in teacher][:3]} of the teacher; expected pairs over the same rows")
    return torch.stack([_divergence(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape[0] != teacher.shape[0]:
        student, teacher = (x.exp().mean(0, keepdim=True).clamp_min(1e-30).log() for x in (student, teacher))
    seen = teacher > float("-inf")
    difference = torch.where(seen, teacher.exp() * (teacher - student.clamp_min(-1e4)), 0.0)
    return difference.sum(-1).mean()

"""The teacher's k likeliest tokens, and one outcome for all the others.

A distribution over V tokens is summed up in k + 1 outcomes: the k tokens that the teacher thinks likeliest, each by
itself, and "something else" with the mass that is left. Nothing is thrown away and nothing is made up: renormalizing
the k over themselves (the missing mass counted as zero) would tell the student that the rest is impossible, and sharing
it out evenly would tell it of tokens that nobody has looked at. A divergence between the summed-up distributions is
never above that between the whole ones (the data processing inequality), equals it for k = V, and is 0 when they agree
on the k: what the student does within the rest is then left to the rest.

Shapes: N tokens, V vocabulary, k outcomes that have a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FLOOR", "outcomes_at", "top_outcomes"]

FLOOR = -100.0  # log of a mass that is no longer told from none


def top_outcomes(log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(ids (N, k), likeliest first; log-probabilities (N, k + 1), the last that of the rest). log_p: (N, V).

    Raises ValueError for k outside 1..V.
    """
    if not 1 <= k <= log_p.shape[-1]:
        raise ValueError(f"top_k {k} of a vocabulary of {log_p.shape[-1]}; expected 1 to that many")
    ids = log_p.topk(k, dim=-1).indices
    return ids, outcomes_at(log_p, ids)


def outcomes_at(log_p: Tensor, ids: Tensor) -> Tensor:
    """(N, k + 1): log-probabilities of the tokens `ids` (N, k), and of all others together. log_p: (N, V).

    The rest is summed over the others themselves: 1 minus the sum of the k would lose its digits, and its gradient,
    where the k have nearly all of the mass.
    """
    others = log_p.scatter(-1, ids, float("-inf"))
    rest = others.logsumexp(-1, keepdim=True) if ids.shape[-1] < log_p.shape[-1] else log_p.new_full(
        (*log_p.shape[:-1], 1), float("-inf"))
    return torch.cat([log_p.gather(-1, ids), rest], dim=-1).clamp_min(FLOOR)

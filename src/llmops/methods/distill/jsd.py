"""The generalized Jensen-Shannon divergence (Agarwal et al. 2024, "On-Policy Distillation of Language Models", eq. 2).

    JSD_b(p, q) = b KL(p || m) + (1 - b) KL(q || m)          m = b p + (1 - b) q

Bounded whatever p and q are, so a token that only one of them thinks possible cannot blow up the gradient. Divided by
b it becomes KL(p || q) as b goes to 0, and divided by 1 - b it becomes KL(q || p) as b goes to 1.

Paper -> here: p -> teacher, q -> student, beta -> share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["jensen_shannon", "log_mixture"]


def log_mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), share within (0, 1)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def jensen_shannon(log_p: Tensor, log_q: Tensor, share: float = 0.5) -> Tensor:
    """JSD of each token, (N,). log_p, log_q: (N, V) of teacher and student. Raises ValueError for a share outside
    (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"beta {share:g}; expected a share between 0 and 1, or forward_kl and reverse_kl for its ends")
    log_m = log_mixture(log_p, log_q, share)
    return share * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - share) * (log_q.exp() * (log_q - log_m)).sum(-1)

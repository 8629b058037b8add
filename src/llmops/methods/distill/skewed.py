"""Skewed Kullback-Leibler divergences (Ko et al. 2024, "DistiLLM", eq. 3 and 4; Lee 2001).

    SKL_a(p, q)  = KL(p || a p + (1 - a) q)
    SRKL_a(p, q) = KL(q || (1 - a) p + a q)

A little of the first distribution in the second keeps the ratio below 1 / a: the gradient stays small where the student
has hardly any mass yet, which is where plain KL is steepest. a = 0 is plain KL; the paper takes 0.1.

Paper -> here: p -> teacher, q_theta -> student, alpha -> share.
"""

from __future__ import annotations

from torch import Tensor

from llmops.methods.distill.jsd import log_mixture

__all__ = ["skewed_kl", "skewed_reverse_kl"]


def skewed_kl(log_p: Tensor, log_q: Tensor, share: float = 0.1) -> Tensor:
    """SKL of each token, (N,). log_p, log_q: (N, V) of teacher and student. Raises ValueError for a share outside
    (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"skew {share:g}; expected a share between 0 and 1, or forward_kl and reverse_kl for none")
    return (log_p.exp() * (log_p - log_mixture(log_p, log_q, share))).sum(-1)


def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, share: float = 0.1) -> Tensor:
    """SRKL of each token, (N,): `skewed_kl` with the two in each other's place."""
    return skewed_kl(log_q, log_p, share)

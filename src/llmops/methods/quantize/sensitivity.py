"""What it costs to give a group of layers fewer bits: two estimates of the same figure, nats a token.

Both ask by how much the next-token distribution p of the model moves when the weights w of one group become w + d, d
being the error that its quantizer leaves:

    kl        KL(p_w || p_{w+d}), measured: the group is swapped and the model is run, once a group and candidate
    gradient  1/2 d^T F d, its second-order expansion. F is the Fisher information E[grad l grad l^T] with labels drawn
              from the model itself (Amari 1998; Martens 2014, arXiv 1412.1193, section 5: the Hessian of the KL; not
              the "empirical" one with the data's labels: Kunstner et al. 2019, arXiv 1905.12558). One backward pass a
              crop serves all groups and candidates

HAWQ (Dong et al. 2019, arXiv 1905.03696) takes Hessian eigenvalues or traces for d^T H d, SqueezeLLM (Kim et al. 2023,
arXiv 2306.07629) the diagonal of F. Deliberate difference: F is never formed, nor cut to its diagonal. For one crop,
d^T grad l is one number, so 1/2 d^T F d is half the mean of its square over crops. That counts how the errors of the
weights play together, which is what GPTQ arranges for them; the price is a statistical error of sqrt(2 / crops).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["divergence", "fisher_cost", "shift"]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Sum over tokens of KL(p || q) in nats, a scalar in float32. p, q: (..., vocabulary) logits."""
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).sum()


def shift(G: Tensor, D: Tensor) -> Tensor:
    """<G, D>, (crops,) float32: by how much each crop's loss moves along the error D, to first order.

    G: (crops, out, in), the gradients of their losses by a weight; D: (out, in), what the quantizer changes of it.
    """
    return G.float().flatten(1) @ D.float().flatten()


def fisher_cost(shifts: Mapping[str, Tensor] | Tensor, tokens: int) -> float:
    """1/2 d^T F d a token, from `shift`s of the summed loss of each crop. tokens: of all crops together.

    shifts: (crops,), or several of them by layer, which are added first: the errors of a group act together.
    """
    s = shifts if isinstance(shifts, Tensor) else torch.stack(list(shifts.values())).sum(0)
    return float(s.double().square().sum() / (2 * tokens))

"""SmoothQuant: share the range of activations and weights out between the two (Xiao et al. 2022, arXiv 2211.10438).

When activations are rounded, too, a few input features that are a hundred times larger than the others take the whole
grid. Weights are even, so some of the difficulty can be moved there (section 4, eq. 4): an input feature divided by s_j
and its weight column multiplied by it is the same product, with

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

alpha = 1/2 makes both ranges alike; more takes more off the activations. The factors are folded into what makes the
input (a norm, the layer before), so nothing is left to compute at run time: see `llmops.models.fold`.

    paper   here                              paper   here
    X       only through x_absmax = max|X_j|  W       Ws, all the layers that share the input
    s       s                                 alpha   alpha

Deliberate differences: a feature that calibration never reached counts as the smallest that it did reach (or 10^-4 of
the largest, if that is more), and an empty weight column likewise, instead of one fixed floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["smooth_factors"]


def smooth_factors(Ws: Sequence[Tensor], x_absmax: Tensor, *, alpha: float = 0.5,
                   shared: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(in,) s, float32: what weight columns are multiplied by and inputs divided by.

    Ws: (out, in) each, layers that share the input; x_absmax: (in,); shared: gives features that must have one factor
    the same value, (in,) -> (in,). Raises LlmopsError when alpha is not within 0 and 1, shapes differ, or all inputs
    or all weights are zero.
    """
    if not 0 <= alpha <= 1:
        raise LlmopsError(f"alpha is {alpha}; expected 0 (all in the activations) to 1 (all in the weights)")
    if any(W.shape[1] != len(x_absmax) for W in Ws) or not Ws:
        raise LlmopsError(f"x_absmax is {tuple(x_absmax.shape)}, weights are {[tuple(W.shape) for W in Ws]}; expected "
                          "at least one weight, with one column for each feature")
    w = torch.stack([W.detach().abs().amax(0).float() for W in Ws]).amax(0)
    s = _floored(x_absmax.float(), "input").pow(alpha) / _floored(w, "weight").pow(1 - alpha)
    return s if shared is None else shared(s)


def _floored(size: Tensor, what: str) -> Tensor:
    """(in,) positive: a feature of size zero counts as the smallest that is not."""
    if not bool((size > 0).any()):
        raise LlmopsError(f"every {what} of the layer is zero; expected calibration data that reaches it, and weights")
    return size.clamp(min=max(float(size[size > 0].min()), 1e-4 * float(size.max())))

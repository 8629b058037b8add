"""Magnitude pruning: small weights matter least (Han et al. 2015, "Learning both Weights and Connections").

The score is |W|, compared over the whole layer, so rows with small weights may lose more than others. It needs no data,
and on language models it is a weak baseline at 50% and beyond: a small weight on a large activation is not small.
"""

from __future__ import annotations

from torch import Tensor

from llmops.methods.prune.patterns import keep_mask

__all__ = ["magnitude_mask"]


def magnitude_mask(W: Tensor, sparsity: float, pattern: str = "unstructured") -> Tensor:
    """Keep-mask (out, in) by S_ij = |W_ij|, compared within the layer (within M neighbours for an N:M pattern).

    Exactly round(sparsity * out * in) entries are False; ties go by position. Cost: one sort of the layer.
    Raises LlmopsError as `keep_mask` does.
    """
    S = W.abs()
    if pattern == "unstructured":
        return keep_mask(S.reshape(1, -1), sparsity).view(W.shape)
    return keep_mask(S, sparsity, pattern)

"""Magnitude pruning: small weights matter least (Han et al. 2015, "Learning both Weights and Connections").

The score is |W|. Compared over one layer, rows with small weights lose more than others; compared over the whole model
("global"), whole layers of small weights may lose nearly everything. It needs no data, and on language models it is a
weak baseline at 50% and beyond: a small weight on a large activation is not small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.prune.patterns import keep_mask

__all__ = ["global_threshold", "magnitude_mask"]

_LOW = 16  # bits of a float32 that the second round looks at


def magnitude_mask(W: Tensor, sparsity: float, pattern: str = "unstructured") -> Tensor:
    """Keep-mask (out, in) by S_ij = |W_ij|, compared within the layer (within M neighbours for an N:M pattern).

    Exactly round(sparsity * out * in) entries are False; ties go by position. Cost: one selection in the layer.
    Raises LlmopsError as `keep_mask` does.
    """
    S = W.abs()
    if pattern == "unstructured":
        return keep_mask(S.reshape(1, -1), sparsity).view(W.shape)
    return keep_mask(S, sparsity, pattern)


def global_threshold(weights: Callable[[], Iterable[Tensor]], sparsity: float) -> tuple[float, int]:
    """(t, ties): of all weights together, those with |w| < t are dropped and of those with |w| = t the first `ties`, so
    that exactly round(sparsity * n) go.

    weights: gives all of them each time it is called. The k-th smallest is found by the bits of float32, which for
    numbers >= 0 are ordered as the numbers are: a histogram of the upper 16, then one of the lower 16 below the right
    upper ones. Memory: 2^16 counters and one layer, whatever the model's size. Raises LlmopsError for a sparsity
    outside [0, 1) or a NaN.
    """
    if not 0 <= sparsity < 1:
        raise LlmopsError(f"sparsity is {sparsity}; expected at least 0 and less than 1")

    def counted(upper: int | None) -> Tensor:
        found = torch.zeros(1 << _LOW, dtype=torch.int64)
        for weight in weights():
            size = weight.detach().abs().float().flatten()
            if bool(torch.isnan(size).any()):
                raise LlmopsError("a weight is NaN; expected finite weights")
            bits = size.view(torch.int32)
            part = bits >> _LOW if upper is None else bits[bits >> _LOW == upper] & (1 << _LOW) - 1
            found += torch.bincount(part, minlength=1 << _LOW).cpu()
        return found

    first = counted(None)
    count = round(sparsity * int(first.sum()))
    if count == 0:
        return 0.0, 0
    before, upper = _place(first, count)
    second = counted(upper)
    below, lower = _place(second, count - before)
    value = torch.tensor([upper << _LOW | lower], dtype=torch.int32).view(torch.float32)
    return float(value), count - before - below


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """(how many lie in the bins before, bin) of the `rank`-th smallest, from 1."""
    bin_ = int(torch.searchsorted(counts.cumsum(0), rank))
    return int(counts[:bin_].sum()), bin_

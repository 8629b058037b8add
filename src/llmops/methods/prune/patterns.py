"""From scores to keep-masks of exactly the wanted sparsity, whatever the ties.

A threshold (`score > sorted[k]`) is the usual way and is wrong as soon as two scores are equal, which in bfloat16 is
always: too many or too few weights go. Here scores are ranked by a stable sort instead, so exactly `round(sparsity *
n)` entries are dropped, and of equals the one that stands first.

N:M patterns (2:4, 4:8) drop exactly N of every M neighbours along the input, so a sparsity of N/M is the only one that
they can have. The zeros are stored as zeros: only a runtime with a kernel for the pattern turns them into speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["keep_mask", "parse_pattern"]


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """`"2:4"` -> (2, 4), zeros of every M; `"unstructured"` -> None. Raises LlmopsError on anything else."""
    if pattern == "unstructured":
        return None
    parts = pattern.split(":")
    if len(parts) == 2 and all(part.isdigit() for part in parts) and 0 < int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise LlmopsError(f'unknown pattern "{pattern}"; expected unstructured, or N:M such as 2:4 (N zeros of every M)')


def keep_mask(S: Tensor, sparsity: float, pattern: str = "unstructured") -> Tensor:
    """True where a weight stays. S: (rows, n) scores; each row is ranked by itself.

    Drops the `round(sparsity * n)` lowest of a row, or N of every M with a pattern. Raises LlmopsError when sparsity is
    outside [0, 1), contradicts the pattern, M does not divide n, or a score is NaN.
    """
    if not 0 <= sparsity < 1:
        raise LlmopsError(f"sparsity is {sparsity}; expected at least 0 and less than 1")
    if bool(torch.isnan(S).any()):
        raise LlmopsError("a pruning score is NaN; expected finite weights and activations")
    rows, n = S.shape
    shape = parse_pattern(pattern)
    if shape is None:
        return _drop_lowest(S, round(sparsity * n))
    zeros, every = shape
    if abs(sparsity - zeros / every) > 1e-6:
        raise LlmopsError(f"sparsity {sparsity} with pattern {pattern}; expected {zeros / every}, the only sparsity "
                          f"that {pattern} can have")
    if n % every:
        raise LlmopsError(f"pattern {pattern} does not fit {n} input features; expected a multiple of {every}")
    return _drop_lowest(S.reshape(rows * n // every, every), zeros).view(rows, n)


def _drop_lowest(S: Tensor, count: int) -> Tensor:
    mask = torch.ones(S.shape, dtype=torch.bool, device=S.device)
    order = torch.sort(S, dim=1, stable=True).indices[:, :count]
    return mask.scatter_(1, order, False)

"""From scores to keep-masks of exactly the wanted sparsity, whatever the ties.

A threshold (`score > sorted[k]`) is the usual way and is wrong as soon as two scores are equal, which in bfloat16 is
always: too many or too few weights go. Here exactly `round(sparsity * n)` entries are dropped, and of equals the one
that stands first: the k-th smallest score is selected (no sort), and ties with it are counted off.

N:M patterns (2:4, 4:8) drop exactly N of every M neighbours along the input, so a sparsity of N/M is the only one that
they can have. The zeros are stored as zeros: only a runtime with a kernel for the pattern turns them into speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["MOST_SILENCED", "check_sparsity", "drop_lowest", "keep_mask", "parse_pattern", "silenced_rows"]

MOST_SILENCED = 0.1  # of a layer's rows, those that scores compared across rows may leave without a weight


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """`"2:4"` -> (2, 4), zeros of every M; `"unstructured"` -> None. Raises LlmopsError on anything else."""
    if pattern == "unstructured":
        return None
    parts = pattern.split(":")
    if len(parts) == 2 and all(part.isdigit() for part in parts) and 0 < int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise LlmopsError(f'unknown pattern "{pattern}"; expected unstructured, or N:M such as 2:4 (N zeros of every M)')


def check_sparsity(sparsity: float, pattern: str, features: int) -> tuple[int, int] | None:
    """The pattern as (N, M), None for unstructured. features: inputs of the layer.

    Raises LlmopsError when sparsity is outside [0, 1), contradicts the pattern, or M does not divide the inputs.
    """
    if not 0 <= sparsity < 1:
        raise LlmopsError(f"sparsity is {sparsity}; expected at least 0 and less than 1")
    shape = parse_pattern(pattern)
    if shape is None:
        return None
    zeros, every = shape
    if abs(sparsity - zeros / every) > 1e-6:
        raise LlmopsError(f"sparsity {sparsity} with pattern {pattern}; expected {zeros / every}, the only sparsity "
                          f"that {pattern} can have")
    if features % every:
        raise LlmopsError(f"pattern {pattern} does not fit {features} input features; expected a multiple of {every}")
    return shape


def keep_mask(S: Tensor, sparsity: float, pattern: str = "unstructured") -> Tensor:
    """True where a weight stays. S: (rows, n) scores; each row is ranked by itself.

    Drops the `round(sparsity * n)` lowest of a row, or N of every M with a pattern. Raises LlmopsError as
    `check_sparsity` does, or when a score is NaN.
    """
    shape = check_sparsity(sparsity, pattern, S.shape[1])
    if bool(torch.isnan(S).any()):
        raise LlmopsError("a pruning score is NaN; expected finite weights and activations")
    rows, n = S.shape
    if shape is None:
        return drop_lowest(S, round(sparsity * n))
    zeros, every = shape
    return drop_lowest(S.reshape(rows * n // every, every), zeros).reshape(rows, n)


def drop_lowest(S: Tensor, count: int) -> Tensor:
    """(rows, n) bool, False at the `count` lowest of each row, of equals the first ones. Cost: one selection a row."""
    rows, n = S.shape
    if count <= 0:
        return torch.ones_like(S, dtype=torch.bool)
    if n <= 8:
        return _ranks(S) >= count
    wide = S if S.dtype == torch.float32 else S.float()
    edge = _smallest(wide, count)
    keep, ties = wide > edge, wide == edge
    spare = (n - count) - torch.count_nonzero(keep, dim=1).unsqueeze(1)  # of the ties, so many stay: the last ones
    several = (spare > 0).squeeze(1)
    if bool(several.any()):
        some = ties[several]
        place = some.flip(1).cumsum(1).flip(1)  # 1 at the last tie of a row
        keep[several] |= some & (place <= spare[several])
    return keep


def _smallest(S: Tensor, count: int) -> Tensor:
    """(rows, 1): the `count`-th smallest of each row, from 1."""
    if S.device.type != "cpu":
        return torch.kthvalue(S, count, dim=1, keepdim=True).values
    import numpy as np  # whose selection is vectorized; torch's own is twenty times slower on a CPU

    found = np.partition(S.detach().numpy(), count - 1, axis=1)[:, count - 1:count]
    return torch.from_numpy(found.copy())


def _ranks(S: Tensor) -> Tensor:
    """The place of each entry in its row, from 0, of equals the first before: pair by pair, for short rows."""
    columns = S.t().contiguous()
    rank = torch.zeros(columns.shape, dtype=torch.int8, device=S.device)
    for j in range(1, len(columns)):
        for i in range(j):
            later = columns[i] > columns[j]
            rank[i] += later
            rank[j] += ~later
    return rank.t()


def silenced_rows(W: Tensor, mask: Tensor, most: float = MOST_SILENCED) -> int:
    """How many rows that had weights would keep none: outputs lost for all inputs. W, mask: (out, in).

    Where scores are compared across rows, a few rows of tiny weights may go whole, and that is told; raises LlmopsError
    when more than `most` of the rows would.
    """
    some = W != 0
    silent = ~(some & mask).any(1)
    if not bool(silent.any()):
        return 0
    dead = some.any(1) & silent
    count = int(dead.sum())
    if count > most * len(dead):
        raise LlmopsError(f"every weight of {count} of {len(dead)} rows would be zero (row {int(dead.nonzero()[0])} "
                          "first), which silences those outputs; expected a mask that leaves some of every row: a "
                          "lower sparsity, wanda, which compares within each row, or the layer in ignore")
    return count

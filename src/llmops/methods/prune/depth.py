"""Depth pruning: leave whole decoder layers out, and get an ordinary smaller model.

Which ones? Evenly spaced layers with the first and the last kept (the choice of DistilBERT and of most students), or
the layers that change their input most: block influence (Men et al. 2024, "ShortGPT", eq. 1)

    BI_i = 1 - E_t [ <x_t, y_t> / (|x_t| |y_t|) ]        x, y: hidden states of token t before and after layer i

A layer with a small BI turns its input by little, so the residual stream survives without it. Or those without which
the loss on calibration data rises most (perplexity drop: Kim et al. 2024, "Shortened LLaMA", arXiv 2402.02834). Either
score can be taken of a whole run of neighbours instead (Gromov et al. 2024, arXiv 2403.17887: x before the first, y
after the last of them), and again after some have gone: neighbours that do the same are then told apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["block_influence", "even_layers", "in_rounds", "influential_layers", "least_run"]


def even_layers(total: int, keep: int) -> list[int]:
    """`keep` of `total` layers, evenly spaced, first and last among them (the first alone when keep is 1).

    Raises LlmopsError unless 1 <= keep <= total.
    """
    _check_count(total, keep)
    if keep == 1:
        return [0]
    # floor(i * (total-1) / (keep-1) + 1/2) in integers: float rounding to even would name a layer twice.
    return [(2 * i * (total - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def block_influence(x_in: Tensor, x_out: Tensor) -> float:
    """1 - mean cosine between a block's input and output. Both (..., hidden); in [0, 2], 0 when the block does nothing.

    A token whose hidden state is zero before or after counts as fully changed (cosine 0).
    """
    x, y = x_in.double().flatten(0, -2), x_out.double().flatten(0, -2)
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    cosine = torch.where(norms > 0, (x * y).sum(-1) / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return float(1.0 - cosine.mean())


def influential_layers(influence: Sequence[float], keep: int) -> list[int]:
    """The `keep` layers with the highest block influence, ascending; among equals the earlier one stays.

    Raises LlmopsError unless 1 <= keep <= len(influence).
    """
    _check_count(len(influence), keep)
    ranked = sorted(range(len(influence)), key=lambda i: (-influence[i], i))
    return sorted(ranked[:keep])


def least_run(scores: Sequence[float], drop: int) -> list[int]:
    """The layers that stay when the run of `drop` neighbours with the least score goes; among equals the later one.

    scores: of the run that begins at each layer, total - drop + 1 of them.
    """
    total = len(scores) + drop - 1
    first = min(range(len(scores)), key=lambda i: (scores[i], -i))
    return [i for i in range(total) if not first <= i < first + drop]


def in_rounds(total: int, keep: int, rounds: int) -> list[int]:
    """How many of `total` layers are left after each round, the last being `keep`; rounds that drop none are left out.

    Raises LlmopsError unless 1 <= keep <= total.
    """
    _check_count(total, keep)
    left = [total - round((total - keep) * (i + 1) / rounds) for i in range(rounds)]
    return [n for i, n in enumerate(left) if n < ([total, *left][i])] or [keep]


def _check_count(total: int, keep: int) -> None:
    if not 1 <= keep <= total:
        raise LlmopsError(f"{keep} layers to keep of a model with {total}; expected 1 to {total}")

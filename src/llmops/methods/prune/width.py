"""Width pruning: which features, channels and heads of a layer stay (Muralidharan et al. 2024, "Compact Language Models
via Pruning and Knowledge Distillation", Minitron, arXiv 2407.14679, section 2.2).

Importance is the size of activations over calibration data, summed over tokens and crops:

    FFN channel i    F = | act(x W_1)_i |                          what the down projection reads
    head i           F = || Attn(x W_Q^i, x W_K^i, x W_V^i) ||_2    what the output projection reads of it
    feature i        F = | norm(x)_i |, over all norms              the residual stream has no layer of its own

Within a crop the mean over tokens is taken, over crops the L2 norm or the mean (their best: mean, then L2). A KV group
is as important as its heads together; every group that stays keeps the same number of heads, the most important ones,
so that the result is an ordinary grouped-query model. Here are the choices, on numbers alone; activations are gathered
in `llmops.importance`, weights cut in `llmops.models.narrow`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["aggregate", "keep_channels", "keep_heads", "widths_in_rounds"]


def aggregate(sizes: Sequence[Tensor], how: str) -> Tensor:
    """(n,) importance. sizes: (crops, n), mean sizes within each crop, batch by batch; how: "l2" or "mean"."""
    whole = torch.cat([each.double() for each in sizes])
    return (whole.square().sum(0).sqrt() if how == "l2" else whole.mean(0)).float()


def keep_channels(importance: Tensor, count: int) -> Tensor:
    """The `count` most important channels, ascending; among equals the earlier one. Raises LlmopsError unless there
    are as many."""
    if not 1 <= count <= len(importance):
        raise LlmopsError(f"{count} channels to keep of {len(importance)}; expected 1 to {len(importance)}")
    if bool(torch.isnan(importance).any()):
        raise LlmopsError("an importance is NaN; expected finite activations")
    return torch.sort(importance, descending=True, stable=True).indices[:count].sort().values


def keep_heads(importance: Tensor, groups: int, heads: int, kv_heads: int) -> tuple[list[int], list[int]]:
    """(query heads, KV heads) that stay, each ascending. importance: (query heads,), those of a group side by side.

    groups: KV heads there are; heads, kv_heads: how many to keep. Raises LlmopsError unless kv_heads divides heads, and
    both are there to be kept.
    """
    total = len(importance)
    per_group, wanted = total // groups, heads // max(1, kv_heads)
    if not 1 <= kv_heads <= groups or heads % kv_heads or not 1 <= wanted <= per_group:
        raise LlmopsError(f"{heads} heads in {kv_heads} KV groups to keep, of {total} in {groups}; expected 1 to "
                          f"{groups} groups, each with the same number of heads, 1 to {per_group}")
    grouped = importance.view(groups, per_group)
    best = grouped.sort(dim=1, descending=True, stable=True).indices[:, :wanted]
    kept_groups = keep_channels(grouped.sum(1), kv_heads).tolist()
    kept = [group * per_group + head for group in kept_groups for head in sorted(best[group].tolist())]
    return kept, kept_groups


def widths_in_rounds(full: int, target: int, rounds: int, multiple: int) -> list[int]:
    """The width after each round, falling by the same factor, rounded to `multiple`; the last is `target`."""
    found = []
    for i in range(1, rounds):
        width = round(full * (target / full) ** (i / rounds) / multiple) * multiple
        found.append(min(full, max(target, width)))
    return [*found, target]

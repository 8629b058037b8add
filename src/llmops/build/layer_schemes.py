"""What each layer is rounded to, as the keyword arguments that every solver takes: bits, group size, zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmops.errors import LlmopsError
from llmops.methods.quantize.floats import FLOATS
from llmops.methods.quantize.grid import Kind, group_of, grouped
from llmops.methods.quantize.options import WeightOnly
from llmops.models.schemes import LayerScheme, fused_groups

__all__ = ["Chosen", "check_groups", "kind_of", "scheme", "shared"]

Chosen = Mapping[str, LayerScheme] | None  # a scheme for each layer, in place of the one that the options name


def scheme(options: WeightOnly, chosen: Chosen, name: str) -> dict[str, Any]:
    """The keyword arguments that tell a solver the scheme of a layer."""
    if chosen is None:
        bits, group_size = kind_of(options)
        return {"bits": bits, "group_size": group_size, "symmetric": options.symmetric}
    one = chosen[name]
    return {"bits": one.bits, "group_size": one.group_size, "symmetric": one.symmetric}


def shared(options: WeightOnly, layers: Mapping[str, nn.Linear]) -> dict[str, dict[str, Any]]:
    """For formats with a scale of the whole weight: the same scale for q, k and v, and for gate and up, as a keyword
    argument for the solver. Servers run them as one product, and round again where their scales differ."""
    kind = FLOATS.get(options.number_format or "")
    if kind is None or not kind.whole:
        return {}
    largest = {name: float(layer.weight.detach().abs().max()) for name, layer in layers.items()}
    return {name: {"bits": replace(kind, reach=max(largest[each] for each in names))}
            for names in fused_groups(layers) for name in names}


def check_groups(layers: Mapping[str, nn.Linear], *kinds: tuple[Kind, int]) -> None:
    """Raises LlmopsError naming the first layer that one of the groups does not fit.

    kinds: (bits or number format, group size), each to be tried with every layer. Asked before anything is measured:
    a calibration walk comes to the last layer of a block after minutes.
    """
    for name, layer in layers.items():
        for bits, group_size in kinds:
            try:
                grouped(torch.empty(1, layer.in_features, device="meta"), group_of(bits, group_size))
            except LlmopsError as error:
                raise LlmopsError(f"{name}: {error}") from error


def kind_of(options: WeightOnly) -> tuple[Kind, int]:
    """(bits or number format, group size) that the options name."""
    return FLOATS.get(options.number_format or "", options.bits), options.group

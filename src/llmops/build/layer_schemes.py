"""What each layer is rounded to, as the keyword arguments that every solver takes: bits, group size, zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from llmops.errors import LlmopsError
from llmops.methods.quantize.floats import FLOATS
from llmops.methods.quantize.grid import grouped
from llmops.methods.quantize.options import WeightOnly
from llmops.models.schemes import LayerScheme, fused_groups

__all__ = ["Chosen", "check_groups", "scheme", "shared"]

Chosen = Mapping[str, LayerScheme] | None  # a scheme for each layer, in place of the one that the options name


def scheme(options: WeightOnly, chosen: Chosen, name: str) -> dict[str, Any]:
    """The keyword arguments that tell a solver the scheme of a layer."""
    if chosen is None:
        return {"bits": FLOATS.get(options.number_format or "", options.bits), "group_size": options.group,
                "symmetric": options.symmetric}
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


def check_groups(layers: Mapping[str, nn.Linear], options: WeightOnly) -> None:
    """Raises LlmopsError naming the layer that the groups do not fit."""
    for name, layer in layers.items() if options.number_format is None else ():
        try:
            grouped(layer.weight, options.group)
        except LlmopsError as error:
            raise LlmopsError(f"{name}: {error}") from error

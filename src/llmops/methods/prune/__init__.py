"""Pruning: masks on weights (magnitude, Wanda) and whole layers (depth), each a pure function on tensors.

`MASKS` holds the methods that zero single weights; each returns a keep-mask for one weight. Nothing here imports torch
until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmops.methods.prune.depth import block_influence, even_layers, influential_layers
    from llmops.methods.prune.magnitude import magnitude_mask
    from llmops.methods.prune.wanda import wanda_mask

    MASKS = {"magnitude": magnitude_mask, "wanda": wanda_mask}

__all__ = ["MASKS", "STATISTICS", "block_influence", "even_layers", "influential_layers", "magnitude_mask",
           "wanda_mask"]

#: What each method of `MASKS` wants to know of a layer's inputs (see `llmops.calibrate`).
STATISTICS = {"magnitude": "none", "wanda": "x_norm"}

_HOMES = {"magnitude_mask": "magnitude", "wanda_mask": "wanda", "block_influence": "depth",
          "even_layers": "depth", "influential_layers": "depth"}


def __getattr__(name: str) -> Any:
    if name == "MASKS":
        return {"magnitude": __getattr__("magnitude_mask"), "wanda": __getattr__("wanda_mask")}
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

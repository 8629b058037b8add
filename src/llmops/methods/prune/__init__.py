"""Pruning: masks on weights (magnitude, Wanda, SparseGPT), whole layers (depth) and what is inside them (width).

`MASKS` holds the methods that zero single weights and leave the others; each returns a keep-mask for one weight.
SparseGPT returns the weight too, since it moves what stays. Nothing here imports torch until a name is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmops.methods.prune.depth import block_influence, even_layers, influential_layers, least_run
    from llmops.methods.prune.magnitude import global_threshold, magnitude_mask
    from llmops.methods.prune.ratios import outlier_share, owl_ratios, solve_ratios
    from llmops.methods.prune.sparsegpt import sparsegpt
    from llmops.methods.prune.wanda import wanda_mask
    from llmops.methods.prune.width import keep_channels, keep_heads

    MASKS = {"magnitude": magnitude_mask, "wanda": wanda_mask}

__all__ = ["MASKS", "STATISTICS", "block_influence", "even_layers", "global_threshold", "influential_layers",
           "keep_channels", "keep_heads", "least_run", "magnitude_mask", "outlier_share", "owl_ratios", "solve_ratios",
           "sparsegpt", "wanda_mask"]

#: What each method of `MASKS` wants to know of a layer's inputs (see `llmops.calibrate`).
STATISTICS = {"magnitude": "none", "wanda": "x_norm"}

_HOMES = {"magnitude_mask": "magnitude", "global_threshold": "magnitude", "wanda_mask": "wanda",
          "sparsegpt": "sparsegpt", "block_influence": "depth", "even_layers": "depth", "influential_layers": "depth",
          "least_run": "depth", "outlier_share": "ratios", "owl_ratios": "ratios", "solve_ratios": "ratios",
          "keep_channels": "width", "keep_heads": "width"}


def __getattr__(name: str) -> Any:
    if name == "MASKS":
        return {"magnitude": __getattr__("magnitude_mask"), "wanda": __getattr__("wanda_mask")}
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `prune.sparsegpt` the function: importing the file would set the name to the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

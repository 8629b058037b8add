"""Options of the pruning methods, a module each, imported when one is first asked for.

A recipe is read without the models of the methods that it does not name: another method costs it no start-up time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmops.methods.prune.options.shared import Masks, MeasuredMasks, Pattern

if TYPE_CHECKING:
    from llmops.methods.prune.options.depth import Depth
    from llmops.methods.prune.options.magnitude import Magnitude
    from llmops.methods.prune.options.sparsegpt import Sparsegpt
    from llmops.methods.prune.options.wanda import Wanda
    from llmops.methods.prune.options.width import Width

__all__ = ["MASKING", "Depth", "Magnitude", "Masks", "MeasuredMasks", "Pattern", "Sparsegpt", "Wanda", "Width"]

#: The methods that leave single zeros, which everything after them has to keep.
MASKING = ("magnitude", "wanda", "sparsegpt")

_HOMES = {"Magnitude": "magnitude", "Wanda": "wanda", "Sparsegpt": "sparsegpt", "Depth": "depth", "Width": "width"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Quantization: one algorithm a file, each a pure function on tensors that returns a `QuantizedWeight`.

Nothing here imports torch until a name is used, so that a recipe can be validated without it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmops.methods.quantize.rtn import rtn
    from llmops.methods.quantize.weight import QuantizedWeight

    QUANTIZERS = {"rtn": rtn}

__all__ = ["QUANTIZERS", "QuantizedWeight", "rtn"]

_HOMES = {"rtn": "rtn", "QuantizedWeight": "weight"}


def __getattr__(name: str) -> Any:
    if name == "QUANTIZERS":
        return {"rtn": __getattr__("rtn")}
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `quantize.rtn` the function: importing the file `rtn.py` would set the name to the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

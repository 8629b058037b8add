"""Quantization: one algorithm a file, each a pure function on tensors that returns a `QuantizedWeight`.

Nothing here imports torch until a name is used, so that a recipe can be validated without it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmops.methods.quantize.autoround import autoround
    from llmops.methods.quantize.awq import awq_clip, awq_scales
    from llmops.methods.quantize.gptq import gptq
    from llmops.methods.quantize.hadamard import hadamard, randomized
    from llmops.methods.quantize.hqq import hqq
    from llmops.methods.quantize.kv import dequantize_kv, quantize_kv
    from llmops.methods.quantize.rtn import rtn
    from llmops.methods.quantize.smoothquant import smooth_factors
    from llmops.methods.quantize.weight import QuantizedWeight

    QUANTIZERS = {"rtn": rtn, "hqq": hqq}

__all__ = ["QUANTIZERS", "QuantizedWeight", "autoround", "awq_clip", "awq_scales", "dequantize_kv", "gptq",
           "hadamard", "hqq", "quantize_kv", "randomized", "rtn", "smooth_factors"]

#: `QUANTIZERS` holds the methods that need the weight alone; the others want to know its inputs.
_HOMES = {"rtn": "rtn", "hqq": "hqq", "gptq": "gptq", "awq_scales": "awq", "awq_clip": "awq", "autoround": "autoround",
          "hadamard": "hadamard", "randomized": "hadamard", "smooth_factors": "smoothquant",
          "quantize_kv": "kv", "dequantize_kv": "kv", "QuantizedWeight": "weight"}


def __getattr__(name: str) -> Any:
    if name == "QUANTIZERS":
        return {name: __getattr__(name) for name in ("rtn", "hqq")}
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `quantize.rtn` the function: importing the file `rtn.py` would set the name to the module. Others too."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

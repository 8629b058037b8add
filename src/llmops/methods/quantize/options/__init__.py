"""Options of the quantization methods, a module each, imported when one is first asked for.

A recipe is read without the models of the methods that it does not name: another method costs it no start-up time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmops.methods.quantize.options.shared import BITS, BITSANDBYTES, FIXED, KV_DTYPES, KV_RECORD, KvDtype, Scheme

if TYPE_CHECKING:
    from llmops.methods.quantize.options.auto import Auto
    from llmops.methods.quantize.options.autoround import Autoround
    from llmops.methods.quantize.options.awq import Awq
    from llmops.methods.quantize.options.calibrated import Calibrated
    from llmops.methods.quantize.options.gptq import Gptq
    from llmops.methods.quantize.options.hqq import Hqq
    from llmops.methods.quantize.options.kv_cache import KvCache
    from llmops.methods.quantize.options.rtn import Rtn
    from llmops.methods.quantize.options.smoothquant import Smoothquant
    from llmops.methods.quantize.options.weight_only import WeightOnly

__all__ = ["BITS", "BITSANDBYTES", "FIXED", "KV_DTYPES", "KV_RECORD", "Auto", "Autoround", "Awq", "Calibrated", "Gptq",
           "Hqq", "KvCache", "KvDtype", "Rtn", "Scheme", "Smoothquant", "WeightOnly"]

_HOMES = {"Rtn": "rtn", "Gptq": "gptq", "Awq": "awq", "Hqq": "hqq", "Autoround": "autoround", "Auto": "auto",
          "Smoothquant": "smoothquant", "KvCache": "kv_cache", "WeightOnly": "weight_only", "Calibrated": "calibrated"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

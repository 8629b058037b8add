"""PEFT, imported when adapters are first asked for and not before.

It imports bitsandbytes, which takes as long again as PEFT itself and, on CPUs with AVX512-BF16, warns that an optional
kernel package is missing. A run without adapters needs neither; one with adapters hears no warning about a package that
nothing here uses (`models/nf4.py` computes without it).
"""

from __future__ import annotations

import logging
import sys
from typing import Any

__all__ = ["hush_bitsandbytes", "is_lora_layer", "library"]


def library() -> Any:
    """The package."""
    hush_bitsandbytes()
    import peft

    return peft


def is_lora_layer(module: object) -> bool:
    """Whether a module is one of PEFT's LoRA layers; where PEFT was never imported there is none."""
    return "peft" in sys.modules and isinstance(module, library().tuners.lora.LoraLayer)


def hush_bitsandbytes() -> None:
    """No warning about kernels that its CPU backend would fetch from a hub, nor, product by product, that LLM.int8
    casts to float16. Call it before bitsandbytes comes in."""
    for name in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)

"""Options of the fine-tuning methods, a module each, imported when one is first asked for.

A recipe is read without the models of the methods that it does not name: another method costs it no start-up time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmops.methods.finetune.options.adapters import Adapters
    from llmops.methods.finetune.options.dpo import Dpo
    from llmops.methods.finetune.options.full import Full
    from llmops.methods.finetune.options.lora import Lora
    from llmops.methods.finetune.options.qlora import Qlora
    from llmops.methods.finetune.options.training import Stop, Training

__all__ = ["Adapters", "Dpo", "Full", "Lora", "Qlora", "Stop", "Training"]

_HOMES = {"Stop": "training", "Training": "training", "Adapters": "adapters", "Lora": "lora", "Qlora": "qlora",
          "Full": "full", "Dpo": "dpo"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

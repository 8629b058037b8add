"""Fine-tuning: functions on tensors and modules, loaded when they are first asked for."""

from __future__ import annotations

from typing import Any

__all__ = ["adapted_weight", "add_lora", "lora_delta", "lora_plus_scale", "masked_lora_linear", "merge_lora",
           "zero_masks"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llmops.methods.finetune import lora

        return getattr(lora, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

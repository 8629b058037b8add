"""Options of LoRA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.finetune.options.adapters import Adapters

__all__ = ["Lora"]


class Lora(Adapters):
    """Low-rank adapters (Hu et al. 2021), through PEFT."""

    method: Literal["lora"]
    merge: bool = Field(True, description="fold the adapters into the weights; false keeps a PEFT adapter folder")

"""A folder as a stranger opens it: transformers alone, nothing of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

__all__ = ["plain_logits"]


def plain_logits(folder: Path, ids: Tensor) -> Tensor:
    """(B, T, V) float32 logits of `ids` (B, T) from plain `AutoModelForCausalLM.from_pretrained(folder)`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits.float()

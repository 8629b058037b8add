"""Distillation: loss functions on tensors, loaded when they are first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["attention_loss", "attention_map", "distill_loss", "divergence_of", "hidden_loss", "jensen_shannon",
           "kl_divergence", "outcomes_at", "skewed_kl", "skewed_reverse_kl", "top_outcomes", "uniform_pairs"]

_HOMES = {"attention_loss": "attention", "attention_map": "attention", "distill_loss": "logits",
          "divergence_of": "logits", "hidden_loss": "hidden", "jensen_shannon": "jsd", "kl_divergence": "logits",
          "outcomes_at": "top_k", "skewed_kl": "skewed", "skewed_reverse_kl": "skewed", "top_outcomes": "top_k",
          "uniform_pairs": "hidden"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

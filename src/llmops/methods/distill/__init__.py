"""Distillation: loss functions on tensors, loaded when they are first asked for."""

from __future__ import annotations

from typing import Any

__all__ = ["distill_loss", "hidden_loss", "kl_divergence", "uniform_pairs"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from llmops.methods.distill import hidden, logits

        return getattr(logits if name in logits.__all__ else hidden, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

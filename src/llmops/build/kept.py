"""The quantized weights of a step, kept so that memory does not grow with the model."""

from __future__ import annotations

from dataclasses import replace

from llmops.methods.quantize.floats import AnyWeight
from llmops.shelf import shelved

__all__ = ["Kept"]


class Kept(dict[str, AnyWeight]):
    """Weights by layer, their codes mapped from scratch files (`shelf.py`) as they come in."""

    def __setitem__(self, name: str, weight: AnyWeight) -> None:
        super().__setitem__(name, replace(weight, codes=shelved(weight.codes)))

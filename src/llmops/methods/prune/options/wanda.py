"""Options of Wanda."""

from __future__ import annotations

from typing import Literal

from llmops.methods.prune.options.shared import MeasuredMasks

__all__ = ["Wanda"]


class Wanda(MeasuredMasks):
    """Zero the weights with the smallest |weight| x activation norm, row by row (Sun et al. 2023)."""

    method: Literal["wanda"]

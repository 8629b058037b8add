"""Options of SparseGPT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.prune.options.shared import MeasuredMasks

__all__ = ["Sparsegpt"]


class Sparsegpt(MeasuredMasks):
    """Zero weights column by column, the others of their row making up for it (Frantar and Alistarh 2023)."""

    method: Literal["sparsegpt"]
    damping: float = Field(0.01, gt=0, le=1, description="added to the diagonal of the Hessian, times its mean; raised "
                                                         "tenfold, and told, where it is too small")
    block: int = Field(128, ge=8, description="columns whose weights are compared with each other")
    order: Literal["auto", "activation", "none"] = Field(
        "auto", description="order in which columns are zeroed: activation, the largest inputs first, those that a "
                            "pattern compares together; none, from left to right; auto, activation for patterns only")

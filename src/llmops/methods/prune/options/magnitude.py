"""Options of pruning by size."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.prune.options.shared import Masks

__all__ = ["Magnitude"]


class Magnitude(Masks):
    """Zero the smallest weights (Han et al. 2015)."""

    method: Literal["magnitude"]
    scope: Literal["layer", "global"] = Field("layer", description="what weights are compared with: those of their own "
                                                                   "layer, or all of the model")

"""Options of SmoothQuant."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.quantize.options.calibrated import Calibrated
from llmops.methods.quantize.options.shared import Clip

__all__ = ["Smoothquant"]


class Smoothquant(Calibrated):
    """Move part of the inputs' range into the weights, the factors folded away, and round (Xiao et al. 2022)."""

    method: Literal["smoothquant"]
    alpha: float = Field(0.5, ge=0, le=1, description="how much of the inputs' range moves into the weights; 0.5 makes "
                                                      "both alike")
    clip: Clip = Field("absmax", description="range of a group: its largest weight, or the range that leaves the least "
                                             "squared error")

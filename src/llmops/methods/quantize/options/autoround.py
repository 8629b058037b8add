"""Options of AutoRound."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.quantize.options.calibrated import Calibrated
from llmops.methods.quantize.options.shared import FACTORS

__all__ = ["Autoround"]


class Autoround(Calibrated):
    """Learn how to round by signed gradient descent on the output of each block (Cheng et al. 2023)."""

    method: Literal["autoround"]
    factors: Literal["awq"] | None = Field(None, description=FACTORS)
    iterations: int = Field(200, ge=1, le=100_000, description="steps of the descent for each block")
    batch_size: int = Field(8, ge=1, le=4096, description="crops a step looks at")

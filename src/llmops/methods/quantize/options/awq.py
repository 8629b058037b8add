"""Options of AWQ."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.quantize.options.calibrated import Calibrated

__all__ = ["Awq"]


class Awq(Calibrated):
    """Scale up the weights of large inputs, folding the factors away, then clip and round (Lin et al. 2023)."""

    method: Literal["awq"]
    grid: int = Field(20, ge=0, le=200, description="exponents tried for the factors, beside none; 0 leaves them out")
    clip: bool = Field(True, description="search the range of every group, too")

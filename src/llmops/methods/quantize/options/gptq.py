"""Options of GPTQ."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.quantize.options.calibrated import Calibrated
from llmops.methods.quantize.options.shared import FACTORS, Clip

__all__ = ["Gptq"]


class Gptq(Calibrated):
    """Round column by column, the columns to come making up for each error (Frantar et al. 2022)."""

    method: Literal["gptq"]
    factors: Literal["awq"] | None = Field(None, description=FACTORS)
    damping: float | None = Field(None, gt=0, le=1, description="added to the Hessian's diagonal, as a fraction of its "
                                                                "mean; ten times as much is tried, and told, where it "
                                                                "fails. Default: 0.05, integers of more than 4 bits "
                                                                "0.01")
    order: Literal["groups", "activation", "none"] | None = Field(
        None, description="columns by the size of their input: group by group, all together (with the grids of the "
                          "groups fixed beforehand), or as they stand. Default: groups, integers of more than 4 bits "
                          "activation")
    clip: Clip = Field("mse", description="range of a group: its largest weight, or the range that leaves the least "
                                          "squared error, each counted by what it costs")

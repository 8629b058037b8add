"""Options of rounding to nearest."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.quantize.options.shared import Clip, Scheme
from llmops.methods.quantize.options.weight_only import WeightOnly

__all__ = ["Rtn"]


class Rtn(WeightOnly):
    """Round to nearest: no data, one scale a group (or a row)."""

    method: Literal["rtn"]
    scheme: Scheme | Literal["nf4", "llm_int8"] = Field(  # type: ignore[assignment]
        description="bits of the weights; nf4 and llm_int8 are bitsandbytes' (llm_int8 rounds activations, too)")
    clip: Clip = Field("absmax", description="range of a group: its largest weight, or the range that leaves the least "
                                             "squared error")
    double_quant: bool = Field(False, description="nf4: the scales of the blocks in 8 bits, too")
    threshold: float | None = Field(None, ge=0, description="llm_int8: input features with a value beyond it are "
                                                            "multiplied in 16 bit; 0 for none. Default: 6")

    @property
    def group(self) -> int:
        """The group size with its default filled in."""
        return 64 if self.scheme == "nf4" and self.group_size is None else super().group

    @property
    def outliers(self) -> float:
        """The threshold with its default filled in."""
        return 6.0 if self.threshold is None else self.threshold

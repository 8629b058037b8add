"""Options of HQQ."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.quantize.options.weight_only import WeightOnly

__all__ = ["Hqq"]


class Hqq(WeightOnly):
    """Fit scale and zero point to a small l_0.7 norm of the error (Badri and Shaji 2023); needs no data."""

    method: Literal["hqq"]
    group_size: int | None = Field(None, description="weights that share a scale along the input, at most 128. "
                                                     "Default: 64")
    symmetric: bool = Field(False, description="always false: the zero point is what is fitted")
    iterations: int = Field(20, ge=1, le=1000, description="half-quadratic steps")

    @property
    def group(self) -> int:
        """The group size with its default filled in."""
        return self.group_size if self.group_size is not None else 64

"""Options of the methods that look at what the layers see."""

from __future__ import annotations

from pydantic import Field

from llmops.methods.quantize.options.shared import Experts
from llmops.methods.quantize.options.weight_only import WeightOnly

__all__ = ["Calibrated"]


class Calibrated(WeightOnly):
    """A quantization that looks at what the layers see."""

    data: str = Field(description="name of the calibration data; its `samples` are the crops, 128 by default")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")
    experts: Experts = Field("routed", description="what experts of a mixture are measured on: the tokens that were "
                                                   "sent to them, or all")

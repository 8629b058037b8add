"""Options of dropping layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.prune.options.targets import Share, Targets

__all__ = ["Depth"]


class Depth(Targets):
    """Drop whole decoder layers; the result is an ordinary smaller model. One target: layers, or a share to keep."""

    method: Literal["depth"]
    layers: int | list[int] | None = Field(None, description="how many layers to keep, or the list of those kept "
                                                             "(from 0)")
    parameters: Share = Field(None, description="share of the parameters to keep, as 0.7 or 0.7x")
    choose: Literal["even", "block_influence", "perplexity"] = Field(
        "even", description="which ones, when their number is asked for: evenly spaced; those that turn their input "
                            "most; those whose loss costs most perplexity (both need data)")
    contiguous: bool = Field(False, description="drop one run of neighbouring layers instead of any")
    steps: int = Field(1, ge=1, description="rounds in which layers are dropped, scores taken anew in each")
    data: str | None = Field(None, description="name of the calibration data, for scores")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")

"""Options of making a model narrower."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.prune.options.targets import Share, Targets

__all__ = ["Width"]


class Width(Targets):
    """Cut hidden features, FFN channels, heads and KV groups by the size of their activations (Muralidharan et al.
    2024); the result is an ordinary narrower model. One target: its shape, or a share to keep."""

    method: Literal["width"]
    data: str = Field(description="name of the calibration data")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")
    hidden: int | None = Field(None, ge=1, description="hidden features to keep")
    intermediate: int | None = Field(None, ge=1, description="FFN channels of each layer to keep")
    heads: int | None = Field(None, ge=1, description="query heads of each layer to keep")
    kv_heads: int | None = Field(None, ge=1, description="KV groups of each layer to keep; heads is a multiple of it")
    parameters: Share = Field(None, description="share of the parameters to keep, as 0.7 or 0.7x; which shape has it "
                                                "is found by the divergence of each candidate")
    axes: list[Literal["hidden", "intermediate", "heads"]] = Field(
        ["hidden", "intermediate"], description="what a searched shape may cut (heads: whole KV groups)")
    multiple: int = Field(32, ge=1, description="hidden features and FFN channels are multiples of it")
    aggregate: Literal["l2", "mean"] = Field("l2", description="importance over crops: of the mean size within each, "
                                                               "the norm or the mean")
    steps: int = Field(1, ge=1, description="rounds in which the width falls, importance taken anew in each")

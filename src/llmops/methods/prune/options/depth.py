"""Options of dropping layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.options import Options

__all__ = ["Depth"]


class Depth(Options):
    """Drop whole decoder layers; the result is an ordinary smaller model."""

    method: Literal["depth"]
    layers: int | list[int] = Field(description="how many layers to keep, or the list of those kept (from 0)")
    choose: Literal["even", "block_influence"] = Field(
        "even", description="which ones, when layers is a number: evenly spaced, or by block influence (needs data)")
    data: str | None = Field(None, description="name of the calibration data, for block_influence")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")

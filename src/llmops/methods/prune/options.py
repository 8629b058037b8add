"""Options of the pruning methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmops.options import Options

__all__ = ["Depth", "Magnitude", "Pattern", "Prune", "Wanda"]

Pattern = Literal["unstructured", "2:4", "4:8"]


class Magnitude(Options):
    """Zero the smallest weights of every linear layer (Han et al. 2015)."""

    method: Literal["magnitude"]
    sparsity: float = Field(0.5, gt=0, lt=1, description="fraction of each layer's weights set to zero")
    pattern: Pattern = Field("unstructured", description="where zeros may stand; N:M needs sparsity N/M")
    ignore: list[str] = Field(["lm_head"], description="layers left as they are, by the end of their name")


class Wanda(Options):
    """Zero the weights with the smallest |weight| x activation norm, row by row (Sun et al. 2023)."""

    method: Literal["wanda"]
    data: str = Field(description="name of the calibration data")
    sparsity: float = Field(0.5, gt=0, lt=1, description="fraction of each layer's weights set to zero")
    pattern: Pattern = Field("unstructured", description="where zeros may stand; N:M needs sparsity N/M")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")
    ignore: list[str] = Field(["lm_head"], description="layers left as they are, by the end of their name")
    experts: Literal["routed", "all"] = Field("routed", description="what experts of a mixture are measured on: the "
                                                                    "tokens that were sent to them, or all")


class Depth(Options):
    """Drop whole decoder layers; the result is an ordinary smaller model."""

    method: Literal["depth"]
    layers: int | list[int] = Field(description="how many layers to keep, or the list of those kept (from 0)")
    choose: Literal["even", "block_influence"] = Field(
        "even", description="which ones, when layers is a number: evenly spaced, or by block influence (needs data)")
    data: str | None = Field(None, description="name of the calibration data, for block_influence")
    length: int = Field(2048, ge=8, description="tokens a calibration crop holds (at most the model's context)")


Prune = Annotated[Magnitude | Wanda | Depth, Field(discriminator="method")]

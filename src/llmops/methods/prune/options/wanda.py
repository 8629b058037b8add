"""Options of Wanda."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.prune.options.shared import Pattern
from llmops.options import Options

__all__ = ["Wanda"]


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

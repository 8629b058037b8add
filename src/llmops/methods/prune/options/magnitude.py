"""Options of pruning by size."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.methods.prune.options.shared import Pattern
from llmops.options import Options

__all__ = ["Magnitude"]


class Magnitude(Options):
    """Zero the smallest weights of every linear layer (Han et al. 2015)."""

    method: Literal["magnitude"]
    sparsity: float = Field(0.5, gt=0, lt=1, description="fraction of each layer's weights set to zero")
    pattern: Pattern = Field("unstructured", description="where zeros may stand; N:M needs sparsity N/M")
    ignore: list[str] = Field(["lm_head"], description="layers left as they are, by the end of their name")

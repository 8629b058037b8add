"""Options of training every weight."""

from __future__ import annotations

from typing import Literal

from llmops.methods.finetune.options.training import Training

__all__ = ["Full"]


class Full(Training):
    """Every weight is trained."""

    method: Literal["full"]

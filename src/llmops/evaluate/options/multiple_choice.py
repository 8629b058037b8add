"""Options of the score multiple_choice."""

from __future__ import annotations

from pydantic import Field

from llmops.evaluate.slice_options import Sliced

__all__ = ["MultipleChoice"]


class MultipleChoice(Sliced):
    """The choice with the highest log-likelihood is the right one."""

    data: str = Field(description="name of the data with question, choices, answer")
    length_normalized: bool = Field(False, description="divide a choice's log-likelihood by its bytes (acc_norm)")
    batch_size: int = Field(64, ge=1)

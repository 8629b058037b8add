"""Options of the score preference_accuracy."""

from __future__ import annotations

from pydantic import Field

from llmops.evaluate.slice_options import Sliced

__all__ = ["PreferenceAccuracy"]


class PreferenceAccuracy(Sliced):
    """The better of two answers is the likelier one."""

    data: str = Field(description="name of the data with prompt, chosen, rejected")
    length_normalized: bool = Field(False, description="divide an answer's log-probability by its tokens; summed ones "
                                                       "favour short answers")
    batch_size: int = Field(64, ge=1)

"""Options of the score exact_match."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from llmops.evaluate.slice_options import Sliced

__all__ = ["ExactMatch"]


class ExactMatch(Sliced):
    """Greedy answer, normalised, equal to the reference."""

    data: str = Field(description="name of the data with prompts and answers")
    max_new_tokens: int = Field(32, ge=1, description="tokens an answer may have")
    normalize: bool = Field(True, description="compare without case, punctuation, articles and surplus spaces")
    extract: str | None = Field(None, description="regular expression; its first group is the answer, on both sides")
    batch_size: int = Field(64, ge=1)

    @field_validator("extract")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression ({error}); expected one whose first group is the "
                             "answer, as '#### (.+)'") from error
        return value

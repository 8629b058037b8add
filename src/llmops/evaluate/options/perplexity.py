"""Options of the score perplexity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmops.evaluate.slice_options import Sliced

__all__ = ["Perplexity"]


class Perplexity(Sliced):
    """exp of the mean next-token loss. Without a stride: the windows of the GPTQ and Wanda papers."""

    data: str = Field(description="name of the data with text")
    context: int = Field(2048, ge=8, description="tokens a window holds (at most the model's context)")
    stride: int | None = Field(None, ge=1, description="sliding windows that start this many tokens apart; "
                                                       "default: windows do not overlap")
    separator: Literal["blank_line", "eos"] = Field("blank_line", description="what stands between documents: an empty "
                                                    "line, as in the papers, or the tokenizer's end token")
    max_tokens: int | None = Field(None, ge=16, description="score at most this many tokens")
    batch_size: int = Field(8, ge=1)

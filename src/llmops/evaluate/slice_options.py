"""The options that every score of separate items has: which columns of the data are groups, and which one clusters."""

from __future__ import annotations

from pydantic import Field

from llmops.options import Options

__all__ = ["Sliced"]


class Sliced(Options):
    """Groups and clusters of a score's items."""

    slices: list[str] = Field([], max_length=8, description="columns of the data whose values are groups; each group "
                                                            "gets a score and a comparison of its own")
    cluster: str | None = Field(None, min_length=1, description="column that items share when they are not "
                                                                "independent, as the document they are about; "
                                                                "intervals and tests are then over its values")

"""What a plan has to know of the invented world: which one it is, and how many questions it holds."""

from __future__ import annotations

__all__ = ["SIZES", "WORLD_VERSION"]

WORLD_VERSION = 1  # raise it when the same name would give other rows
#: Number of questions of ``facts`` per split.
SIZES = {"train": 4000, "validation": 500, "test": 600}

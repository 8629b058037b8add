"""What a plan has to know of the invented world: which one it is, and how many rows its sources hold."""

from __future__ import annotations

__all__ = ["ROWS", "SIZES", "WORLD_VERSION"]

WORLD_VERSION = 1  # raise it when the same name would give other rows
#: Number of questions of ``facts`` per split.
SIZES = {"train": 4000, "validation": 500, "test": 600}
#: Number of rows of the sources that have one split.
ROWS = {"builtin:study": 2 * SIZES["train"], "builtin:prompts": 9384}

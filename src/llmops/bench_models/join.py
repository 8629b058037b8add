"""Cells of several matrices in one table: only where they did the same work on the same machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmops.errors import LlmopsError

__all__ = ["joined"]

WORK = ("prompts_sha256", "new_tokens", "window_s")
MACHINE = ("device", "cpu", "gpu", "threads", "sensor")


def joined(matrices: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """All cells, by (name of the matrix, cells). Raises LlmopsError when two of the same batch and context were given
    other prompts, lengths or windows, or were measured on another machine, by another sensor or with other threads."""
    first: dict[tuple[int, int], tuple[str, dict[str, Any]]] = {}
    found = []
    for name, cells in matrices:
        for cell in cells:
            if cell["state"] == "ok":
                shape = (cell["batch"], cell["context"])
                _agree(name, cell, *first.setdefault(shape, (name, cell)))
            found.append(cell)
    return found


def _agree(name: str, cell: dict[str, Any], other: str, body: dict[str, Any]) -> None:
    at = f"batch {cell['batch']}, context {cell['context']}"
    for what, one, two, keys in (("work", cell, body, WORK),
                                 ("machine", cell["environment"], body["environment"], MACHINE)):
        key = next((key for key in keys if one.get(key) != two.get(key)), None)
        if key == "prompts_sha256":
            raise LlmopsError(f"{name} and {other} were given different prompts at {at} ({str(one[key])[:12]} and "
                              f"{str(two[key])[:12]}), so their figures are not comparable; expected the same seed and "
                              "vocabulary: measure them in one matrix")
        if key is not None:
            raise LlmopsError(f"{name} and {other} did not do the same {what} at {at}: {key} is {one.get(key)!r} and "
                              f"{two.get(key)!r}; measure them in one matrix")

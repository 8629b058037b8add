"""Which layers are experts' by their names alone: recipes are checked without torch."""

from __future__ import annotations

import re

__all__ = ["expert_of"]

_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.")


def expert_of(name: str) -> tuple[str, int] | None:
    """(path of the experts, number) of a layer inside one of many experts, None for any other: by its full name."""
    found = _EXPERT.match(name)
    return (found.group(1), int(found.group(2))) if found is not None else None

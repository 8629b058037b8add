"""`llmops doctor`: is this machine fit, and will this recipe go through? Answered before hours are spent on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmops.doctor.checklist import Check, exit_code, render
from llmops.doctor.machine import examine

__all__ = ["Check", "examine", "exit_code", "rehearse", "render"]


def rehearse(path: str, sets: Sequence[str] = (), say: Callable[[Check], None] | None = None) -> list[Check]:
    """Rehearse the recipe at `path` on a two-layer twin of its model; see `llmops.doctor.rehearsal`."""
    from llmops.doctor.rehearsal import rehearse as run

    return run(path, sets, say)

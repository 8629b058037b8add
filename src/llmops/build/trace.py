"""Learning rate, tokens and joules along a training, for the curves of the report; what a killed attempt saw is kept.

The loop keeps every step's loss in its checkpoints. These figures only draw lines, so a few hundred points are enough,
in a small file beside the checkpoints: when they become too many, every second one goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["KEPT", "Trace"]

KEPT = ("learning_rate", "tokens", "energy_j")
MOST, EVERY_S = 256, 5.0


class Trace:
    """`log` is a `Hooks.log` that remembers, and passes on to `then`. place: where a build that goes on finds it."""

    def __init__(self, place: Path, then: Callable[[int, Mapping[str, float]], None] | None = None) -> None:
        self.place, self.then = place, then
        self.every = 1
        self.points: list[tuple[int, dict[str, float]]] = []
        self._last: tuple[int, dict[str, float]] | None = None
        self._begun, self._written = False, time.monotonic()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if not self._begun:
            self._begun = True
            self.points = [point for point in _read(self.place) if point[0] < step]
            self.every = _stride(self.points)
        self._last = step, {name: float(figures[name]) for name in KEPT if name in figures}
        if not self.points or step >= self.points[-1][0] + self.every:
            self.points.append(self._last)
        if len(self.points) >= MOST:
            self.points, self.every = self.points[::2], 2 * self.every
        if time.monotonic() - self._written >= EVERY_S:
            self._write()
        if self.then is not None:
            self.then(step, figures)

    def as_dict(self) -> dict[str, list[list[float]]]:
        """`{"energy_j": [[step, value], ...], ...}`, the last step included; empty where nothing was trained."""
        if self._last is None:
            return {}
        points = self.points if self.points[-1][0] == self._last[0] else [*self.points, self._last]
        found = {name: [[step, seen[name]] for step, seen in points if name in seen] for name in KEPT}
        return {name: pairs for name, pairs in found.items() if pairs}

    def _write(self) -> None:
        """Best effort: a full disk stops the checkpoint, not the curves."""
        self._written = time.monotonic()
        scratch = self.place.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            scratch.write_text(json.dumps(self.points), encoding="utf-8")
            scratch.replace(self.place)


def _stride(points: list[tuple[int, dict[str, float]]]) -> int:
    return max(1, points[-1][0] - points[-2][0]) if len(points) > 1 else 1


def _read(place: Path) -> list[tuple[int, dict[str, float]]]:
    try:
        return [(int(step), dict(seen)) for step, seen in json.loads(place.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []

"""What a build has cost over all its attempts, the killed and the failed ones included.

An attempt writes down its time and energy every few seconds, in a file of its own beside the checkpoints. A process
that is killed cannot say what it spent, but its last note stands; the attempt that finishes adds them up. What is lost
is at most the seconds since the last note.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from llmops.errors import StoreError
from llmops.measure.meter import Window
from llmops.quantity import Quantity, weakest
from llmops.train import Progress

__all__ = ["Attempts", "Spent"]

EVERY_S = 2.0


@dataclass(frozen=True)
class Spent:
    """Time and energy of a build over `attempts` attempts."""

    wall_s: Quantity
    energy_j: Quantity
    attempts: int


class Attempts:
    """The attempts at one build. `folder` is the build's own place for work under way; `window` meters this one."""

    def __init__(self, folder: Path, window: Window) -> None:
        self.folder, self.window = folder, window
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be written to ({error}); name another place with --runs") from error
        self.before = [_read(path) for path in sorted(folder.glob("attempt-*.json"))]
        self.place = folder / f"attempt-{len(self.before):04d}.json"
        self._noted = float("-inf")
        self._joules: float | None = None

    def joules(self) -> float | None:
        """Energy of this attempt so far, at most a few seconds old; None where nobody knows."""
        self.note()
        return self._joules

    def note(self) -> None:
        """Write down what this attempt has spent, unless that was done a moment ago."""
        if time.monotonic() - self._noted < EVERY_S:
            return
        wall_s, energy = self.window.so_far()
        self._joules = energy.value
        scratch = self.place.with_suffix(f".{os.getpid()}")
        try:
            scratch.write_text(json.dumps({"wall_s": wall_s, "energy_j": energy.as_dict()}), encoding="utf-8")
            scratch.replace(self.place)
        except OSError as error:
            raise StoreError(f"{self.place}: cannot be written ({error}); free some disk and run the same command "
                             "again: it goes on from the last checkpoint") from error
        self._noted = time.monotonic()

    def watching(self, progress: Progress | None) -> Progress:
        """`progress`, with a note taken on the way."""

        def watched(done: int, total: int, text: str) -> None:
            self.note()
            if progress is not None:
                progress(done, total, text)

        return watched

    def total(self) -> Spent:
        """All attempts together; the window of this one has been closed."""
        count = len(self.before) + 1
        method = "wall clock of the step" + (f", {count} attempts, those that were cut off included" if count > 1
                                             else "")
        wall_s = sum(wall for wall, _ in self.before) + self.window.wall_s
        parts = [*(energy for _, energy in self.before), self.window.energy]
        unknown = next((part for part in parts if part.value is None), None)
        if unknown is not None:
            energy = Quantity.null("J", unknown.method)
        elif count == 1:
            energy = self.window.energy
        else:
            energy = Quantity(sum(part.value or 0.0 for part in parts), "J", weakest(p.provenance for p in parts),
                              f"sum over {count} attempts; {self.window.energy.method}", n=count)
        return Spent(Quantity.measured(wall_s, "s", method), energy, count)

    def discard(self) -> None:
        """The build is stored and its manifest holds the total."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> tuple[float, Quantity]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return float(body["wall_s"]), Quantity.from_dict(body["energy_j"])
    except (OSError, ValueError, KeyError):
        return 0.0, Quantity.null("J", f"the note {path.name} of an attempt that was cut off cannot be read")

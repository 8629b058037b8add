"""What a build has cost over all its attempts, the killed and the failed ones included.

An attempt writes down its time and energy every few seconds, in a file of its own beside the checkpoints. A process
that is killed cannot say what it spent, but its last note stands; an attempt that fails writes a last one on its way
out; the attempt that finishes adds them up. What is lost is at most the seconds since the last note.

An attempt that ended before the sensor saw anything (a counter that moves once a second) has time and no energy. It is
charged at the mean power of the attempts that were seen, and the sum is then an estimate and says so.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from llmops.errors import StoreError
from llmops.measure.meter import Window
from llmops.quantity import Quantity, weakest
from llmops.train import Progress

__all__ = ["Attempts", "Spent", "summed"]

EVERY_S = 2.0


@dataclass(frozen=True)
class Spent:
    """Time and energy of a build over all its attempts, and of each: {"wall_s", "energy_j"}, J or None."""

    wall_s: Quantity
    energy_j: Quantity
    attempts: list[dict[str, Any]]


class Attempts:
    """The attempts at one build. `folder` is the build's own place for work under way; `window` meters this one.

    Entered while the window is open: what was spent is noted when the block ends, also when it fails.
    """

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

    def __enter__(self) -> Attempts:
        self.note()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._noted = float("-inf")
        try:
            self.note()
        except StoreError:
            if error is None:
                raise

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
        every = [*self.before, (self.window.wall_s, self.window.energy)]
        count, method = len(every), "wall clock of the step"
        if count > 1:
            method += f", {count} attempts, those that were cut off included"
        return Spent(Quantity.measured(sum(wall for wall, _ in every), "s", method), summed(every),
                     [{"wall_s": wall, "energy_j": energy.value} for wall, energy in every])

    def discard(self) -> None:
        """The build is stored and its manifest holds the total."""
        shutil.rmtree(self.folder, ignore_errors=True)


def summed(every: list[tuple[float, Quantity]], what: str = "attempts") -> Quantity:
    """The energy of all attempts (or whatever `what` says), given as (seconds, energy) with the last one last.

    Those without a reading are charged at the mean power of the others.
    """
    last = every[-1][1]
    known = [(wall, energy) for wall, energy in every if energy.value is not None]
    unseen_s = sum(wall for wall, energy in every if energy.value is None)
    if len(every) == 1 or not known:
        return last
    joules, seen_s = sum(energy.value or 0.0 for _, energy in known), sum(wall for wall, _ in known)
    method = f"sum over {len(every)} {what}; {known[-1][1].method}"
    if unseen_s == 0:
        return Quantity(joules, "J", weakest(energy.provenance for _, energy in known), method, n=len(every))
    return Quantity(joules * (1 + unseen_s / max(1e-9, seen_s)), "J", "estimated",
                    f"{method}; {unseen_s:.2g} s without a reading charged at the mean power of the other "
                    f"{seen_s:.2g} s", n=len(every))


def _read(path: Path) -> tuple[float, Quantity]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        return float(body["wall_s"]), Quantity.from_dict(body["energy_j"])
    except (OSError, ValueError, KeyError):
        return 0.0, Quantity.null("J", f"the note {path.name} of an attempt that was cut off cannot be read")

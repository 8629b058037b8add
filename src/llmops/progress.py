"""What a run tells while it works: a bar and a live loss curve on a terminal, a line now and then elsewhere.

All of it goes to standard error, so that standard output stays what was asked for. A terminal that says it can do
nothing (`TERM=dumb`) gets lines; `NO_COLOR` takes the colours away. The log hears of every stage and note, whatever is
shown.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmops.curves import Point, Points

if TYPE_CHECKING:
    from llmops.screen import Screen

__all__ = ["Under", "Watcher", "duration", "log", "log_file", "time_left"]

log = logging.getLogger("llmops")
EVERY_S = 30.0  # between two lines where there is no terminal


@dataclass
class Under:
    """The stage under way, as far as it has been told. `points`: training loss; `looks`: held-out loss."""

    title: str
    began: float
    done: int = 0
    total: int = 0
    text: str = ""
    first: int = 0  # done when this count began: a resumed training begins in the middle
    since: float = 0.0
    points: Points = field(default_factory=Points)
    looks: list[Point] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def count(self, done: int, total: int, text: str, now: float) -> None:
        """Hear of progress. Another total, or less done than before, is another count: its rate begins anew."""
        if total != self.total or done < self.done:
            self.first, self.since = done, now
        self.done, self.total, self.text = done, total, text

    def hear(self, step: int, figures: Mapping[str, float]) -> None:
        """Hear the figures of an optimizer step."""
        if "loss" in figures:
            self.points.add(step, figures["loss"])
        if "held_out_loss" in figures:
            self.looks.append((step, figures["held_out_loss"]))
        self.figures = {**self.figures, **figures, "step": step}

    def left(self, now: float) -> float | None:
        return time_left(self.done, self.first, self.total, now - self.since)


class Watcher:
    """Hears of every stage and of the work inside it. `quiet` says nothing but still logs."""

    def __init__(self, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.quiet, self.clock = quiet, clock
        self._under: Under | None = None
        self._screen: Screen | None = None
        self._said = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """A stage of the run, which `progress` and `log` tell more about. What it came to is said at its end."""
        log.info("begin %s", title)
        under = self._under = Under(title, self.clock())
        self._said, ended = under.began, "stopped"
        try:
            if self.quiet or not _terminal():
                self._say(f"  {title}")
                yield
            else:
                from llmops.screen import Screen

                with Screen(under, self.clock) as self._screen:
                    yield
            ended = "done"
        finally:
            self._screen = self._under = None
            took = f"{title}: {ended} after {duration(self.clock() - under.began)}{_totals(under)}"
            log.info("%s", took)
            self._say(f"  {took}")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` pieces of the stage under way; text: what to show beside the bar."""
        under, now = self._under, self.clock()
        if under is None:
            return
        under.count(done, total, text, now)
        if self._screen is None and now - self._said >= EVERY_S:
            self._said = now
            left = under.left(now)
            parts = [f"{done:,} of {total:,}", text, f"{duration(left)} left" if left is not None else ""]
            self._say("    " + ", ".join(part for part in parts if part))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of an optimizer step: loss, held_out_loss, tokens, energy_j and more, as the loop gives them."""
        if self._under is not None:
            self._under.hear(step, figures)

    def note(self, text: str) -> None:
        """A line for the reader and for the log."""
        log.info("%s", text)
        self._say(text)

    def _say(self, text: str) -> None:
        if self.quiet:
            return
        if self._screen is not None:
            self._screen.say(text)
        else:
            encoding = sys.stderr.encoding or "utf-8"
            print(text.encode(encoding, "replace").decode(encoding), file=sys.stderr, flush=True)


def time_left(done: int, first: int, total: int, elapsed_s: float) -> float | None:
    """Seconds that the rest takes at the rate since `first`; None before a rate is known."""
    if done <= first or total < done:
        return None
    return elapsed_s / (done - first) * (total - done)


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07` (minutes), `2:03:07` (hours)."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes = f"{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{whole // 3600}:{minutes}" if whole >= 3600 else minutes.removeprefix("0")


def _terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _totals(under: Under) -> str:
    """What a training came to, for the line at its end."""
    figures = under.figures
    if "loss" not in figures:
        return ""
    parts = [f"{figures['step']:,} steps", f"loss {figures['loss']:.4g}"]
    if under.looks:
        parts.append(f"held-out loss {under.looks[-1][1]:.4g}")
    if "tokens" in figures:
        parts.append(f"{figures['tokens']:,.0f} tokens")
    if "energy_j" in figures:
        parts += [f"{figures['energy_j']:,.4g} J", f"{1000 * figures['joules_per_token']:.3g} mJ/token"]
    return "; " + ", ".join(parts)


class log_file:  # noqa: N801 - reads as what it is: `with log_file(path):`
    """Everything llmops logs, and every Python warning, goes to a file while the block lasts."""

    def __init__(self, path: Path) -> None:
        self.handler = logging.FileHandler(path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def __enter__(self) -> None:
        log.addHandler(self.handler)
        log.setLevel(logging.INFO)
        log.propagate = False

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self.handler)
        self.handler.close()

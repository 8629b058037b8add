"""What a run tells while it works: bars with rates and remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Watcher", "log"]

log = logging.getLogger("llmops")


class Watcher:
    """Hears of every stage and of the work inside it. `quiet` says nothing but still logs; bars need a terminal.

    All output goes to standard error, so that standard output stays what was asked for.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._title = ""

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """A stage of the run, with a bar that `progress` moves."""
        log.info("begin %s", title)
        self._title = title
        if self.quiet or not sys.stderr.isatty():
            if not self.quiet:
                print(f"  {title}", file=sys.stderr, flush=True)
            yield
        else:
            with _bars() as self._bar:
                self._task = self._bar.add_task(title, total=None, text="")
                yield
            self._bar = None
        log.info("end %s", title)

    def progress(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` pieces of the stage under way."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)

    def note(self, text: str) -> None:
        """A line for the reader and for the log."""
        log.info("%s", text)
        if not self.quiet:
            (self._bar.console.print if self._bar is not None else _print)(text)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(TextColumn("  {task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
                    TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False),
                    console=Console(stderr=True), transient=True)

"""The stage under way on a terminal: title, bar, figures and loss curve, drawn again a few times a second.

    [2/5] build tuned: lora r16 3 ep
    ━━━━━━━━━━━━━━━━━━━━━━━━━━─────────── 320/400 80% 1:04, 16.0 s left
    loss 1.234, 12,345 tokens/s, 1.20 kJ, 3.2 mJ/token
       3.965│⠙⠦⣄
            │   ⠙⠦◆⣀⡀
       1.201│       ⠈⠉⠒⠒◆⠤⠤⠤⠤⠤
             steps 1 to 320; ◆ held out 1.31, lowest 1.31 at 300

rich does the drawing: it moves the cursor back up, and lifts what anybody prints in between above the picture. Two
things are done here instead. The cursor stays visible, since a process that is killed cannot bring it back. And when
the window becomes narrower, a terminal breaks the lines that stand there in two, so more rows are taken back than were
drawn (a terminal that cuts lines instead loses that many rows of what stood above, once).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from llmops.curves import cells

if TYPE_CHECKING:
    from llmops.progress import Under

__all__ = ["Screen", "picture"]

CURVE, FEWEST_ROWS = 8, 16  # lines of the curve; rows a window needs to show it
STYLES = {"title": "bold", "done": "cyan", "left": "dim", "axis": "dim", "line": "cyan", "raw": "dim", "look": "yellow",
          "text": "", "empty": ""}
Pieces = list[tuple[str, str]]  # (text, key of STYLES)


def picture(under: Under, now: float, width: int, rows: int, *, plain: bool = False) -> list[Pieces]:
    """The lines to show in a window of `width` columns and `rows` rows; none is longer than `width`."""
    lines: list[Pieces] = [[(f"  {under.title}", "title")]]
    if under.total:
        lines.append(_bar(under, now, width, plain))
    if under.text:
        lines.append([(f"  {under.text}", "text")])
    if rows >= FEWEST_ROWS:
        lines += [list(line) for line in cells(under.points.all(), under.looks, width, CURVE, plain=plain)]
    return [_cut(line, width) for line in lines]


def _bar(under: Under, now: float, width: int, plain: bool) -> Pieces:
    from llmops.progress import duration

    share, left = min(1.0, under.done / under.total), under.left(now)
    counted = f" {under.done:,}/{under.total:,} {share:.0%} {duration(now - under.began)}"
    counted += f", {duration(left)} left" if left is not None else ""
    columns = min(40, width - 2 - len(counted))
    if columns < 5:
        return [(f" {counted}", "text")]
    full = round(columns * share)
    return [("  ", "text"), (("#" if plain else "━") * full, "done"),
            (("-" if plain else "─") * (columns - full), "left"), (counted, "text")]


def _cut(line: Sequence[tuple[str, str]], width: int) -> Pieces:
    """At most `width` columns without blanks at the end; neighbours of one kind become one piece."""
    found: Pieces = []
    for kind, pieces in groupby(line, key=itemgetter(1)):
        text = "".join(piece for piece, _ in pieces)[:width]
        width -= len(text)
        found.append((text, kind))
    while found and not found[-1][0].rstrip():
        found.pop()
    return [*found[:-1], *((text.rstrip(), kind) for text, kind in found[-1:])]


class Screen:
    """`with Screen(under, clock) as screen:` shows `under` until the block ends, and leaves nothing behind."""

    def __init__(self, under: Under, clock: Callable[[], float]) -> None:
        self.under, self.clock = under, clock
        self.console = Console(stderr=True, highlight=False)
        self.plain = not (self.console.encoding or "").lower().startswith("utf")
        self.drawn: tuple[int, list[int]] = (0, [])  # width of the window, lengths of the lines
        self.live = _Live(self)

    def __enter__(self) -> Screen:
        self.live.start()
        self.console.show_cursor(True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        """A line above the picture, which stays."""
        self.console.print(Text(text), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        lines = picture(self.under, self.clock(), width - 1, console.height, plain=self.plain)
        self.drawn = width, [sum(len(text) for text, _ in line) for line in lines]
        for line in lines:
            yield Text.assemble(*((text, STYLES[kind]) for text, kind in line), no_wrap=True, overflow="crop")

    def broken(self, width: int) -> int:
        """Rows by which the lines drawn last have grown in a window that is now `width` wide."""
        was, lengths = self.drawn
        return sum((length - 1) // width for length in lengths if length) if 0 < width < was else 0


class _Live(Live):
    def __init__(self, screen: Screen) -> None:
        super().__init__(screen, console=screen.console, refresh_per_second=4, transient=True,
                         vertical_overflow="crop", redirect_stdout=sys.stdout.isatty())
        self.screen = screen

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        extra = self.screen.broken(self.console.width)
        if extra == 0:
            return super().process_renderables(renderables)
        self.screen.drawn = (0, [])
        back = Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * extra)
        return [back, *super().process_renderables(renderables)]

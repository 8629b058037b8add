"""The table of a run on a terminal: one line a variant, children under their parent, marks explained beneath.

The compact table fits 140 columns (less, when `width` says so: the columns that can best be spared go first);
`wide=True` has every column with its interval. rich is imported when a table is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmops.report.columns import Cell, Column, columns
from llmops.report.groups import name_and_lines
from llmops.report.pareto import chosen, mark
from llmops.report.reading import (
    Row,
    batch_of,
    figure,
    goals_of,
    group,
    name_of,
    state_of,
    status_text,
    tree,
)
from llmops.report.words import zeros_note

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["COMPACT", "failures", "goal_lines", "legend", "marks", "rows_as_json", "table"]

COMPACT = 140  # columns of the compact table
STYLES = {"": "", "good": "green", "bad": "red", "dim": "dim", "strong": "bold"}
REASON = 160  # characters of a reason beneath the table


def table(rows: Sequence[Row], *, wide: bool = False, width: int | None = None, title: str | None = None) -> Table:
    """A rich table, its legend as the caption.

    wide: every column, as wide as it gets. width: at most so many characters, compact only (default 140).
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = tree(rows)
    names = [_name(depth, row) for depth, row in lines]
    signs = marks(rows)
    shown = [column for column in columns(rows) if (column.wide if wide else column.compact)]
    cells = {column.id: [column.cell(row) for _, row in lines] for column in shown}
    if not wide:
        shown = _fitting(shown, cells, names, max(map(len, signs.values()), default=0), width or COMPACT)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=Text(title) if title else None,
                 title_justify="left", caption=_caption(rows, shown), caption_justify="left")
    made.add_column("", no_wrap=True)
    made.add_column("variant", no_wrap=True, overflow="ellipsis")
    for column in shown:
        made.add_column(Text(column.title), justify="right" if column.right else "left", no_wrap=True,
                        overflow="ellipsis")
    for place, (_, row) in enumerate(lines):
        sign = signs[name_of(row)]
        made.add_row(Text(sign, style="" if state_of(row) == "ok" else "red"),
                     Text(names[place], style="bold" if "★" in sign else ""),
                     *(_text(cells[column.id][place]) for column in shown))
    return made


def marks(rows: Sequence[Row]) -> dict[str, str]:
    """By name: `★` for the winner, `*` for a variant on the Pareto line, and the state of one that is not ok."""
    by = chosen(rows)
    front = mark(rows, *by) if by else set()

    def sign(row: Row) -> str:
        if state_of(row) != "ok":
            return state_of(row)
        return ("★" if group(row, "verdict").get("winner") else "") + ("*" if name_of(row) in front else "")

    return {name_of(row): sign(row) for row in rows}


def legend(rows: Sequence[Row], shown: Sequence[Column]) -> list[str]:
    """What the marks of this table mean, and why figures are missing; only what occurs."""
    found, by = [], chosen(rows)
    signs = "".join(marks(rows).values())
    if "★" in signs:
        found.append("★ the winner by the recipe's goals")
    if "*" in signs and by:
        found.append(f"* on the Pareto line of {by[0]} against {by[1]}: no other is as good and cheaper")
    cells = [(column, row, column.cell(row)) for column in shown for row in rows]
    if any("~" in cell.text for _, _, cell in cells):
        found.append("~ estimated, not measured")
    if any(column.id.endswith((" parent", " base")) for column in shown):
        found.append("Δ paired difference with its 95% interval, green or red where it leaves 0 out and p <= .05")
    ids = {column.id for column in shown}
    if "ratio" in ids and any(cell.value is not None for column, _, cell in cells if column.id == "ratio"):
        found.append("J/base: energy per token against base, ↓ saves, ↑ costs more, = no saving shown")
    if {"speed", "energy"} & ids:
        found.append(f"speed and energy at batch {batch_of(rows)}")
    found += zeros_note(rows)
    if any(group(row, "transform").get("simulated") for row in rows):
        found.append("simulated: compression is imitated in full precision; its size, speed and energy are not those "
                     "of the real thing")
    return found + _nulls(shown, rows)


def failures(rows: Sequence[Row]) -> list[str]:
    """`tuned-w2 broken: why`, for every row that is not ok, with what to do about it, which is said last."""
    return [f"{name_of(row)} {_short(status_text(row), 3 * REASON)}" for row in rows if state_of(row) != "ok"]


def goal_lines(rows: Sequence[Row]) -> list[str]:
    """The verdict in words: the winner, or that there is none, and who misses which goal."""
    judged = [(row, goals_of(row)) for row in rows if goals_of(row)]
    if not judged:
        return []
    winner = next((name_of(row) for row in rows if group(row, "verdict").get("winner")), None)
    missed: dict[str, list[str]] = {}
    for row, goals in judged:
        for goal in goals:
            if goal.get("met") is False:
                missed.setdefault(str(goal.get("goal")), []).append(f"{name_of(row)} ({goal.get('detail')})")
    return [f"winner: {winner}" if winner else "no variant meets every goal",
            *(_short(f"missed: {goal}: {', '.join(who)}", 2 * REASON) for goal, who in missed.items())]


def rows_as_json(rows: Sequence[Row]) -> str:
    """The rows in the order of the tree, as JSON: sorted keys, null for NaN, so the same rows give the same text."""
    return json.dumps([_finite(row) for _, row in tree(rows)], indent=1,
                      sort_keys=True, ensure_ascii=False, allow_nan=False)


# ------------------------------------------------------------------------------------------------------------- helpers


def _name(depth: int, row: Row) -> str:
    return ("  " * (depth - 1) + "└ " if depth else "") + name_of(row)


def _fitting(shown: list[Column], cells: dict[str, list[Cell]], names: list[str], signs: int,
             width: int) -> list[Column]:
    """Without the columns that can best be spared, until the rest fits."""
    from rich.cells import cell_len

    def wide(column: Column) -> int:
        return max(cell_len(text) for text in (column.title, *(cell.text for cell in cells[column.id])))

    room = width - signs - max([7, *map(cell_len, names)]) - 4
    sparable = sorted((column for column in shown if column.keep), key=lambda column: -column.keep)
    dropped: set[str] = set()
    while sparable and sum(wide(column) + 2 for column in shown if column.id not in dropped) > room:
        dropped.add(sparable.pop(0).id)
    return [column for column in shown if column.id not in dropped]


def _caption(rows: Sequence[Row], shown: Sequence[Column]) -> Text:
    from rich.text import Text

    lines = [("; ".join(legend(rows, shown)), "dim"), *((line, "red") for line in failures(rows)),
             *((line, "bold" if not place else "") for place, line in enumerate(goal_lines(rows))),
             *((_short(line, 2 * REASON), "") for line in name_and_lines(rows))]
    return Text("\n").join(Text(text, style=style) for text, style in lines if text)


def _text(cell: Cell) -> Text:
    from rich.text import Text

    return Text(cell.text, style=STYLES[cell.tone])


def _nulls(shown: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """`- disk: why`, for columns that no whole row has a figure in."""
    whole = [row for row in rows if state_of(row) == "ok" and group(row, "quality")]
    found = []
    for column in shown:
        if column.id == "what" or column.id.endswith((" parent", " base")) or column.title.startswith("J/base"):
            continue
        cells = [column.cell(row) for row in whole]
        if cells and all(cell.value is None for cell in cells):
            made = [cell for row, cell in zip(whole, cells, strict=True) if group(row, "transform").get("kind")]
            found.append(_short(f"- {column.title}: {(made or cells)[0].tip}"))  # nobody built the base
    if any(column.id == "energy" for column in shown) and "J/token" not in "".join(found):
        missing = sorted({figure(row, "energy", batch_of(rows), "joules_per_token").method for row in whole
                          if figure(row, "energy", batch_of(rows), "joules_per_token").value is None})
        found += [_short(f"- energy: {reason}") for reason in missing]
    return found


def _short(text: str, most: int = REASON) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most - 1] + "…"


def _finite(body: Any) -> Any:
    if isinstance(body, dict):
        return {str(key): _finite(value) for key, value in body.items()}
    if isinstance(body, list | tuple):
        return [_finite(value) for value in body]
    return None if isinstance(body, float) and not math.isfinite(body) else body

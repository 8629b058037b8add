"""Rows side by side as a table of the page: what `llmops compare` prints, figures down, variants across."""

from __future__ import annotations

from collections.abc import Sequence

from llmops.report.compare import Compared, Paired, compare
from llmops.report.figures import show, told
from llmops.report.markup import Child, Markup, tag
from llmops.report.reading import Row, group, name_of
from llmops.report.sections import scrolled
from llmops.report.words import marked, zeros_note

__all__ = ["side_by_side"]


def side_by_side(rows: Sequence[Row], paired: Paired | None = None) -> Markup:
    """Every score and cost of the rows, each against the first of them; its interval, and why where it cannot be.

    paired: see `report.compare`; without it scores of two runs are compared unpaired, and say so.
    """
    several = len({_run_of(row) for row in rows}) > 1
    by_name = {f"{_run_of(row)}/{name_of(row)}" if several else name_of(row): row for row in rows}
    against, labels = next(iter(by_name)), list(by_name)
    lines = compare(rows, labels, against=against, paired=paired)
    head = tag("tr", tag("th", "figure", scope="col"), [
        tag("th", label, tag("br"), tag("span", marked(by_name[label]), class_="dim"),
            scope="col", class_="num") for label in labels])
    body = [tag("tr", tag("th", line.figure, scope="row"),
                [_cell(cell, line.kind, label == against) for label, cell in line.cells.items()]) for line in lines]
    note = (f"Against {against}: scores as value less reference, paired where both answered the same items; costs as a "
            f"factor. 95% intervals; ~ estimated{''.join(f'; {said}' for said in zeros_note(rows))}.")
    table = tag("table", tag("caption", "Side by side", class_="unseen"), tag("thead", head), tag("tbody", body),
                class_="plain")
    return tag("section", tag("h2", "Side by side", id="side"), tag("p", note, class_="dim"),
               scrolled("Table, side by side", table), aria_labelledby="side")


def _run_of(row: Row) -> str:
    return str(group(row, "identity").get("run") or "")


def _cell(cell: Compared, kind: str, reference: bool) -> Markup:
    parts: list[Child] = [show(cell.value, with_interval=kind == "delta")]
    tip = told(cell.value)
    if not reference and cell.problem:
        parts += [tag("br"), tag("span", f"not comparable: {cell.problem}", class_="dim why")]
    elif not reference and cell.difference is not None and cell.difference.value is not None:
        tone = {True: "good", False: "bad"}.get(cell.better, "dim") if cell.better is not None else "dim"
        unpaired = " unpaired" if cell.difference.method.startswith("unpaired") else ""
        text = show(cell.difference, with_interval=True, difference=kind == "delta")
        parts += [tag("br"), tag("span", f"{text}{' x' if kind == 'ratio' else ''}{unpaired}", class_=tone)]
        tip += f"; difference: {told(cell.difference)}"
    return tag("td", parts, class_="num", title=tip)

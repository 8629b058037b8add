"""The upper half of the page: what came out, the tree, the table. (The charts: `fronts`.)

Every function takes a `Page` and returns markup, empty where there is nothing to show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmops.report import charts
from llmops.report.columns import Cell, columns
from llmops.report.figures import show, told
from llmops.report.markup import Markup, tag
from llmops.report.reading import (
    Row,
    batch_of,
    cost,
    figure,
    goals_of,
    group,
    kind_of,
    main_score,
    name_of,
    parent_of,
    quantity,
    saving,
    score,
    score_ids,
    state_of,
    status_text,
    tree,
    versus,
)
from llmops.report.table import legend, marks
from llmops.report.words import ZEROS_NOTE, what

__all__ = ["NOTHING", "Page", "alike", "family", "outcome", "scrolled", "sign", "tabled"]

NOTHING = Markup("")


@dataclass
class Page:
    """The rows in the order of the tree, and what every section needs to know of them."""

    rows: Sequence[Row]
    lines: list[tuple[int, Row]] = field(init=False)
    batch: str = field(init=False)
    main: str | None = field(init=False)
    signs: dict[str, str] = field(init=False)
    ids: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        self.lines = tree(self.rows)
        self.rows = [row for _, row in self.lines]
        self.batch, self.main, self.signs = batch_of(self.rows), main_score(self.rows), marks(self.rows)
        self.ids = {id(row): f"v{place}" for place, row in enumerate(self.rows)}

    def id(self, row: Row) -> str:
        """The anchor of a row's details: by its place, since names are no safe ids."""
        return self.ids[id(row)]

    def link(self, row: Row) -> Markup:
        return tag("a", name_of(row), href=f"#{self.id(row)}")

    def badge(self, row: Row) -> list[Markup]:
        """What is special about a row: not ok, winner, on the line, simulated, zeros."""
        found = []
        if state_of(row) != "ok":
            found.append(tag("span", state_of(row), class_="badge bad", title=status_text(row)))
        if group(row, "verdict").get("winner"):
            found.append(tag("span", "★ winner", class_="badge good"))
        if "*" in self.signs[name_of(row)]:
            found.append(tag("span", "Pareto", class_="badge", title="no other is as good and cheaper"))
        if group(row, "transform").get("simulated"):
            found.append(tag("span", "simulated", class_="badge bad", title="imitated in full precision"))
        if group(row, "transform").get("sparsity_saves"):
            found.append(tag("span", "zeros save no time", class_="badge dim",
                             title=ZEROS_NOTE.removeprefix("† ")))
        return found


# ------------------------------------------------------------------------------------------------------------- outcome


def outcome(page: Page) -> Markup:
    """The verdict: winner, facts about it, how every goal was met."""
    winner = next((row for row in page.rows if group(row, "verdict").get("winner")), None)
    judged = any(goals_of(row) for row in page.rows)
    if winner is not None:
        head = tag("p", tag("strong", page.link(winner)), " wins by the recipe's goals: ", what(winner), ".",
                   class_="verdict good")
        facts = _facts(page, winner)
    else:
        head = tag("p", "No variant meets every goal." if judged else "The recipe sets no goals, so nothing wins.",
                   class_="verdict bad" if judged else "verdict")
        facts = NOTHING
    lost = [row for row in page.rows if state_of(row) != "ok"]
    troubles = tag("ul", [tag("li", page.link(row), " ", status_text(row)) for row in lost],
                   class_="troubles") if lost else NOTHING
    said = (str(each) for row in page.rows for each in group(row, "verdict").get("warnings") or [])
    warnings = alike(said)
    cautions = tag("ul", [tag("li", each) for each in warnings], class_="cautions") if warnings else NOTHING
    return tag("section", tag("h2", "Outcome", id="outcome"), head, facts, _goals(page), troubles, cautions,
               aria_labelledby="outcome")


def alike(lines: Iterable[str]) -> list[str]:
    """Each line once; of lines that differ in figures alone the first, with how many more there are."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        found.setdefault(re.sub(r"\d+(\.\d+)?", "#", line), {})[line] = None
    return [next(iter(same)) + (f" (and {len(same) - 1} more, with other figures)" if len(same) > 1 else "")
            for same in found.values()]


def _facts(page: Page, row: Row) -> Markup:
    cards = []
    for score_id in score_ids(page.rows)[:3]:
        body = versus(row, score_id, "parent")
        delta = quantity(body.get("delta"), "")
        told_delta = f"{show(delta, with_interval=True, difference=True)} against {parent_of(row)}"
        note = told_delta if delta.value is not None else ""
        cards.append((score_id, score(row, score_id), note))
    ratio = figure(row, "energy", page.batch, "ratio_to_base")
    note = f"{saving(row, page.batch)}: {show(ratio, with_interval=True)} of base" if ratio.value is not None else ""
    cards.append(("energy per token", cost(row, "joules_per_token", page.batch), note))
    speed = figure(row, "latency", page.batch, "speed_ratio_to_base")
    cards.append(("decoding speed", cost(row, "decode_tokens_per_s", page.batch),
                  f"{show(speed, with_interval=True)} of base" if speed.value is not None else ""))
    cards.append(("size on disk", figure(row, "size", "disk_bytes"), _share(page, row)))
    return tag("dl", [tag("div", tag("dt", title), tag("dd", tag("b", show(found), title=told(found)),
                                                      tag("span", note or "not measured")
                                                      if note or found.value is None else None))
                      for title, found, note in cards], class_="cards")


def _share(page: Page, row: Row) -> str:
    base = next((each for each in page.rows if name_of(each) == "base"), None)
    own, other = figure(row, "size", "disk_bytes").value, figure(base, "size", "disk_bytes").value if base else None
    return f"{own / other:.0%} of base" if own is not None and other else ""


def _goals(page: Page) -> Markup:
    found: dict[str, dict[Any, list[Markup]]] = {}
    for row in page.rows:
        for goal in goals_of(row):
            met = goal.get("met") if isinstance(goal.get("met"), bool) else None
            cell = tag("span", page.link(row), title=str(goal.get("detail") or ""))
            found.setdefault(str(goal.get("goal")), {}).setdefault(met, []).append(cell)
    if not found:
        return NOTHING
    body = [tag("tr", tag("th", goal, scope="row"),
                [tag("td", [[", " if place else None, cell] for place, cell in enumerate(by.get(met, []))] or "-")
                 for met in (True, False, None)]) for goal, by in found.items()]
    head = tag("tr", [tag("th", each, scope="col") for each in ("Goal", "✓ met by", "✗ missed by", "? unknown")])
    return scrolled("Goals", tag("table", tag("thead", head), tag("tbody", body), class_="plain"))


def scrolled(label: str, content: Markup) -> Markup:
    """Content that scrolls sideways by itself on a narrow screen, reachable by keyboard."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


# ---------------------------------------------------------------------------------------------------------------- tree


def family(page: Page) -> Markup:
    """The variants as a nested list."""
    def branch(start: int) -> tuple[Markup, int]:
        """The list that begins at `start`, and where the next one does."""
        depth, place, items = page.lines[start][0], start, []
        while place < len(page.lines) and page.lines[place][0] >= depth:
            row, below = page.lines[place][1], NOTHING
            place += 1
            if place < len(page.lines) and page.lines[place][0] > depth:
                below, place = branch(place)
            items.append(tag("li", _node(page, row), below))
        return tag("ul", items), place

    if not page.lines:
        return NOTHING
    return tag("section", tag("h2", "Variants", id="tree"), tag("div", branch(0)[0], class_="tree"),
               aria_labelledby="tree")


def _node(page: Page, row: Row) -> Markup:
    parts: list[Markup | None] = [sign(kind_of(row)), tag("b", page.link(row)), tag("span", what(row), class_="dim")]
    if page.main is not None and (found := score(row, page.main)).value is not None:
        parts.append(tag("span", show(found, with_interval=True), title=told(found), class_="figure"))
    teacher = group(row, "identity").get("teacher")
    parts.append(tag("span", f"taught by {teacher}", class_="dim") if teacher else None)
    return tag("div", [[part, " "] for part in parts if part], page.badge(row), class_="node")


def sign(kind: str) -> Markup:
    """The mark of a kind of step, as a picture in a line of text."""
    return tag("svg", charts.shape(kind, 8, 8), viewBox="0 0 16 16", class_="sign", role="img", aria_label=kind)


# --------------------------------------------------------------------------------------------------------------- table


def tabled(page: Page) -> Markup:
    """Every variant and every column; sortable, filterable, provenance in each cell's title."""
    shown = [column for column in columns(page.rows) if column.wide]
    head = [_head("", "marks", "sign"), _head("variant", "the variant, children under their parent", "name")]
    head += [_head(column.title, column.long, "num" if column.right else "") for column in shown]
    body = []
    for place, (depth, row) in enumerate(page.lines):
        marked, state = page.signs[name_of(row)], state_of(row)
        cells = [tag("td", marked, class_="sign" if state == "ok" else "sign bad", data_v=marked,
                     title=status_text(row)),
                 tag("th", page.link(row), scope="row", class_=f"name depth{min(depth, 8)}", data_v=name_of(row),
                     title=status_text(row))]
        cells += [_cell(column.cell(row), column.right) for column in shown]
        body.append(tag("tr", cells, data_place=place, class_="won" if "★" in marked else None))
    notes = tag("ul", [tag("li", line) for line in legend(page.rows, shown)], class_="legend")
    hint = tag("p", "Sort by a heading. With the keyboard: Tab into the table, then the arrow keys; each figure says "
                    "where it came from.", class_="dim screen")
    tools = tag("p", tag("label", "Filter ", tag("input", type="search", id="filter", autocomplete="off")), " ",
                tag("output", "", id="count", for_="filter"), class_="tools screen")
    content = tag("table", tag("caption", "All variants", class_="unseen"), tag("thead", tag("tr", head)),
                  tag("tbody", body), id="rows", class_="wide")
    return tag("section", tag("h2", "Every variant", id="table"), tools, scrolled("Table of all variants", content),
               hint, notes, aria_labelledby="table")


def _head(title: str, long: str, class_: str) -> Markup:
    return tag("th", tag("button", title or "★", type="button", title=long, aria_label=f"{title or 'marks'}: {long}"),
               scope="col", class_=class_ or None)


def _cell(cell: Cell, right: bool) -> Markup:
    style = " ".join(part for part in ("num" if right else "", cell.tone) if part)
    return tag("td", cell.text, class_=style or None, title=cell.tip or None, data_v=_sortable(cell.value))


def _sortable(value: float | str | None) -> str | None:
    return None if value is None else f"{value:.9g}" if isinstance(value, float | int) else value

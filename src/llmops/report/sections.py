"""The upper half of the page: what came out, the tree, the charts, the table.

Every function takes a `Page` and returns markup, empty where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmops.report import charts
from llmops.report.columns import Cell, columns
from llmops.report.figures import show, told
from llmops.report.markup import Markup, tag
from llmops.report.pareto import Point, chosen, pareto, points
from llmops.report.reading import (
    COSTS,
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
    rising,
    saving,
    score,
    score_ids,
    state_of,
    status_text,
    tree,
    versus,
)
from llmops.report.table import legend, marks
from llmops.report.words import what

__all__ = ["NOTHING", "Page", "charted", "family", "outcome", "scrolled", "tabled"]

CHARTED = ("joules_per_token", "inter_token_ms", "first_token_ms", "disk_bytes", "weights_bytes")
KINDS = ("base", "finetune", "prune", "quantize", "distill")
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
                             title="zeros in dense tensors: no time saved (N:M only where a kernel for it "
                                   "runs), bytes only when compressed on disk"))
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
    warnings = list(dict.fromkeys(said))
    cautions = tag("ul", [tag("li", each) for each in warnings], class_="cautions") if warnings else NOTHING
    return tag("section", tag("h2", "Outcome", id="outcome"), head, facts, _goals(page), troubles, cautions,
               aria_labelledby="outcome")


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
                                                      tag("span", note) if note else None))
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
    parts: list[Markup | None] = [_sign(kind_of(row)), tag("b", page.link(row)), tag("span", what(row), class_="dim")]
    if page.main is not None and (found := score(row, page.main)).value is not None:
        parts.append(tag("span", show(found, with_interval=True), title=told(found), class_="figure"))
    teacher = group(row, "identity").get("teacher")
    parts.append(tag("span", f"taught by {teacher}", class_="dim") if teacher else None)
    return tag("div", [[part, " "] for part in parts if part], page.badge(row), class_="node")


def _sign(kind: str) -> Markup:
    return tag("svg", charts.shape(kind, 8, 8), viewBox="0 0 16 16", class_="sign", role="img", aria_label=kind)


# -------------------------------------------------------------------------------------------------------------- charts


def charted(page: Page) -> Markup:
    """One chart for every score and cost that at least one variant has; one of them is shown at a time."""
    found = {(score_id, by): points(page.rows, score_id, by) for score_id in score_ids(page.rows) for by in CHARTED}
    pairs = [pair for pair, placed in found.items() if placed]
    if not pairs:
        return NOTHING
    first = chosen(page.rows)
    shown = first if first in pairs else pairs[0]
    figures = [_chart(page, *pair, found[pair], pair == shown) for pair in pairs]
    pickers = [_picker("Score", "score", {each: each for each, _ in pairs}, shown[0]),
               _picker("Against", "cost", {by: COSTS[by].title for _, by in pairs}, shown[1])]
    return tag("section", tag("h2", "What it is worth against what it costs", id="charts"),
               tag("div", pickers, class_="pickers"), figures, aria_labelledby="charts")


def _picker(title: str, group_name: str, choices: dict[str, str], picked: str) -> Markup:
    return tag("fieldset", tag("legend", title), [
        tag("label", tag("input", type="radio", name=group_name, value=value, checked=value == picked),
            tag("span", label)) for value, label in choices.items()])


def _chart(page: Page, score_id: str, by: str, found: Sequence[Point], shown: bool) -> Markup:
    placed, front = {point.name for point in found}, pareto(found)
    dots = [charts.Dot(name_of(row), kind_of(row), cost(row, by, page.batch), score(row, score_id),
                       _tip(page, row, score_id, by), f"#{page.id(row)}", name_of(row) in front,
                       bool(group(row, "verdict").get("winner"))) for row in page.rows if name_of(row) in placed]
    less, guessed = not rising(page.rows, score_id), [dot.x.provenance == "estimated" for dot in dots]
    at = f", batch {page.batch}" if "*" in COSTS[by].path else ""
    x_title = f"{COSTS[by].title}{at}{', estimated' if all(guessed) else ''}"
    y_title = f"{score_id}{', less is better: axis turned' if less else ''}"
    picture = charts.scatter(dots, label=f"{score_id} against {COSTS[by].title}, {len(dots)} variants", x_title=x_title,
                             y_title=y_title, y_less=less)
    absent = [f"{name_of(row)} ({_absence(page, row, score_id, by)})" for row in page.rows
              if name_of(row) not in placed]
    line = (f"Pareto line: {', '.join(sorted(front))}. Further left is cheaper, further up is better. Bars are 95% "
            "intervals.")
    caption = tag("figcaption", _key(dots), tag("p", line),
                  tag("p", "Not shown: ", "; ".join(absent), class_="dim") if absent else None)
    return tag("figure", scrolled(f"Chart of {score_id} against {COSTS[by].title}", picture), caption,
               class_="chart on" if shown else "chart", data_score=score_id, data_cost=by)


def _absence(page: Page, row: Row, score_id: str, by: str) -> str:
    if state_of(row) != "ok":
        return state_of(row)
    missing = [found.method for found in (score(row, score_id), cost(row, by, page.batch)) if found.value is None]
    return missing[0] if missing else "other items, workload or machine, so not comparable"


def _tip(page: Page, row: Row, score_id: str, by: str) -> str:
    worth, price = score(row, score_id), cost(row, by, page.batch)
    return (f"{name_of(row)} ({what(row)}): {score_id} {show(worth, with_interval=True)}; "
            f"{COSTS[by].title} {show(price, with_interval=True)}, {price.provenance}")


def _key(dots: Sequence[charts.Dot]) -> Markup:
    kinds = [kind for kind in KINDS if any(dot.kind == kind for dot in dots)]
    entries: list[Markup] = [tag("li", _sign(kind), " ", kind) for kind in kinds]
    if any("estimated" in (dot.x.provenance, dot.y.provenance) for dot in dots):
        hollow = tag("svg", charts.shape("base", 8, 8, hollow=True), viewBox="0 0 16 16", class_="sign",
                     aria_hidden="true")
        entries.append(tag("li", hollow, " hollow: estimated"))
    if any(dot.winner for dot in dots):
        ring = tag("svg", tag("circle", cx=8, cy=8, r=6.5, class_="winner"), viewBox="0 0 16 16", class_="sign",
                   aria_hidden="true")
        entries.append(tag("li", ring, " winner"))
    return tag("ul", entries, class_="key")


# --------------------------------------------------------------------------------------------------------------- table


def tabled(page: Page) -> Markup:
    """Every variant and every column; sortable, filterable, provenance in each cell's title."""
    shown = [column for column in columns(page.rows) if column.wide]
    head = [_head("", "marks", "sign"), _head("variant", "the variant, children under their parent", "name")]
    head += [_head(column.title, column.long, "num" if column.right else "") for column in shown]
    body = []
    for place, (depth, row) in enumerate(page.lines):
        sign, state = page.signs[name_of(row)], state_of(row)
        cells = [tag("td", sign, class_="sign" if state == "ok" else "sign bad", data_v=sign, title=status_text(row)),
                 tag("th", page.link(row), scope="row", class_=f"name depth{min(depth, 8)}", data_v=name_of(row),
                     title=status_text(row))]
        cells += [_cell(column.cell(row), column.right) for column in shown]
        body.append(tag("tr", cells, data_place=place, class_="won" if "★" in sign else None))
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

"""Score against cost: the Pareto fronts of the page, one for every score, cost and batch size that was measured.

One of them is shown at a time where scripts run (radio buttons: Tab to a row, arrow keys within it), all of them one
after the other where none do, and on paper the one that was picked. Costs that no batch changes, as bytes, have one
chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmops.report import charts
from llmops.report.figures import show
from llmops.report.markup import Markup, tag
from llmops.report.pareto import Point, chosen, pareto, points
from llmops.report.reading import (
    COSTS,
    Row,
    batches,
    cost,
    group,
    kind_of,
    name_of,
    rising,
    score,
    score_ids,
    state_of,
)
from llmops.report.sections import NOTHING, Page, scrolled, sign
from llmops.report.words import marked

__all__ = ["CHARTED", "charted"]

CHARTED = ("joules_per_token", "inter_token_ms", "first_token_ms", "disk_bytes", "weights_bytes")
KINDS = ("base", "finetune", "prune", "quantize", "distill")
Front = tuple[str, str, str | None]  # score, cost, batch size; None for a cost that has none


def charted(page: Page) -> Markup:
    """One chart for every score, cost and batch size that at least one variant has; one of them is shown at a time."""
    sizes = batches(page.rows) or [page.batch]
    found: dict[Front, list[Point]] = {
        (score_id, by, batch): points(page.rows, score_id, by, batch) for score_id in score_ids(page.rows)
        for by in CHARTED for batch in (sizes if "*" in COSTS[by].path else [None])}
    fronts = [front for front, placed in found.items() if placed]
    if not fronts:
        return NOTHING
    first = chosen(page.rows)
    wanted = [front for front in fronts if front[:2] == first] or fronts
    shown = next((front for front in wanted if front[2] in (page.batch, None)), wanted[0])
    figures = [_chart(page, front, found[front], front == shown) for front in fronts]
    drawn = [batch for batch in sizes if any(front[2] == batch for front in fronts)]
    pickers = [_picker("Score", "score", {each[0]: each[0] for each in fronts}, shown[0]),
               _picker("Against", "cost", {each[1]: COSTS[each[1]].title for each in fronts}, shown[1])]
    if len(drawn) > 1:
        pickers.append(_picker("Batch size", "batch", {batch: batch for batch in drawn}, shown[2] or drawn[0]))
    return tag("section", tag("h2", "What it is worth against what it costs", id="charts"),
               tag("div", pickers, class_="pickers"), figures, aria_labelledby="charts")


def _picker(title: str, group_name: str, choices: Mapping[str, str], picked: str) -> Markup:
    return tag("fieldset", tag("legend", title), [
        tag("label", tag("input", type="radio", name=group_name, value=value, checked=value == picked),
            tag("span", label)) for value, label in choices.items()])


def _chart(page: Page, front: Front, found: Sequence[Point], shown: bool) -> Markup:
    score_id, by, batch = front
    placed, best = {point.name for point in found}, pareto(found)
    dots = [charts.Dot(name_of(row), kind_of(row), cost(row, by, batch or page.batch), score(row, score_id),
                       _tip(row, front), f"#{page.id(row)}", name_of(row) in best,
                       bool(group(row, "verdict").get("winner"))) for row in page.rows if name_of(row) in placed]
    less, guessed = not rising(page.rows, score_id), [dot.x.provenance == "estimated" for dot in dots]
    at = f", batch {batch}" if batch else ""
    x_title = f"{COSTS[by].title}{at}{', estimated' if all(guessed) else ''}"
    y_title = f"{score_id}{', less is better: axis turned' if less else ''}"
    name = f"{score_id} against {COSTS[by].title}{at}"
    picture = charts.scatter(dots, label=f"{name}, {len(dots)} variants", x_title=x_title, y_title=y_title, y_less=less)
    absent = [f"{name_of(row)} ({_absence(row, front)})" for row in page.rows if name_of(row) not in placed]
    line = (f"Pareto line: {', '.join(sorted(best))}. Further left is cheaper, further up is better. Bars are 95% "
            "intervals; one without an end goes on beyond the picture.")
    caption = tag("figcaption", _key(dots), tag("p", line),
                  tag("p", "Not shown: ", "; ".join(absent), class_="dim") if absent else None)
    return tag("figure", scrolled(f"Chart of {name}", picture), caption,
               class_="chart on" if shown else "chart", data_score=score_id, data_cost=by, data_batch=batch)


def _absence(row: Row, front: Front) -> str:
    if state_of(row) != "ok":
        return state_of(row)
    figures = (score(row, front[0]), cost(row, front[1], front[2] or "1"))
    missing = [found.method for found in figures if found.value is None]
    return missing[0] if missing else "other items, workload or machine, so not comparable"


def _tip(row: Row, front: Front) -> str:
    score_id, by, batch = front
    worth, price = score(row, score_id), cost(row, by, batch or "1")
    return (f"{name_of(row)} ({marked(row)}): {score_id} {show(worth, with_interval=True)}; {COSTS[by].title}"
            f"{f' at batch {batch}' if batch else ''} {show(price, with_interval=True)}, {price.provenance}")


def _key(dots: Sequence[charts.Dot]) -> Markup:
    kinds = [kind for kind in KINDS if any(dot.kind == kind for dot in dots)]
    entries: list[Markup] = [tag("li", sign(kind), " ", kind) for kind in kinds]
    if any("estimated" in (dot.x.provenance, dot.y.provenance) for dot in dots):
        hollow = tag("svg", charts.shape("base", 8, 8, hollow=True), viewBox="0 0 16 16", class_="sign",
                     aria_hidden="true")
        entries.append(tag("li", hollow, " hollow: estimated"))
    if any(dot.winner for dot in dots):
        ring = tag("svg", tag("circle", cx=8, cy=8, r=6.5, class_="winner"), viewBox="0 0 16 16", class_="sign",
                   aria_hidden="true")
        entries.append(tag("li", ring, " winner"))
    return tag("ul", entries, class_="key")

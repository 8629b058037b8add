"""The page's section on groups: a table for every score and column, from the rows alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmops.report.figures import number, show, told
from llmops.report.groups import SMALL, columns_of, worst_group
from llmops.report.markup import Markup, tag
from llmops.report.reading import Row, group, quantity, rising, score_ids
from llmops.report.sections import NOTHING, Page, scrolled

__all__ = ["section"]


def section(page: Page) -> Markup:
    """A table for every score and column: a line a variant, a cell a group, the worst one marked."""
    tables = [_table(page, score_id, column) for score_id in score_ids(page.rows)
              for column in _named(page.rows, score_id)]
    if not tables:
        return NOTHING
    note = ("Score of every group, and beneath it the paired difference from the parent with its 95% interval; bold: "
            f"the group that lost most, where one lost (of those with at least {SMALL} items or clusters). A group's p "
            "is corrected by Holm over its column.")
    return tag("section", tag("h2", "Groups", id="slices"), tag("p", note, class_="dim"), tables,
               aria_labelledby="slices")


def _named(rows: Iterable[Row], score_id: str) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in group(row, "quality", score_id, "slices")))


def _table(page: Page, score_id: str, column: str) -> Markup:
    rows = [row for row in page.rows if group(row, "quality", score_id, "slices", column)]
    names = list(dict.fromkeys(name for row in rows for name in group(row, "quality", score_id, "slices", column)))
    head = tag("tr", tag("th", "variant", scope="col"), [tag("th", f"{column}={name}", scope="col", class_="num")
                                                         for name in names])
    body = []
    for row in rows:
        worst = {each: name for each, name, _ in worst_group(row, score_id, "parent")}.get(column)
        compared = columns_of(row, score_id, "parent").get(column, {}).get("groups", {})
        cells = [_cell(group(row, "quality", score_id, "slices", column, name), compared.get(name), name == worst,
                       rising(page.rows, score_id)) for name in names]
        body.append(tag("tr", tag("th", page.link(row), scope="row"), cells))
    title = f"{score_id} by {column}"
    return tag("div", tag("h3", title), scrolled(title, tag(
        "table", tag("caption", title, class_="unseen"), tag("thead", head), tag("tbody", body), class_="plain")))


def _cell(body: Mapping[str, Any], compared: Mapping[str, Any] | None, worst: bool, up: bool) -> Markup:
    value = quantity(body.get("value"), "the group is not in this variant's items")
    parts: list[Markup | str] = [tag("b", show(value)) if worst else show(value)]
    told_more = told(value)
    if compared:
        delta = quantity(compared.get("delta"), "no difference is in the row")
        p = compared.get("p_holm")
        shown = (delta.ci95 is not None and not delta.ci95[0] <= 0 <= delta.ci95[1] and delta.value is not None
                 and isinstance(p, int | float) and p <= 0.05)
        tone = ("good" if (delta.value > 0) == up else "bad") if shown and delta.value is not None else "dim"
        parts += [tag("br"), tag("span", show(delta, with_interval=True, difference=True), class_=tone)]
        told_more += f"; n = {compared.get('n')}, {compared.get('gained')} won, {compared.get('lost')} lost"
        if isinstance(compared.get("p_holm"), int | float):
            told_more += f", Holm p = {number(compared['p_holm'])}"
    return tag("td", parts, title=told_more, class_="num")

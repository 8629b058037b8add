"""What building the variants cost, as a table with bars, and how their training went, as small loss curves."""

from __future__ import annotations

from llmops.quantity import Quantity
from llmops.report import charts
from llmops.report.figures import number, show, told
from llmops.report.markup import Markup, join, tag
from llmops.report.reading import Row, figure, group, loss_curve, name_of, what
from llmops.report.sections import NOTHING, Page, scrolled

__all__ = ["building", "curves"]

BUILT = (("own energy", "energy_j"), ("with ancestors", "chain_energy_j"), ("time", "wall_s"), ("tokens", "tokens"),
         ("FLOP", "flops"), ("scoring", "evaluate_energy_j"), ("break-even", "break_even_tokens"))


def building(page: Page) -> Markup:
    """What each variant took to build, a bar for its energy: dark its own step, light what it stands on."""
    rows = [row for row in page.rows if group(row, "building")]
    spent = [figure(row, "building", name).value for row in rows for name in ("energy_j", "chain_energy_j")]
    most = max((value for value in spent if value is not None), default=0.0)
    if not rows:
        return NOTHING
    head = tag("tr", [tag("th", each, scope="col", class_="num" if place > 1 else None)
                      for place, each in enumerate(["variant", "energy", *(title for title, _ in BUILT), "CO2e"])])
    body = [tag("tr", tag("th", page.link(row), scope="row"), tag("td", _bar(row, most)),
                [_quantity(figure(row, "building", name)) for _, name in BUILT],
                _quantity(figure(row, "carbon", "building_g"))) for row in rows]
    note = ("Dark: the variant's own step; light: everything it stands on, the teacher included. Break-even: output "
            "tokens after which the energy saved per token has paid for all of it. Scoring is not part of building.")
    return tag("section", tag("h2", "What building cost", id="building"),
               scrolled("Cost of building", tag("table", tag("thead", head), tag("tbody", body), class_="plain")),
               tag("p", note, class_="dim"), aria_labelledby="building")


def _bar(row: Row, most: float) -> Markup:
    own, chain = (figure(row, "building", name).value or 0.0 for name in ("energy_j", "chain_energy_j"))
    if not most:
        return NOTHING
    return tag("svg", [tag("rect", x=0, y=2, width=f"{120 * value / most:.1f}", height=10, class_=style)
                       for value, style in ((chain, "chain"), (own, "own"))],
               viewBox="0 0 120 14", class_="bar", aria_hidden="true")


def _quantity(found: Quantity) -> Markup:
    return tag("td", show(found), class_="num dim" if found.value is None else "num", title=told(found))


# -------------------------------------------------------------------------------------------------------------- curves


def curves(page: Page) -> Markup:
    """A small loss curve for every variant that was trained."""
    found = [(row, points) for row in page.rows if (points := loss_curve(row))]
    if not found:
        return NOTHING
    figures = [tag("figure", tag("figcaption", page.link(row), f" {what(row)}: {number(points[0][1])} to "
                                 f"{number(points[-1][1])} in {number(points[-1][0], decimals=0)} steps"),
                   charts.curve(points, label=f"training loss of {name_of(row)}, from {number(points[0][1])} to "
                                              f"{number(points[-1][1])}")) for row, points in found]
    return tag("section", tag("h2", "Training loss", id="loss"), tag("div", join(figures), class_="grid-of-curves"),
               aria_labelledby="loss")

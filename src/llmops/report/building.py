"""What building the variants cost, as a table with bars, and how their trainings went, as curves."""

from __future__ import annotations

from llmops.quantity import Quantity
from llmops.report import trainings
from llmops.report.figures import number, show, told
from llmops.report.markup import Markup, tag
from llmops.report.reading import (
    Row,
    attempts,
    figure,
    group,
    joules_per_trained_token,
    kind_of,
    looks,
    loss_curve,
    merges,
    name_of,
    quantity,
    trace,
    training_marks,
)
from llmops.report.sections import NOTHING, Page, scrolled
from llmops.report.trainings import MOST_OVERLAID, Mark, Training
from llmops.report.words import what

__all__ = ["building", "curves", "merge_cells"]

BUILT = (("own energy", "energy_j"), ("with ancestors", "chain_energy_j"), ("time", "wall_s"), ("tokens", "tokens"),
         ("FLOP", "flops"), ("scoring", "evaluate_energy_j"), ("break-even", "break_even_tokens"))


def building(page: Page) -> Markup:
    """What each variant took to build, a bar for its energy: dark its own step, light what it stands on."""
    rows = [row for row in page.rows if group(row, "building")]
    spent = [figure(row, "building", name).value for row in rows for name in ("energy_j", "chain_energy_j")]
    most = max((value for value in spent if value is not None), default=0.0)
    if not rows:
        return NOTHING
    titles = ["variant", "energy", *(title for title, _ in BUILT), "per token", "CO2e"]
    head = tag("tr", [tag("th", each, scope="col", class_="num" if place > 1 else None)
                      for place, each in enumerate(titles)])
    body = [tag("tr", tag("th", page.link(row), scope="row"), tag("td", _bar(row, most)),
                [_quantity(figure(row, "building", name)) for _, name in BUILT],
                _quantity(joules_per_trained_token(row)), _quantity(figure(row, "carbon", "building_g")))
            for row in rows]
    note = ("Dark: the variant's own step; light: everything it stands on, the teacher included. Break-even: output "
            "tokens after which the energy saved per token has paid for all of it. Per token: own energy for each "
            "token that ran through the model in training. Scoring is not part of building.")
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
    """How every training went: those of one kind over each other, then each alone."""
    rows = [row for row in page.rows if loss_curve(row)]
    if not rows:
        return NOTHING
    scales = dict.fromkeys(map(_scale, rows))
    together = [_together(page, [row for row in rows if _scale(row) == scale]) for scale in scales]
    each = tag("div", [_alone(page, row) for row in rows], class_="grid-of-curves")
    note = ("Faint: the loss as it was; strong: smoothed; diamonds: the held-out loss. R: went on after it was cut "
            "off; M: memory ran out; S: stopped early; B: the weights that were kept.")
    return tag("section", tag("h2", "Training loss", id="loss"), together, each, tag("p", note, class_="dim"),
               [_merge(page, row) for row in page.rows if merges(row)], aria_labelledby="loss")


def _scale(row: Row) -> str:
    """Which losses can be held against each other: those of next tokens; distillation and preferences have others."""
    method = str(group(row, "transform").get("method"))
    return kind_of(row) if method in ("lora", "full") else f"{kind_of(row)} with {method}"


def _training(row: Row) -> Training:
    return Training(name_of(row), loss_curve(row), looks(row), [Mark(*mark) for mark in training_marks(row)])


def _together(page: Page, rows: list[Row]) -> Markup:
    """Two to six trainings of one kind in a picture; losses of other kinds are on other scales."""
    rows = [row for row in rows if _training(row).drawn]
    if not 2 <= len(rows) <= MOST_OVERLAID:
        return NOTHING
    legend = tag("ul", [tag("li", trainings.sample(place), page.link(row), f" {what(row)}")
                        for place, row in enumerate(rows)], class_="key")
    label = f"smoothed training loss of {len(rows)} variants over their steps ({_scale(rows[0])})"
    return tag("figure", trainings.overlaid([_training(row) for row in rows], label),
               tag("figcaption", legend))


def _alone(page: Page, row: Row) -> Markup:
    points, held, spent = loss_curve(row), looks(row), joules_per_trained_token(row)
    said = f" {what(row)}: {number(points[0][1])} to {number(points[-1][1])} in {points[-1][0]:,.0f} steps"
    if held:
        said += f", held out {number(held[-1][1])}"
    if spent.value is not None:
        said += f", {show(spent)} in training"
    count = attempts(row)
    said += f", {count} attempts" if count and count > 1 else ""
    marks = [tag("li", tag("b", letter), f" {event}") for _, letter, event in training_marks(row)]
    return tag("figure", tag("figcaption", page.link(row), said), trainings.training(_training(row)),
               trainings.strip(trace(row, "learning_rate"), "learning rate", ""),
               trainings.strip(trace(row, "energy_j"), "energy so far", "J"),
               tag("ul", marks, class_="marks") if marks else None)


def _merge(page: Page, row: Row) -> Markup:
    """What merging an adapter into each of its possible bases changes, and which was taken."""
    head = tag("tr", [tag("th", each, scope="col") for each in ("merged into", "mean KL", "largest KL", "taken")])
    body = [tag("tr", tag("th", cells[0], scope="row"), [tag("td", cell, class_="num") for cell in cells[1:3]],
                tag("td", cells[3])) for cells in map(merge_cells, merges(row))]
    return tag("div", tag("h3", "Merging ", page.link(row)),
               tag("table", tag("thead", head), tag("tbody", body), class_="plain"))


def merge_cells(entry: dict[str, object]) -> tuple[str, str, str, str]:
    """(target, mean KL, largest KL, whether it was chosen) of one entry of `merges`."""
    def figure_of(value: object) -> str:
        if isinstance(value, dict):
            return show(quantity(value, ""))
        return f"{value:.3g} nats" if isinstance(value, int | float) else "-"

    return (str(entry.get("target") or "?"), figure_of(entry.get("kl_mean")), figure_of(entry.get("kl_max")),
            "yes" if entry.get("chosen") else "")

"""After how many tokens a variant has paid for itself, as curves.

All energy of a variant after N output tokens is E_build + N e; that of the base, which nobody had to build, is
N e_base. Their ratio is

    f(N) = r + E_build / (N e_base),    r = e / e_base,

so every curve falls towards its r, and meets 1 at the break-even N* = E_build / (e_base (1 - r)) of
`llmops.measure.cost`. The band is that of r alone, as the interval of N* is: it is drawn around the curve, and where
its upper edge never comes below 1 no saving was shown, however far to the right one looks. E_build is the whole chain,
the teacher included, and scoring the variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmops.quantity import Quantity
from llmops.report.charts import Axis
from llmops.report.figures import scaled, show, told
from llmops.report.markup import Markup, tag
from llmops.report.reading import Row, figure, group, name_of, saving, state_of
from llmops.report.sections import NOTHING, Page, scrolled
from llmops.report.trainings import sample

__all__ = ["Payback", "paybacks", "section"]

MOST = 6  # curves that can be told apart
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 74, 110, 14, 56
TOP_RATIO = 2.0
STEPS = 96
LETTER = 6.7


@dataclass(frozen=True)
class Payback:
    """built: J of everything a variant stands on, and of scoring it; base: J per token of the base; ratio: with its 95%
    interval."""

    row: Row
    built: float
    base: float
    ratio: Quantity

    def at(self, tokens: float, ratio: float | None = None) -> float:
        """Energy of the variant over that of the base, after so many output tokens, building included."""
        return (self.ratio.value or 0.0 if ratio is None else ratio) + self.built / (tokens * self.base)

    @property
    def turn(self) -> float:
        """Tokens at which an excess of all of the base's energy is left: where the curve enters the picture."""
        return self.built / self.base


def paybacks(page: Page) -> list[Payback]:
    """Of every variant whose building, energy and paired ratio are known; those that pay back soonest first."""
    found = []
    for row in page.rows:
        built, ratio = figure(row, "building", "chain_energy_j"), figure(row, "energy", page.batch, "ratio_to_base")
        each = figure(row, "energy", page.batch, "joules_per_token")
        if (state_of(row) == "ok" and group(row, "transform").get("kind") and built.value and ratio.value
                and each.value and min(built.value, ratio.value, each.value) > 0):
            base = each.value / ratio.value
            found.append(Payback(row, _paid(row, built.value, base, ratio.value), base, ratio))
    return sorted(found, key=lambda one: (figure(one.row, "building", "break_even_tokens").value or math.inf,
                                          one.ratio.value or 0.0))


def _paid(row: Row, built: float, base: float, ratio: float) -> float:
    """J that have to be won back: what the row's own break-even counts, else building and scoring."""
    tokens = figure(row, "building", "break_even_tokens").value
    if tokens is not None and tokens > 0 and ratio < 1:
        return tokens * base * (1 - ratio)
    scored = figure(row, "building", "evaluate_energy_j").value or 0.0
    return built + max(scored, 0.0)


def section(page: Page) -> Markup:
    """The curves of those that pay back soonest, and a line for every variant with its break-even or why there is none.
    """
    rows = [row for row in page.rows if "break_even_tokens" in group(row, "building") and group(
        row, "transform").get("kind")]
    if not rows:
        return NOTHING
    found = paybacks(page)
    drawn = found[:MOST]
    figures = tag("figure", scrolled("Chart of break-even", chart(drawn, page.batch)),
                  tag("figcaption", _key(page, drawn), tag("p", _caption(found)))) if drawn else tag(
        "p", "No curve can be drawn: energy of building and of a token are both needed.", class_="dim")
    return tag("section", tag("h2", "When it has paid for itself", id="breakeven"), figures, _table(page, rows),
               aria_labelledby="breakeven")


def _caption(found: Sequence[Payback]) -> str:
    left = f" {len(found) - MOST} more are in the table." if len(found) > MOST else ""
    return ("All energy of a variant, building and scoring included, over that of the base after so many output "
            "tokens; below 1 it has paid for itself. Band: 95% interval of the paired ratio; a band that never falls "
            "below 1 shows no saving." + left)


def chart(found: Sequence[Payback], batch: str) -> Markup:
    """f(N) over tokens on a log scale, the line at 1, and each break-even as a diamond with its interval."""
    turns = [one.turn for one in found]
    x_axis = Axis([min(turns) / 2, max(turns) * 300], "tokens", LEFT, WIDTH - RIGHT)
    floor = min(0.0, *(one.ratio.value or 0.0 for one in found))
    y_axis = Axis([floor, TOP_RATIO], "ratio", HEIGHT - BOTTOM, TOP, may_log=False)
    names = _heights([y_axis(min(one.at(x_axis.high), y_axis.high)) for one in found])
    curves = [[_band(one, x_axis, y_axis), _curve(one, place, x_axis, y_axis), _turn(one, x_axis, y_axis),
               tag("text", _short(name_of(one.row)), x=WIDTH - RIGHT + 6, y=f"{names[place] + 4:.1f}",
                   class_="name front-name", aria_hidden="true")] for place, one in enumerate(found)]
    one = f"{y_axis(1.0):.1f}"
    even = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=one, y2=one, class_="even")
    label = f"energy with building over that of the base, by output tokens, {len(found)} variants, batch {batch}"
    said = "; ".join(f"{name_of(one.row)}: {_said(one)}" for one in found)
    return tag("svg", tag("title", label), tag("desc", said), _axes(x_axis, y_axis), even, curves,
               viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{label}. {said}", class_="scatter")


def _said(one: Payback) -> str:
    tokens = figure(one.row, "building", "break_even_tokens")
    return f"pays back after {show(tokens, with_interval=True)} tokens" if tokens.value is not None else (
        f"no saving shown, ratio {show(one.ratio, with_interval=True)}")


def _short(name: str) -> str:
    most = int((RIGHT - 8) / LETTER)
    return name if len(name) <= most else name[:most - 1] + "…"


def _heights(wanted: Sequence[float], apart: float = 14.0) -> list[float]:
    """Heights for names, in the order wanted, at least a line apart."""
    found = dict[int, float]()
    last = -math.inf
    for place in sorted(range(len(wanted)), key=lambda place: wanted[place]):
        last = found[place] = max(wanted[place], last + apart)
    over = max(0.0, last - (HEIGHT - BOTTOM))
    return [found[place] - over for place in range(len(wanted))]


def _tokens(x_axis: Axis) -> list[float]:
    step = (x_axis.high / x_axis.low) ** (1 / STEPS)
    return [x_axis.low * step ** place for place in range(STEPS + 1)]


def _curve(one: Payback, place: int, x_axis: Axis, y_axis: Axis) -> Markup:
    points = [(tokens, one.at(tokens)) for tokens in _tokens(x_axis)]
    inside = [(tokens, value) for tokens, value in points if value <= y_axis.high]
    path = "L".join(f"{x_axis(tokens):.1f} {y_axis(value):.1f}" for tokens, value in inside)
    return tag("path", d=f"M{path}", class_=f"curve s{place}") if path else NOTHING


def _band(one: Payback, x_axis: Axis, y_axis: Axis) -> Markup:
    if one.ratio.ci95 is None:
        return NOTHING
    low, high = one.ratio.ci95
    many = _tokens(x_axis)
    upper = [(tokens, min(one.at(tokens, high), y_axis.high)) for tokens in many]
    lower = [(tokens, min(max(one.at(tokens, low), y_axis.low), y_axis.high)) for tokens in reversed(many)]
    points = " ".join(f"{x_axis(tokens):.1f},{y_axis(value):.1f}" for tokens, value in [*upper, *lower])
    return tag("polygon", points=points, class_="band")


def _turn(one: Payback, x_axis: Axis, y_axis: Axis) -> Markup:
    tokens = figure(one.row, "building", "break_even_tokens")
    if tokens.value is None or not x_axis.low <= tokens.value <= x_axis.high:
        return NOTHING
    x, y = x_axis(tokens.value), y_axis(1.0)
    bar = tag("path", d=f"M{x_axis(tokens.ci95[0]):.1f} {y:.1f}H{x_axis(tokens.ci95[1]):.1f}",
              class_="interval wide") if tokens.ci95 else NOTHING
    return tag("g", bar, tag("polygon", points=f"{x:.1f},{y - 6:.1f} {x + 5:.1f},{y:.1f} {x:.1f},{y + 6:.1f} "
                                               f"{x - 5:.1f},{y:.1f}", class_="mark base"))


def _axes(x_axis: Axis, y_axis: Axis) -> Markup:
    bottom = HEIGHT - BOTTOM
    columns = [[tag("line", x1=f"{x_axis(tick):.1f}", x2=f"{x_axis(tick):.1f}", y1=TOP, y2=bottom, class_="grid"),
                tag("text", _count(tick), x=f"{x_axis(tick):.1f}", y=bottom + 20, text_anchor="middle")]
               for tick in x_axis.ticks()]
    lines = [[tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y_axis(tick):.1f}", y2=f"{y_axis(tick):.1f}", class_="grid"),
              tag("text", f"{tick:g}", x=LEFT - 8, y=f"{y_axis(tick) + 4:.1f}", text_anchor="end")]
             for tick in (0.0, 0.5, 1.0, 1.5, 2.0)]
    middle = (TOP + bottom) / 2
    titles = [tag("text", "output tokens served (log scale)", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 12,
                  text_anchor="middle", class_="title"),
              tag("text", "energy over base, building included", x=16, y=middle, text_anchor="middle", class_="title",
                  transform=f"rotate(-90 16 {middle})")]
    return tag("g", columns, lines, titles, aria_hidden="true")


def _count(tokens: float) -> str:
    worth, prefix = scaled(tokens, "tokens")
    return f"{tokens / worth:g}{prefix}"


def _key(page: Page, drawn: Sequence[Payback]) -> Markup:
    return tag("ul", [tag("li", sample(place), page.link(one.row)) for place, one in enumerate(drawn)], class_="key")


def _table(page: Page, rows: Sequence[Row]) -> Markup:
    titles = ("variant", "building, all it stands on", "energy per token over base", "verdict", "break-even, tokens",
              "or why there is none")
    head = tag("tr", [tag("th", title, scope="col", class_="num" if place in (1, 2, 4) else None)
                      for place, title in enumerate(titles)])
    return scrolled("Break-even", tag("table", tag("caption", "Break-even", class_="unseen"), tag("thead", head),
                                      tag("tbody", [_line(page, row) for row in rows]), class_="plain"))


def _line(page: Page, row: Row) -> Markup:
    ratio, tokens = figure(row, "energy", page.batch, "ratio_to_base"), figure(row, "building", "break_even_tokens")
    verdict = saving(row, page.batch)
    return tag("tr", tag("th", page.link(row), scope="row"), _cell(figure(row, "building", "chain_energy_j")),
               _cell(ratio), tag("td", verdict, class_={"saves": "good", "costs more": "bad"}.get(verdict, "dim")),
               _cell(tokens), tag("td", "" if tokens.value is not None else tokens.method, class_="dim"))


def _cell(found: Quantity) -> Markup:
    return tag("td", show(found, with_interval=True), class_="num dim" if found.value is None else "num",
               title=told(found))

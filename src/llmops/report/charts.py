"""Charts as inline SVG: score against cost with intervals and the Pareto line, (loss curves: `trainings`).

Made by hand rather than with a plotting library: a chart is a few kB, prints, follows light and dark (colours are
classes of report.css), and each point is a link with a spoken name. Colour never carries meaning alone: each kind of
step has a shape, and a hollow point is an estimate. Axes turn logarithmic when the figures span more than a factor of
`LOG_FROM`; the score's axis is turned so that up is better, also for perplexity.

x, y are figures; px, py pixels of the view box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmops.quantity import Quantity
from llmops.report.figures import number, scaled
from llmops.report.markup import Markup, join, raw, tag

__all__ = ["Axis", "Dot", "scatter", "shape"]

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 16, 58
LOG_FROM = 12.0
LETTER = 7.4  # mean width of a label's letter
CAP = 3.5  # half the stroke across the end of an interval
MOST_NAMES = 40  # dots; with more, only those on the Pareto line are named
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Dot:
    """One variant on a chart. `href` leads to its details, `tip` says everything about it."""

    name: str
    kind: str
    x: Quantity
    y: Quantity
    tip: str
    href: str
    front: bool = False
    winner: bool = False


@dataclass
class Axis:
    """Figures in `unit` -> pixels between `start` and `end`. turned: less is further along."""

    values: Sequence[float]
    unit: str
    start: float
    end: float
    turned: bool = False
    may_log: bool = True
    log: bool = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        finite = [value for value in self.values if math.isfinite(value)] or [0.0, 1.0]
        self.low, self.high = min(finite), max(finite)
        self.log = self.may_log and self.low > 0 and self.high / self.low > LOG_FROM and self.unit != "fraction"
        if self.log:
            edge = (self.high / self.low) ** 0.06
            self.low, self.high = self.low / edge, self.high * edge
            return
        edge = (self.high - self.low) * 0.07 or abs(self.high) * 0.1 or 1.0
        lowest = -0.02 if self.unit == "fraction" else -math.inf
        self.low = max(self.low - edge, lowest if self.low >= 0 else -math.inf)
        self.high = min(self.high + edge, 1.02) if self.unit == "fraction" and self.high <= 1 else self.high + edge

    def __call__(self, value: float) -> float:
        """The pixel of a figure; figures beyond the axis stay at its edge."""
        value = min(max(value, self.low), self.high)
        share = (math.log(value / self.low) / math.log(self.high / self.low) if self.log
                 else (value - self.low) / (self.high - self.low))
        return self.start + (self.end - self.start) * (1 - share if self.turned else share)

    def ticks(self) -> list[float]:
        """Round figures within the axis, four to eight of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            many = [step * 10.0 ** power for power in decades for step in (1, 2, 5)]
            inside = [tick for tick in many if self.low <= tick <= self.high]
            return inside if len(inside) <= 8 else [tick for tick in inside if f"{tick:e}".startswith("1")]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough)
        first = math.ceil(self.low / step)
        return [round(step * each, 12) for each in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def told(self) -> tuple[Callable[[float], str], str]:
        """(how a tick is written, the unit that all ticks share)."""
        worth, unit = scaled(max(abs(self.high) / 1.07, 1e-12), self.unit)
        plain = [tick / worth for tick in self.ticks()]
        places = next((n for n in range(7) if all(abs(round(t, n) - t) < 1e-6 * max(1, abs(t)) for t in plain)), 3)
        return (lambda tick: f"{tick / worth:g}" if self.log or places > 4 else number(tick / worth, decimals=places)
                ), unit


def scatter(dots: Sequence[Dot], *, label: str, x_title: str, y_title: str, y_less: bool = False) -> Markup:
    """Dots with their intervals, the Pareto line through those at the `front`, names where there is room.

    y_less: less of the score is better, so its axis is turned.
    """
    x_axis = Axis(_ends([dot.x for dot in dots]), dots[0].x.unit, LEFT, WIDTH - RIGHT)
    y_axis = Axis(_ends([dot.y for dot in dots]), dots[0].y.unit, HEIGHT - BOTTOM, TOP, turned=y_less)
    front = sorted((dot for dot in dots if dot.front), key=lambda dot: (dot.x.value or 0, -y_axis(dot.y.value or 0)))
    places = [(dot, x_axis(dot.x.value or 0), y_axis(dot.y.value or 0)) for dot in dots]
    return tag("svg", _grid(x_axis, y_axis, x_title, y_title), _staircase(front, x_axis, y_axis),
               [_bars(dot, x_axis, y_axis) for dot in dots], _names(places, x_axis, y_axis),
               [_dot(dot, px, py) for dot, px, py in places],
               viewBox=f"0 0 {WIDTH} {HEIGHT}", role="group", aria_label=label, class_="scatter")


def shape(kind: str, x: float, y: float, *, hollow: bool = False, size: float = 6.0) -> Markup:
    """The mark of a kind of step: circle finetune, square quantize, triangle prune, diamond distill, ring base."""
    known = kind if kind in ("finetune", "quantize", "prune", "distill") else "base"
    style = f"mark {known} hollow" if hollow else f"mark {known}"
    corners = {"quantize": [(-.9, -.9), (.9, -.9), (.9, .9), (-.9, .9)], "prune": [(0, -1.2), (1.1, .9), (-1.1, .9)],
               "distill": [(0, -1.3), (1.2, 0), (0, 1.3), (-1.2, 0)]}.get(kind)
    if corners is None:
        return tag("circle", cx=_px(x), cy=_px(y), r=size, class_=style)
    path = " ".join(f"{_px(x + dx * size)},{_px(y + dy * size)}" for dx, dy in corners)
    return tag("polygon", points=path, class_=style)


# -------------------------------------------------------------------------------------------------------------- pieces


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _ends(quantities: Sequence[Quantity]) -> list[float]:
    """Every value and every end of an interval that is of the size of the values; wilder ones are cut at the edge."""
    values = [quantity.value for quantity in quantities if quantity.value is not None]
    span = (max(values) - min(values)) or abs(max(values)) or 1.0
    ends = [end for quantity in quantities for end in quantity.ci95 or ()]
    fit = [end for end in ends if min(values) - span / 2 <= end <= max(values) + span / 2]
    return [*values, *(end for end in fit if end > 0 or min(values) <= 0)]


def _grid(x_axis: Axis, y_axis: Axis, x_title: str, y_title: str) -> Markup:
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    x_text, x_unit = x_axis.told()
    y_text, y_unit = y_axis.told()
    columns = [[tag("line", x1=_px(x_axis(tick)), x2=_px(x_axis(tick)), y1=TOP, y2=bottom, class_="grid"),
                tag("text", x_text(tick), x=_px(x_axis(tick)), y=bottom + 20, text_anchor="middle")]
               for tick in x_axis.ticks()]
    lines = [[tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_px(y_axis(tick)), y2=_px(y_axis(tick)), class_="grid"),
              tag("text", y_text(tick), x=LEFT - 8, y=_px(y_axis(tick) + 4), text_anchor="end")]
             for tick in y_axis.ticks()]
    titles = [
        tag("text", _titled(x_title, x_unit, x_axis), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 12, text_anchor="middle",
            class_="title"),
        tag("text", _titled(y_title, y_unit, y_axis), x=16, y=middle, text_anchor="middle", class_="title",
            transform=f"rotate(-90 16 {middle})")]
    return tag("g", columns, lines, titles, aria_hidden="true")


def _titled(title: str, unit: str, axis: Axis) -> str:
    notes = [note for note in (unit, "log scale" if axis.log else "") if note]
    return f"{title} ({', '.join(notes)})" if notes else title


def _staircase(front: Sequence[Dot], x_axis: Axis, y_axis: Axis) -> Markup | None:
    """The line below which every variant is beaten by one on it."""
    if not front:
        return None
    path = [f"M{_px(x_axis(front[0].x.value or 0))} {HEIGHT - BOTTOM}"]
    for dot in front:
        path.append(f"H{_px(x_axis(dot.x.value or 0))}V{_px(y_axis(dot.y.value or 0))}")
    path.append(f"H{WIDTH - RIGHT}")
    return tag("path", d="".join(path), class_="front", aria_hidden="true")


def _bars(dot: Dot, x_axis: Axis, y_axis: Axis) -> Markup:
    px, py = _px(x_axis(dot.x.value or 0)), _px(y_axis(dot.y.value or 0))
    path = ""
    if dot.y.ci95:
        path += f"M{px} {_px(y_axis(dot.y.ci95[0]))}V{_px(y_axis(dot.y.ci95[1]))}"
        path += "".join(f"M{_px(x_axis(dot.x.value or 0) - CAP)} {_px(y_axis(end))}h{_px(2 * CAP)}"
                        for end in dot.y.ci95 if y_axis.low <= end <= y_axis.high)
    if dot.x.ci95:  # an end without a stroke across it lies beyond the picture
        path += f"M{_px(x_axis(dot.x.ci95[0]))} {py}H{_px(x_axis(dot.x.ci95[1]))}"
        path += "".join(f"M{_px(x_axis(end))} {_px(y_axis(dot.y.value or 0) - CAP)}v{_px(2 * CAP)}"
                        for end in dot.x.ci95 if x_axis.low <= end <= x_axis.high)
    return tag("path", d=path, class_="interval", aria_hidden="true") if path else raw("")


def _dot(dot: Dot, px: float, py: float) -> Markup:
    hollow = "estimated" in (dot.x.provenance, dot.y.provenance)
    ring = tag("circle", cx=_px(px), cy=_px(py), r=11, class_="winner") if dot.winner else None
    return tag("a", tag("title", dot.tip), ring, shape(dot.kind, px, py, hollow=hollow), href=dot.href,
               aria_label=dot.tip)


def _names(places: Sequence[tuple[Dot, float, float]], x_axis: Axis, y_axis: Axis) -> Markup:
    """Names beside their dots: those of the front first, each where it covers nothing, else left to the tip."""
    taken = [box for dot, px, py in places for box in _boxes(dot, px, py, x_axis, y_axis)]
    found = []
    for dot, px, py in sorted(places, key=lambda place: (not place[0].winner, not place[0].front, place[2])):
        if len(places) > MOST_NAMES and not (dot.front or dot.winner):
            continue
        wide = len(dot.name) * LETTER
        for x, y, anchor in _spots(px, py, _boxes(dot, px, py, x_axis, y_axis)):
            left = x - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (left, y - 11, left + wide, y + 3)
            inside = box[0] > LEFT and box[2] < WIDTH - 4 and box[1] > 0 and box[3] < HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append(tag("text", dot.name, x=_px(x), y=_px(y), text_anchor=anchor,
                                 class_="name front-name" if dot.front else "name"))
                break
    return tag("g", join(found), aria_hidden="true")


def _boxes(dot: Dot, px: float, py: float, x_axis: Axis, y_axis: Axis) -> list[Box]:
    """What a dot covers: its mark and its two bars."""
    found = [(px - 8, py - 8, px + 8, py + 8)]
    if dot.x.ci95:
        found.append((x_axis(dot.x.ci95[0]), py - CAP, x_axis(dot.x.ci95[1]), py + CAP))
    if dot.y.ci95:
        ends = sorted((y_axis(dot.y.ci95[0]), y_axis(dot.y.ci95[1])))
        found.append((px - CAP, ends[0], px + CAP, ends[1]))
    return found


def _spots(px: float, py: float, boxes: Sequence[Box]) -> list[tuple[float, float, str]]:
    """Where a name may stand, best first: beside, in a corner of the cross, beyond the ends of the bars."""
    left, right = min(box[0] for box in boxes), max(box[2] for box in boxes)
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    return [(right + 5, py + 4, "start"), (px + 9, py - 6, "start"), (px + 9, py + 15, "start"),
            (px - 9, py - 6, "end"), (px - 9, py + 15, "end"), (left - 5, py + 4, "end"),
            (px, top - 5, "middle"), (px, bottom + 13, "middle")]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

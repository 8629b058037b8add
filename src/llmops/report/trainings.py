"""How a training went, as inline SVG: the loss with its smoothed line, held-out looks, what happened on the way.

    training    the loss of one variant; faint: as it was, strong: smoothed; diamonds: held-out loss; dashed upright
                lines: resumed, out of memory, stopped, weights kept
    strip       a flat picture of one figure over the same steps: learning rate, joules so far
    overlaid    the smoothed losses of several variants in one picture

Colours are classes of report.css, and no line is told by its colour alone: each has its own dashes, each upright line
its letter. x, y are figures; px, py pixels of the view box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmops.curves import Point, finite, smoothed, thinned
from llmops.report.charts import Axis
from llmops.report.figures import number
from llmops.report.markup import Markup, tag

__all__ = ["MOST_OVERLAID", "Mark", "Training", "overlaid", "sample", "strip", "training"]

MOST_POINTS = 240  # of a line
MOST_OVERLAID = 6  # lines in one picture; there is a class and a pattern of dashes for each
WIDTH, LEFT, RIGHT = 360, 66, 10


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step. letter: drawn above its line; text: what it was."""

    step: float
    letter: str
    text: str


@dataclass(frozen=True)
class Training:
    """What is known of one training. losses, looks: (step, loss)."""

    name: str
    losses: list[Point]
    looks: list[Point] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    @property
    def drawn(self) -> list[Point]:
        return finite(self.losses)


@dataclass
class _Frame:
    """Axes in a box of `width` x `height`, with their grid."""

    x: Axis
    y: Axis
    width: int
    height: int
    bottom: int

    @classmethod
    def of(cls, xs: Sequence[float], ys: Sequence[float], unit: str, width: int, height: int, *, top: int = 8,
           bottom: int = 24) -> _Frame:
        x_axis = Axis(xs, "steps", LEFT, width - RIGHT, may_log=False)
        y_axis = Axis(ys, unit, height - bottom, top, may_log=False)
        x_axis.low, x_axis.high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
        if min(ys) >= 0:
            y_axis.low = max(0.0, y_axis.low)
        return cls(x_axis, y_axis, width, height, bottom)

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{_px(self.x(x))},{_px(self.y(y))}" for x, y in points)

    def grid(self, most: int, *, steps: bool = True) -> Markup:
        y_text, _ = self.y.told()
        x_text, _ = self.x.told()
        lines = [[tag("line", x1=LEFT, x2=self.width - RIGHT, y1=_px(self.y(tick)), y2=_px(self.y(tick)),
                      class_="grid"),
                  tag("text", y_text(tick), x=LEFT - 6, y=_px(self.y(tick) + 4), text_anchor="end")]
                 for tick in _few(self.y.ticks(), most)]
        below = [tag("text", x_text(tick), x=_px(self.x(tick)), y=self.height - 7, text_anchor="middle")
                 for tick in _few(self.x.ticks(), 6)] if steps else []
        return tag("g", lines, below, aria_hidden="true")


def training(found: Training) -> Markup:
    """The loss of one variant."""
    raw = found.drawn
    if not raw:
        return tag("p", "no finite loss was recorded", class_="dim")
    line, looks = thinned(smoothed(raw), MOST_POINTS), finite(found.looks)
    frame = _Frame.of([x for x, _ in [*raw, *looks]], [y for _, y in [*thinned(raw, MOST_POINTS), *line, *looks]],
                      "loss", WIDTH, 190, top=20)
    held = [tag("polyline", points=frame.path(looks), class_="held"), [_diamond(frame, look) for look in looks]]
    text = f"training loss of {found.name}, from {number(raw[0][1])} to {number(raw[-1][1])}"
    return tag("svg", tag("title", text), tag("desc", _described(found, raw, looks)), frame.grid(5),
               tag("polyline", points=frame.path(thinned(raw, MOST_POINTS)), class_="curve raw"),
               tag("polyline", points=frame.path(line), class_="curve"), held if looks else None,
               [_mark(frame, mark) for mark in found.marks],
               viewBox=f"0 0 {WIDTH} 190", role="img", aria_label=text, class_="small")


def _described(found: Training, raw: Sequence[Point], looks: Sequence[Point]) -> str:
    """In words what the picture shows."""
    low = min(raw, key=lambda point: point[1])
    parts = [f"{len(raw):,} steps; lowest {number(low[1])} at step {low[0]:,.0f}"]
    if looks:
        best = min(looks, key=lambda point: point[1])
        parts.append(f"held-out loss from {number(looks[0][1])} to {number(looks[-1][1])} in {len(looks)} looks, "
                     f"lowest {number(best[1])} at step {best[0]:,.0f}")
    return "; ".join([*parts, *(f"step {mark.step:,.0f}: {mark.text}" for mark in found.marks)])


def _diamond(frame: _Frame, look: Point) -> Markup:
    px, py = frame.x(look[0]), frame.y(look[1])
    corners = " ".join(f"{_px(px + dx)},{_px(py + dy)}" for dx, dy in ((-4, 0), (0, -4), (4, 0), (0, 4)))
    return tag("polygon", tag("title", f"step {look[0]:,.0f}: held-out loss {number(look[1])}"), points=corners,
               class_="look")


def _mark(frame: _Frame, mark: Mark) -> Markup:
    px = _px(frame.x(mark.step))
    return tag("g", tag("title", f"step {mark.step:,.0f}: {mark.text}"),
               tag("line", x1=px, x2=px, y1=16, y2=frame.height - frame.bottom, class_="event"),
               tag("text", mark.letter, x=px, y=12, text_anchor="middle", class_="event"))


def strip(points: Sequence[Point], label: str, unit: str) -> Markup:
    """A flat picture of one figure; nothing where there are fewer than two."""
    points = finite(points)
    if len(points) < 2:
        return Markup("")
    frame = _Frame.of([x for x, _ in points], [0.0, *(y for _, y in points)], unit, WIDTH, 74, top=18, bottom=10)
    shown = frame.y.told()[1]  # the unit that the ticks are written in
    last = f"{label}: {number(points[-1][1])} {unit}".rstrip() + f" at step {points[-1][0]:,.0f}"
    return tag("svg", tag("title", last), frame.grid(2, steps=False),
               tag("polyline", points=frame.path(thinned(points, MOST_POINTS)), class_="curve thin"),
               tag("text", f"{label}, {shown}" if shown else label, x=WIDTH - RIGHT, y=12, text_anchor="end"),
               viewBox=f"0 0 {WIDTH} 74", role="img", aria_label=last, class_="small")


def overlaid(trainings: Sequence[Training], label: str) -> Markup:
    """The smoothed losses of up to MOST_OVERLAID variants over their steps."""
    lines = [thinned(smoothed(each.drawn), MOST_POINTS) for each in trainings]
    frame = _Frame.of([x for line in lines for x, _ in line], [y for line in lines for _, y in line], "loss", 760, 260)
    drawn = [tag("g", tag("title", each.name), tag("polyline", points=frame.path(line), class_=f"curve s{place}"))
             for place, (each, line) in enumerate(zip(trainings, lines, strict=True))]
    told = "; ".join(f"{each.name}: {number(line[0][1])} to {number(line[-1][1])} in {line[-1][0]:,.0f} steps"
                     for each, line in zip(trainings, lines, strict=True))
    return tag("svg", tag("title", label), tag("desc", told), frame.grid(6), drawn, viewBox="0 0 760 260", role="img",
               aria_label=label, class_="small")


def sample(place: int) -> Markup:
    """The line of a variant in `overlaid`, for the legend."""
    return tag("svg", tag("line", x1=0, x2=30, y1=6, y2=6, class_=f"curve s{place}"), viewBox="0 0 30 12",
               class_="sample", aria_hidden="true")


def _few(ticks: list[float], most: int) -> list[float]:
    return ticks[::max(1, math.ceil(len(ticks) / most))]


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

"""A curve of many points, made fit to be looked at: smoothed, thinned, and drawn with characters.

The page (`report.charts`) and the terminal (`progress`) show the same curve from here. A point is (step, value).
Values that are not finite are left out.

In the terminal every character is a cell of 2 x 4 dots (Unicode block Braille Patterns, U+2800: the dots of a cell are
the bits of its code point), so 60 columns hold 120 steps side by side. Where the terminal knows no Unicode, a cell is
one mark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = ["Point", "Points", "cells", "curve_lines", "finite", "smoothed", "thinned"]

Point = tuple[float, float]  # step, value
SPAN = 0.03  # share of the points that the smoothed line is a mean over, about
LABEL = 8  # columns to the left of the picture
BRAILLE = 0x2800
#: bit of the dot at [row][column] of a cell
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
LOOK, LOOK_PLAIN = "◆", "o"


class Points:
    """The points of a run of any length in bounded memory: when there are `most`, neighbours become their mean."""

    def __init__(self, most: int = 2048) -> None:
        self.most, self.each = most, 1  # each: steps that a kept point stands for
        self.kept: list[Point] = []
        self._open: list[Point] = []

    def add(self, step: float, value: float) -> None:
        self._open.append((step, value))
        if len(self._open) < self.each:
            return
        self.kept.append(_mean(self._open))
        self._open = []
        if len(self.kept) >= self.most:
            self.kept = [_mean(self.kept[at:at + 2]) for at in range(0, len(self.kept), 2)]
            self.each *= 2

    def all(self) -> list[Point]:
        """What is kept, with what has come since the last kept point."""
        return [*self.kept, _mean(self._open)] if self._open else list(self.kept)


def _mean(points: Sequence[Point]) -> Point:
    return points[-1][0], sum(value for _, value in points) / len(points)


def finite(points: Iterable[Point]) -> list[Point]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def smoothed(points: Sequence[Point], span: float = SPAN) -> list[Point]:
    """Exponential mean there and back again: smooth, and not late, as a mean over the past alone would be.

    One way: s_t = sum_i b^(t-i) x_i / sum_i b^(t-i). Dividing by the sum of the weights, as Adam does (Kingma & Ba
    2015, section 3), keeps the ends where they are instead of pulling them to zero. Weights fall by half over half of
    `span` of the points. Ten points or fewer are left as they are.
    """
    if len(points) <= 10:
        return list(points)
    keep = 0.5 ** (2 / (span * len(points) + 1))
    values = [value for _, value in points]
    values = _one_way(_one_way(values, keep)[::-1], keep)[::-1]
    return [(step, value) for (step, _), value in zip(points, values, strict=True)]


def _one_way(values: Sequence[float], keep: float) -> list[float]:
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points that keep the shape: of every stretch its lowest and its highest, in their order.

    Every n-th point alone would lose a spike that lasts one step. First and last point are always kept.
    """
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    found = [points[0]]
    for at in range(0, len(points), stretch):
        part = points[at:at + stretch]
        found += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return list(dict.fromkeys([*found, points[-1]]))


def curve_lines(values: Sequence[Point], looks: Sequence[Point], width: int, height: int, *,
                plain: bool = False) -> list[str]:
    """The curve as `height` lines of at most `width` columns; no line where there is no room or nothing to draw.

    values: (step, loss) of the training; looks: (step, held-out loss), each drawn as a mark. The smoothed line is
    drawn whole, of the raw points the lowest and the highest of every column of dots. plain: ASCII only.
    """
    lines = cells(values, looks, width, height, plain=plain)
    return ["".join(character for character, _ in line).rstrip() for line in lines]


def cells(values: Sequence[Point], looks: Sequence[Point], width: int, height: int, *,
          plain: bool = False) -> list[list[tuple[str, str]]]:
    """`curve_lines` with what every piece is: (text, "axis" | "line" | "raw" | "look" | "empty")."""
    values, looks = finite(values), finite(looks)
    columns, rows = width - LABEL - 1, height - 1
    if len(values) < 2 or columns < 8 or rows < 2:
        return []
    line = smoothed(values)
    low, high = _range(values, line, looks)
    first, last = values[0][0], max(values[-1][0], looks[-1][0] if looks else 0)
    size_x, size_y = 2 * columns, 4 * rows

    def dot(point: Point) -> tuple[int, int]:
        across = (point[0] - first) / max(1e-12, last - first)
        down = (high - min(max(point[1], low), high)) / (high - low)
        return round(across * (size_x - 1)), round(down * (size_y - 1))

    raw, drawn = {dot(point) for point in thinned(values, 2 * size_x)}, _joined([dot(point) for point in line])
    marks = {(x // 2, y // 4) for x, y in map(dot, looks)}
    found = []
    for row in range(rows):
        label = {0: _label(high), rows - 1: _label(low)}.get(row, "")
        body = [_cell(column, row, drawn, raw, marks, plain) for column in range(columns)]
        found.append([(f"{label:>{LABEL}}" + ("|" if plain else "│"), "axis"), *body])
    return [*found, [(_caption(values, looks, plain)[:width], "axis")]]


def _range(values: Sequence[Point], line: Sequence[Point], looks: Sequence[Point]) -> tuple[float, float]:
    """Lowest and highest value to show: all of the smoothed line and the looks, all but the wildest raw points."""
    raw = sorted(value for _, value in values)
    cut = len(raw) // 50
    shown = [*raw[cut:len(raw) - cut], *(value for _, value in line), *(value for _, value in looks)]
    low, high = min(shown), max(shown)
    edge = 0.0 if high > low else abs(high) * 0.1 or 1.0
    return low - edge, high + edge


def _joined(dots: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """The dots and those on the straight lines between them."""
    found = set(dots)
    for (x0, y0), (x1, y1) in zip(dots, dots[1:], strict=False):
        steps = max(abs(x1 - x0), abs(y1 - y0))
        found |= {(round(x0 + (x1 - x0) * at / steps), round(y0 + (y1 - y0) * at / steps)) for at in range(1, steps)}
    return found


def _cell(column: int, row: int, drawn: set[tuple[int, int]], raw: set[tuple[int, int]], marks: set[tuple[int, int]],
          plain: bool) -> tuple[str, str]:
    if (column, row) in marks:
        return (LOOK_PLAIN if plain else LOOK), "look"
    inside = [(2 * column + x, 4 * row + y, DOTS[y][x]) for y in range(4) for x in range(2)]
    of_line = sum(bit for x, y, bit in inside if (x, y) in drawn)
    of_both = sum(bit for x, y, bit in inside if (x, y) in drawn or (x, y) in raw)
    if not of_both:
        return " ", "empty"
    kind = "line" if of_line else "raw"
    if plain:
        return ("*" if of_line else "."), kind
    return chr(BRAILLE + (of_line or of_both)), kind


def _label(value: float) -> str:
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.2g}"


def _caption(values: Sequence[Point], looks: Sequence[Point], plain: bool) -> str:
    text = f"{'':>{LABEL}} steps {values[0][0]:,.0f} to {values[-1][0]:,.0f}"
    if looks:
        best = min(looks, key=lambda point: point[1])
        text += (f"; {LOOK_PLAIN if plain else LOOK} held out {looks[-1][1]:.4g}, "
                 f"lowest {best[1]:.4g} at {best[0]:,.0f}")
    return text

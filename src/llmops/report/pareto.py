"""Which variants no other beats: as good on the score and as cheap, and better in one of the two.

Broken, failed and skipped variants are left out, and so is whatever has no figure or was scored by another protocol: a
variant that was not measured is neither on the line nor below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmops.errors import LlmopsError, unknown
from llmops.report.reading import (
    COSTS,
    Row,
    batch_of,
    comparable,
    cost,
    different_workload,
    group,
    main_score,
    name_of,
    rising,
    score,
    state_of,
)

__all__ = ["Point", "chosen", "mark", "pareto", "points"]


@dataclass(frozen=True)
class Point:
    """score: more is better; cost: less is better, whatever the figures' own direction (see `points`)."""

    name: str
    score: float
    cost: float


def pareto(points: Iterable[Point]) -> set[str]:
    """Names of the points that no other dominates; equal points stay together. O(n log n).

    p dominates q: score_p >= score_q and cost_p <= cost_q, one of them strictly. What is not finite is ignored.
    """
    finite = [point for point in points if math.isfinite(point.score) and math.isfinite(point.cost)]
    front: set[str] = set()
    best, best_cost = -math.inf, math.inf
    for point in sorted(finite, key=lambda point: (point.cost, -point.score)):
        if point.score > best:
            best, best_cost = point.score, point.cost
            front.add(point.name)
        elif point.score == best and point.cost == best_cost:
            front.add(point.name)
    return front


def points(rows: Sequence[Row], score_id: str, by: str, batch: str | None = None) -> list[Point]:
    """What of `rows` can be compared on this score and cost, turned so that more score and less cost are better.

    by: one of reading.COSTS, for batch size `batch` (default: the smallest measured). Raises LlmopsError for another.
    """
    if by not in COSTS:
        raise LlmopsError(unknown("cost", by, COSTS))
    batch = batch or batch_of(rows)
    up, down = (1 if rising(rows, score_id) else -1), (1 if COSTS[by].less_is_better else -1)
    found: list[Point] = []
    first: Row | None = None  # speed and energy of another workload or machine are not comparable with the first
    for row in comparable(rows, score_id):
        value, price = score(row, score_id).value, cost(row, by, batch).value
        if state_of(row) != "ok" or value is None or price is None:
            continue
        first = first or row
        if COSTS[by].path[0] == "size" or different_workload(row, first) is None:
            found.append(Point(name_of(row), up * value, down * price))
    return found


def mark(rows: Sequence[Row], score_id: str, by: str, batch: str | None = None) -> set[str]:
    """Names of the variants on the Pareto line of this score against this cost (see `points`)."""
    return pareto(points(rows, score_id, by, batch))


def chosen(rows: Sequence[Row]) -> tuple[str, str] | None:
    """(score, cost) that the run is judged by; None when there is no score.

    What the verdict says it used; else the goals' score and `prefer`; else the first score and the first measured cost.
    """
    main = main_score(rows)
    for row in rows:
        axes = group(row, "verdict").get("pareto_axes")
        if isinstance(axes, Sequence) and len(axes) == 2 and axes[1] in COSTS:
            return str(axes[0]), str(axes[1])
    if main is None:
        return None
    prefer = next((found for row in rows if (found := group(row, "goals").get("prefer")) in COSTS), None)
    batch = batch_of(rows)
    measured = (by for by in COSTS if any(cost(row, by, batch).value is not None for row in rows))
    return main, prefer or next(measured, "disk_bytes")

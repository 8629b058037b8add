"""Groups of a score: what a row holds of them, and whom a step hurt most.

Everything is read from the paired comparisons in the rows (`llmops.evaluate.slices`). Groups too small to be judged are
never named as the worst.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llmops.quantity import Quantity
from llmops.report.figures import number, show
from llmops.report.reading import Row, main_score, name_of, parent_of, quantity, rising, score_ids, versus

__all__ = ["SMALL", "columns_of", "gaps", "name_and_lines", "worst_group", "worst_lines"]

SMALL = 10  # items (or clusters) under which a group is not judged (llmops.evaluate.slices.LEAST)


def columns_of(row: Row, score_id: str, other: str) -> dict[str, Any]:
    """{column: {"groups": {group: comparison}, "worst": group}} of the comparison with `other`."""
    found = versus(row, score_id, other).get("slices")
    return found if isinstance(found, dict) else {}


def gaps(row: Row, score_id: str, other: str) -> list[tuple[str, str, Quantity]]:
    """(column, group, how much more it lost than the rest) of every judged group, the worst first."""
    found = [(column, name, quantity(each.get("excess"), "no excess is in the row"))
             for column, body in columns_of(row, score_id, other).items()
             for name, each in (body.get("groups") or {}).items()
             if (each.get("clusters") or each.get("n") or 0) >= SMALL]
    return sorted(((column, name, excess) for column, name, excess in found if excess.value is not None),
                  key=lambda each: -(each[2].value or 0.0))


def worst_group(row: Row, score_id: str, other: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(column, group, its comparison) of the group that lost most in each column where one lost anything."""
    sign = 1 if rising([row], score_id) else -1
    found = [(column, str(body["worst"]), body["groups"][body["worst"]])
             for column, body in columns_of(row, score_id, other).items()
             if body.get("worst") in body.get("groups", {})]
    return [each for each in found if sign * (quantity(each[2].get("delta"), "").value or 0.0) < 0]


def worst_lines(row: Row, scores: Iterable[str] | None = None) -> list[str]:
    """`exact_match:test, attribute=food: -0.12 [-0.2, -0.05] against tuned (all items -0.03)`, for each column.

    scores: default all.
    """
    lines = []
    for score_id in score_ids([row]) if scores is None else scores:
        for column, name, body in worst_group(row, score_id, "parent"):
            delta = quantity(body.get("delta"), "no difference is in the row")
            whole = quantity(versus(row, score_id, "parent").get("delta"), "no difference is in the row")
            p = body.get("p_holm")
            lines.append(f"{score_id}, {column}={name}: {show(delta, with_interval=True, difference=True)} against "
                         f"{parent_of(row)} (all items {show(whole, difference=True)})"
                         + (f", Holm p = {number(p)}" if isinstance(p, int | float) else ""))
    return lines


def name_and_lines(rows: Sequence[Row]) -> list[str]:
    """`worst group of tuned-w3: ...` by the main score, for the lines beneath a terminal's table."""
    main = main_score(rows)
    return [f"worst group of {name_of(row)}: {line}" for row in rows
            for line in worst_lines(row, [main] if main else [])]

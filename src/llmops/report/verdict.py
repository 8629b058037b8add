"""Who meets the goals, and who wins: computed from rows alone, whenever rows are shown.

A goal is judged on the point estimate; its line says whether the 95% interval holds it too, because "no worse by more
than 0.02" and "not shown to be worse" are different things. A goal on a figure that nobody measured is not met and not
missed: it is unknown, and a variant with an unknown goal cannot win.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.report.pareto import mark
from llmops.report.reading import COSTS, Row, batch_of, cost, group, name_of, rising, score, state_of, versus

__all__ = ["judge", "value_of"]

KINDS = ("max_drop", "max_ratio", "min", "max")


def judge(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with their `verdict` filled in: goals met or not, on the Pareto line or not, the winner."""
    judged = []
    for row in rows:
        stored = group(row, "verdict")
        judged.append({**row, "verdict": {**stored, "warnings": list(stored.get("warnings") or []),
                                          "goals": _goals(row, rows), "winner": False, "pareto": None}})
    _mark_pareto(judged)
    winner = _winner(judged)
    if winner is not None:
        winner["verdict"]["winner"] = True
    return judged


def value_of(row: Row, name: str, batch: str = "1") -> float | None:
    """A score (`exact_match:test`) or a cost (`disk_bytes`) as a number, None where there is none."""
    return (cost(row, name, batch) if name in COSTS else score(row, name)).value


def _goals(row: Row, rows: Sequence[Row]) -> list[dict[str, Any]]:
    wanted = {**group(row, "goals", "quality"), **group(row, "goals", "costs")}
    return [_judged(row, rows, metric, kind, bounds) for metric, bounds in wanted.items()
            for kind in KINDS if bounds.get(kind) is not None]


def _judged(row: Row, rows: Sequence[Row], metric: str, kind: str, bounds: Mapping[str, Any]) -> dict[str, Any]:
    limit, against, batch = float(bounds[kind]), bounds.get("against") or "base", batch_of(rows)
    relative = kind in ("max_drop", "max_ratio")
    goal = f"{metric} {kind} {limit:g}" + (f" against {against}" if relative else "")
    value = value_of(row, metric, batch)
    other = next((value_of(one, metric, batch) for one in rows if name_of(one) == against), None) if relative else 0.0
    if value is None or other is None:
        missing = name_of(row) if value is None else against
        return {"goal": goal, "met": None, "detail": f"unknown: {metric} was not measured for {missing}"}
    if kind in ("min", "max"):
        return {"goal": goal, "met": value >= limit if kind == "min" else value <= limit, "detail": f"{value:.4g}"}
    if kind == "max_ratio":
        ratio = value / other if other else math.inf
        return {"goal": goal, "met": ratio <= limit, "detail": f"ratio {ratio:.4g} ({value:.4g} / {other:.4g})"}
    drop = other - value if _more_is_better(row, metric) else value - other
    return {"goal": goal, "met": drop <= limit + 1e-12,
            "detail": f"drop {drop:.4g}{_interval(row, metric, against, limit)}"}


def _interval(row: Row, metric: str, against: str, limit: float) -> str:
    """Whether the paired interval of the drop lies within the margin as well."""
    ci95 = group(versus(row, metric, against), "delta").get("ci95")
    if not ci95:
        return ""
    worst = -ci95[0] if _more_is_better(row, metric) else ci95[1]
    return f", at most {worst:.4g} with 95% confidence" + ("" if worst <= limit else ", which is more than the margin")


def _more_is_better(row: Row, metric: str) -> bool:
    return not COSTS[metric].less_is_better if metric in COSTS else rising([row], metric)


def _winner(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best by `prefer` (by default the smallest) of those that meet every goal; None without goals, or such."""
    goals = next((row["goals"] for row in rows if row.get("goals")), None)
    if not goals:
        return None
    prefer, batch = goals.get("prefer") or "disk_bytes", batch_of(rows)
    fit = [(value, row) for row in rows if state_of(row) == "ok" and row.get("quality")
           and all(goal["met"] for goal in row["verdict"]["goals"])
           and (value := value_of(row, prefer, batch)) is not None]
    if not fit:
        return None
    sign = -1 if _more_is_better(fit[0][1], prefer) else 1
    return min(fit, key=lambda pair: sign * pair[0])[1]


def _mark_pareto(rows: Sequence[dict[str, Any]]) -> None:
    """On the line: no other variant is at least as good in score and cost, and better in one of them."""
    scores = [name for row in rows for name in group(row, "quality") if rising(rows, name)]
    if not scores:
        return
    prefer = next((row["goals"].get("prefer") for row in rows if row.get("goals")), None)
    axis, batch = (prefer if prefer in COSTS else "weights_bytes"), batch_of(rows)
    line = mark(rows, scores[0], axis)
    for row in rows:
        if value_of(row, scores[0], batch) is not None and value_of(row, axis, batch) is not None:
            row["verdict"]["pareto"] = name_of(row) in line
            row["verdict"]["pareto_axes"] = [scores[0], axis]

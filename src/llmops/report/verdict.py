"""Who meets the goals, and who wins: computed from rows alone, whenever rows are shown.

A goal is judged on the point estimate; its line says whether the 95% interval holds it too, because "no worse by more
than 0.02" and "not shown to be worse" are different things. A goal on a figure that nobody measured is not met and not
missed: it is unknown, and a variant with an unknown goal cannot win.

`noninferior` asks more: that the drop is *shown* to stay within the margin. Its p values are corrected by Holm over the
variants that are held against the same reference, since the best of twenty lucky ones would otherwise pass. `max_gap`
bounds how much more than all other items those of the worst group lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.quantity import Quantity
from llmops.report.figures import number
from llmops.report.groups import gaps
from llmops.report.pareto import mark
from llmops.report.reading import COSTS, Row, batch_of, cost, group, name_of, quantity, rising, score, state_of, versus

__all__ = ["drop_words", "judge", "value_of"]

KINDS = ("max_drop", "noninferior", "max_gap", "max_ratio", "min", "max")


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


def drop_words(drop: float, worst: float | None) -> str:
    """What was lost, and what at most: "drop 0.027; at most 0.043 with 95% confidence", or a gain, or neither."""
    what = f"drop {drop:.4g}" if drop > 1e-12 else f"gain {-drop:.4g}" if drop < -1e-12 else "no drop"
    if worst is None:
        return what
    more = "" if drop > 1e-12 else "a drop of "
    known = f"{more}at most {worst:.4g}" if worst >= 0 else f"a gain of at least {-worst:.4g}"
    return f"{what}; {known} with 95% confidence"


def _goals(row: Row, rows: Sequence[Row]) -> list[dict[str, Any]]:
    wanted = {**group(row, "goals", "quality"), **group(row, "goals", "costs")}
    return [_judged(row, rows, metric, kind, bounds) for metric, bounds in wanted.items()
            for kind in KINDS if bounds.get(kind) is not None]


def _judged(row: Row, rows: Sequence[Row], metric: str, kind: str, bounds: Mapping[str, Any]) -> dict[str, Any]:
    limit, against, batch = float(bounds[kind]), bounds.get("against") or "base", batch_of(rows)
    relative = kind not in ("min", "max")
    goal = {"goal": f"{metric} {kind} {limit:g}" + (f" against {against}" if relative else ""), "metric": metric,
            "kind": kind, "limit": limit, "against": against if relative else None}
    if kind in ("noninferior", "max_gap"):
        return {**goal, **_compared(row, rows, metric, kind, limit, against)}
    value = value_of(row, metric, batch)
    other = next((value_of(one, metric, batch) for one in rows if name_of(one) == against), None) if relative else 0.0
    if value is None or other is None:
        missing = name_of(row) if value is None else against
        return {**goal, "met": None, "detail": f"unknown: {metric} was not measured for {missing}"}
    if kind in ("min", "max"):
        return {**goal, "met": value >= limit if kind == "min" else value <= limit, "detail": f"{value:.4g}"}
    if kind == "max_ratio":
        ratio = value / other if other else math.inf
        return {**goal, "met": ratio <= limit, "detail": f"ratio {ratio:.4g} ({value:.4g} / {other:.4g})"}
    drop = other - value if _more_is_better(row, metric) else value - other
    worst = _worst(row, metric, against)
    return {**goal, "met": drop <= limit + 1e-12,
            "detail": f"{drop_words(drop, worst)}{', which is more than the margin' if (worst or 0) > limit else ''}"}


def _compared(row: Row, rows: Sequence[Row], metric: str, kind: str, limit: float, against: str) -> dict[str, Any]:
    """A goal that needs the items of both sides: of what the row's own comparison says."""
    if name_of(row) == against:
        return {"met": True, "detail": "it is what the others are held against"}
    body = versus(row, metric, against)
    if not body or "not_comparable" in body:
        why = body.get("not_comparable") or f"{metric} was not compared with {against}"
        return {"met": None, "detail": f"unknown: {why}"}
    return _noninferior(row, rows, metric, limit, against) if kind == "noninferior" else _gap(row, metric, limit,
                                                                                             against)


def _noninferior(row: Row, rows: Sequence[Row], metric: str, margin: float, against: str) -> dict[str, Any]:
    from llmops.evaluate.noninferiority import LEVEL, drop_of, noninferiority_p, worst_drop
    from llmops.evaluate.paired_tests import holm
    from llmops.evaluate.power import needed

    up, body = _more_is_better(row, metric), versus(row, metric, against)
    family = {name_of(one): p for one in rows if name_of(one) not in (against, "base") and state_of(one) == "ok"
              and (p := noninferiority_p(versus(one, metric, against), margin, up)) is not None}
    drop, worst = drop_of(body, up), worst_drop(body, up)
    p = noninferiority_p(body, margin, up)
    if p is None or drop is None:
        return {"met": None, "detail": "unknown: " + quantity(
            body.get("delta"), "the comparison holds no standard error").method}
    adjusted = holm(family | {name_of(row): p})[name_of(row)]
    family_wide = f", {number(adjusted)} by Holm over {len(family)} variants" if len(family) > 1 else ""
    words = [drop_words(drop, worst), f"p = {number(p)}{family_wide}"]
    met = adjusted <= LEVEL
    if not met and drop < margin and body.get("delta_stderr"):
        items = needed(margin, float(body["delta_stderr"]) * math.sqrt(body["n"]), max(drop, 0.0),
                       share=body.get("mcnemar_p") is not None)
        words.append(f"not shown with {body['n']} items" + (f", about {items:,} would be needed" if items else ""))
    return {"met": met, "p": p, "p_holm": adjusted, "detail": "; ".join(word for word in words if word)}


def _gap(row: Row, metric: str, limit: float, against: str) -> dict[str, Any]:
    found = gaps(row, metric, against)
    if not found:
        why = (f"no group of {metric} has items enough to be judged" if group(row, "quality", metric, "slices") else
               f"{metric} was scored without groups; `slices: [COLUMN]` in its entry of evaluate makes them")
        return {"met": None, "detail": f"unknown: {why}"}
    column, name, excess = found[0]
    assert excess.value is not None
    more = f" [{excess.ci95[0]:.4g}, {excess.ci95[1]:.4g}]" if excess.ci95 else ""
    return {"met": excess.value <= limit + 1e-12, "group": f"{column}={name}",
            "detail": f"{column}={name} lost {excess.value:.4g}{more} more than the rest{_shown(excess, limit)}"}


def _shown(excess: Quantity, limit: float) -> str:
    if excess.value is None or excess.ci95 is None or excess.value <= limit:
        return ""
    return "; shown" if excess.ci95[0] > limit else "; its interval reaches the limit, so this may be chance"


def _worst(row: Row, metric: str, against: str) -> float | None:
    """The end of the paired interval at which most was lost; None without one."""
    ci95 = group(versus(row, metric, against), "delta").get("ci95")
    if not ci95:
        return None
    return float(-ci95[0] if _more_is_better(row, metric) else ci95[1])


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

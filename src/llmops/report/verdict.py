"""Who meets the goals, and who wins: computed from rows alone, whenever rows are shown.

A goal is judged on the point estimate; its line says whether the 95% interval holds it too, because "no worse by more
than 0.02" and "not shown to be worse" are different things. A goal on a figure that nobody measured is not met and not
missed: it is unknown, and a variant with an unknown goal cannot win.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.quantity import Quantity

__all__ = ["COST_PATHS", "cost", "judge", "value_of"]

#: where each cost stands in a row; "*" is the smallest batch size measured
COST_PATHS: dict[str, tuple[str, ...]] = {
    "joules_per_token": ("energy", "*", "joules_per_token"),
    "decode_tokens_per_s": ("latency", "*", "decode_tokens_per_s"),
    "first_token_ms": ("latency", "*", "first_token_ms_p50"),
    "disk_bytes": ("size", "disk_bytes"),
    "weights_bytes": ("size", "weights_bytes"),
    "peak_memory_bytes": ("size", "peak_memory_bytes")}
MORE_IS_BETTER = ("decode_tokens_per_s",)


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their `verdict` filled in: goals met, on the Pareto line or not, winner."""
    by_name = {row["identity"]["variant"]: row for row in rows}
    judged = []
    for row in rows:
        verdict = {**(row.get("verdict") or {}), "goals": _goals(row, by_name), "winner": False, "pareto": None}
        judged.append({**row, "verdict": {**verdict, "warnings": list(verdict.get("warnings") or [])}})
    _mark_pareto(judged)
    winner = _winner(judged)
    if winner is not None:
        winner["verdict"]["winner"] = True
    return judged


def cost(row: Mapping[str, Any], name: str) -> Quantity | None:
    """One of COST_PATHS out of a row, or None when the row does not hold it."""
    body: Any = row
    for step in COST_PATHS[name]:
        if not isinstance(body, Mapping):
            return None
        key = min((k for k in body if str(k).isdigit()), key=int, default="") if step == "*" else step
        body = body.get(key)
    return Quantity.from_dict(body) if isinstance(body, Mapping) and "provenance" in body else None


def value_of(row: Mapping[str, Any], name: str) -> float | None:
    """A score (`exact_match:test`) or a cost (`disk_bytes`) as a number, None where there is none."""
    if name in COST_PATHS:
        found = cost(row, name)
        return found.value if found is not None else None
    score = (row.get("quality") or {}).get(name)
    value = score["value"]["value"] if score else None
    return float(value) if value is not None else None


def _goals(row: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    goals = row.get("goals") or {}
    wanted = {**(goals.get("quality") or {}), **(goals.get("costs") or {})}
    return [_judged(row, metric, kind, float(bounds[kind]), bounds.get("against") or "base", by_name)
            for metric, bounds in wanted.items() for kind in ("max_drop", "max_ratio", "min", "max")
            if bounds.get(kind) is not None]


def _judged(row: Mapping[str, Any], metric: str, kind: str, limit: float, against: str,
            by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    relative = kind in ("max_drop", "max_ratio")
    text = f"{metric} {kind} {limit:g}" + (f" against {against}" if relative else "")
    value = value_of(row, metric)
    other = value_of(by_name[against], metric) if relative and against in by_name else None
    if value is None or (relative and other is None):
        missing = "this variant" if value is None else against
        return {"goal": text, "met": None, "detail": f"unknown: {metric} was not measured for {missing}"}
    if kind in ("min", "max"):
        met = value >= limit if kind == "min" else value <= limit
        return {"goal": text, "met": met, "detail": f"{value:.4g}"}
    assert other is not None
    if kind == "max_ratio":
        ratio = value / other if other else math.inf
        return {"goal": text, "met": ratio <= limit, "detail": f"ratio {ratio:.4g} ({value:.4g} / {other:.4g})"}
    drop = other - value if _more_is_better(row, metric) else value - other
    return {"goal": text, "met": drop <= limit, "detail": f"drop {drop:.4g}{_interval(row, metric, against, limit)}"}


def _interval(row: Mapping[str, Any], metric: str, against: str, limit: float) -> str:
    """Whether the paired interval of the drop lies within the margin as well."""
    versus = ((row.get("quality") or {}).get(metric) or {}).get("versus") or {}
    found = next((entry for entry in versus.values() if entry.get("variant") == against), None)
    ci95 = (found or {}).get("delta", {}).get("ci95") if found else None
    if not ci95:
        return ""
    worst = -ci95[0] if _more_is_better(row, metric) else ci95[1]
    return f", at most {worst:.4g} with 95% confidence" + ("" if worst <= limit else ", which is more than the margin")


def _more_is_better(row: Mapping[str, Any], metric: str) -> bool:
    if metric in COST_PATHS:
        return metric in MORE_IS_BETTER
    return bool(((row.get("quality") or {}).get(metric) or {}).get("higher_is_better", True))


def _winner(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best by `prefer` among the variants that meet every goal; None without goals or without such a variant."""
    goals = next((row["goals"] for row in rows if row.get("goals")), {})
    prefer = goals.get("prefer")
    if not (goals.get("quality") or goals.get("costs") or prefer):
        return None
    fit = [row for row in rows if row["status"]["state"] == "ok" and row.get("quality")
           and all(goal["met"] for goal in row["verdict"]["goals"])]
    if not fit:
        return None
    if prefer is None:
        return fit[-1] if len(fit) == 1 else min(fit, key=lambda row: value_of(row, "disk_bytes") or math.inf)
    known = [row for row in fit if value_of(row, prefer) is not None]
    sign = -1 if any(_more_is_better(row, prefer) for row in known) else 1
    return min(known, key=lambda row: sign * float(value_of(row, prefer) or 0.0), default=None)


def _mark_pareto(rows: Sequence[dict[str, Any]]) -> None:
    """On the line: no other variant is at least as good in score and cost, and better in one of them."""
    from llmops.report.pareto import mark

    scores = [name for row in rows for name, score in (row.get("quality") or {}).items() if score["higher_is_better"]]
    if not scores:
        return
    prefer = next((row["goals"].get("prefer") for row in rows if row.get("goals")), None)
    axis = prefer if prefer in COST_PATHS else "weights_bytes"
    line = mark(rows, scores[0], axis)
    for row in rows:
        if value_of(row, scores[0]) is not None and value_of(row, axis) is not None:
            row["verdict"]["pareto"] = row["identity"]["variant"] in line
            row["verdict"]["pareto_axes"] = [scores[0], axis]

"""`llmops gate`: a run's goals as a check in CI: exit code, one-line reasons, JUnit XML.

Without variants the gate asks what `tune` asks: does some variant meet every goal? With variants, each of them must.
Goals can be added on the command line; what a goal needs and no row holds (a comparison with another reference) is
computed from the items in the ledger. A goal on a figure that nobody computed is refused: a gate that passes because
nothing was measured is worse than none. So is a ledger that does not pass its audit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from llmops.compare import rows_of
from llmops.errors import LlmopsError, unknown
from llmops.ledger import Ledger
from llmops.pairing import pair_rows
from llmops.quantity import Quantity
from llmops.recipe.schema import Goal
from llmops.report.reading import COSTS, name_of, score_ids, state_of, status_text, versus
from llmops.report.verdict import judge
from llmops.store import Store, replace_file

__all__ = ["Case", "Gate", "gate", "junit", "sound"]

WORDS = {"passed": "pass", "failed": "FAIL", "unknown": "FAIL", "skipped": "miss"}


@dataclass(frozen=True)
class Case:
    """One goal of one variant. state: passed, failed, unknown (nothing to judge by), or skipped (missed, not gated)."""

    variant: str
    goal: str
    state: str
    detail: str

    def line(self) -> str:
        return f"{WORDS[self.state]}  {self.variant}  {self.goal}: {self.detail}"


@dataclass(frozen=True)
class Gate:
    """What the gate found. head: newest hash of the ledger's chain."""

    run: str
    cases: list[Case]
    winner: str | None
    head: str | None
    asked: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not any(case.state in ("failed", "unknown") for case in self.cases)

    def lines(self) -> list[str]:
        """A line for every case, and the verdict with the hash to keep."""
        if self.asked:
            told = f"{', '.join(self.asked)}: {'every goal is met' if self.passed else 'not every goal is met'}"
        else:
            told = f"{self.winner} meets every goal" if self.passed else "no variant meets every goal"
        return [*(case.line() for case in self.cases), f"{'passed' if self.passed else 'FAILED'}: {told}",
                f"ledger: {self.head}"]

    def as_json(self) -> dict[str, Any]:
        return {"run": self.run, "passed": self.passed, "winner": self.winner, "ledger_head": self.head,
                "cases": [vars(case) for case in self.cases]}


def gate(runs: str | None, run: str | None, variants: Sequence[str] = (), goals: Sequence[str] = ()) -> Gate:
    """Judge a run. variants: those that must meet every goal (default: one of all must). goals: more, as
    `exact_match: {min: 0.9}`.

    Raises LlmopsError for a run, variant, metric or goal that is not there, a run without goals, a goal on what nobody
    computed, and a ledger that was tampered with.
    """
    rows = rows_of(runs, run)
    store = Store(runs)
    ledger = sound(store)
    if not (store.folder(str(rows[0]["identity"]["run"])) / "result.json").exists():
        raise LlmopsError(f"run {rows[0]['identity']['run']} has not ended, so not all of its variants are scored; "
                          "expected a finished run: run `llmops tune` again, it goes on from there")
    for name in variants:
        if name not in [name_of(row) for row in rows]:
            raise LlmopsError(unknown("variant", name, [name_of(row) for row in rows]))
    wanted = _goals(rows, goals)
    rows = judge(_compared([{**row, "goals": wanted} for row in rows], wanted, ledger))
    winner = next((name_of(row) for row in rows if row["verdict"]["winner"]), None)
    gated = set(variants) or ({winner} if winner else {name_of(row) for row in rows})
    cases = [case for row in rows for case in _cases(row, name_of(row) in gated)]
    _refuse_uncomputed(rows, wanted)
    if variants:
        cases = [case for case in cases if case.variant in gated]
    return Gate(str(rows[0]["identity"]["run"]), cases, winner, ledger.head(), tuple(variants))


def sound(store: Store) -> Ledger:
    """The ledger, audited. Raises LlmopsError that names what was touched."""
    ledger = store.ledger()
    found = ledger.tampered()
    if found:
        raise LlmopsError(f"{ledger.path}: {found}; nothing is judged by it; `llmops audit` lists all; restore the "
                          "ledger from a copy, or run again in a new folder (--runs)")
    return ledger


def _goals(rows: Sequence[Mapping[str, Any]], more: Sequence[str]) -> dict[str, Any]:
    """The run's goals with those of the command line laid over them, as rows hold them."""
    found: dict[str, Any] = next((dict(row["goals"]) for row in rows if row.get("goals")), {})
    merged: dict[str, Any] = {"quality": dict(found.get("quality") or {}), "costs": dict(found.get("costs") or {}),
              "prefer": found.get("prefer")}
    for text in more:
        metric, goal = _goal(text, rows)
        place = merged["costs" if metric in COSTS else "quality"]
        place[metric] = {**place.get(metric, {}), **goal.model_dump(mode="json", exclude_none=True)}
    if not (merged["quality"] or merged["costs"]):
        raise LlmopsError(f"run {rows[0]['identity']['run']} has no goals to judge by; expected `goals` in its recipe, "
                          "or some here, as --goal 'exact_match: {max_drop: 0.02}'")
    return merged


def _goal(text: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, Goal]:
    import yaml
    from pydantic import ValidationError

    example = "expected one as in a recipe, 'exact_match: {max_drop: 0.02, against: tuned}'"
    try:
        body = yaml.safe_load(text)
        (metric, bounds), = body.items()
        goal = Goal.model_validate(bounds)
    except ValidationError as error:
        first = error.errors()[0]
        raise LlmopsError(f"--goal {text!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {example}") from error
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise LlmopsError(f"--goal {text!r} is no goal; {example}") from error
    if not goal.bounds():
        raise LlmopsError(f"--goal {text!r} bounds nothing; {example}")
    names = [name_of(row) for row in rows]
    if goal.against is not None and goal.against not in names:
        raise LlmopsError(f"--goal {text!r}: " + unknown("variant", goal.against, names))
    known = score_ids(rows)
    matching = [score for score in known if str(metric) in (score, score.partition(":")[0])]
    if metric in COSTS:
        return str(metric), goal
    if len(matching) != 1:
        what = f"several scores share {metric}: {', '.join(matching)}; name one" if matching else \
            f"nobody computed {metric}: " + unknown("score or cost", str(metric), [*known, *COSTS])
        raise LlmopsError(f"--goal {text!r}: {what}")
    return matching[0], goal


def _compared(rows: Sequence[dict[str, Any]], wanted: Mapping[str, Any], ledger: Ledger) -> list[dict[str, Any]]:
    """The rows with the comparisons that goals need and they do not hold, paired anew from their items."""
    by_name = {name_of(row): row for row in rows}
    found = []
    for row in rows:
        quality = dict(row.get("quality") or {})
        for score, bounds in wanted["quality"].items():
            against = bounds.get("against") or "base"
            if not {"noninferior", "max_gap", "max_drop"} & set(bounds) or score not in quality \
                    or name_of(row) == against or versus(row, score, against) or against not in by_name:
                continue
            try:
                body = pair_rows(ledger, row, by_name[against], score) or {}
            except LlmopsError as reason:
                body = {"not_comparable": str(reason)}
            if body:
                label = f"variant {against}"
                quality[score] = {**quality[score], "versus": {**(quality[score].get("versus") or {}),
                                                               label: {"variant": against, **body}}}
        found.append({**row, "quality": quality})
    return found


def _cases(row: Mapping[str, Any], gated: bool) -> list[Case]:
    name = name_of(row)
    if state_of(row) != "ok":
        return [Case(name, "is built and scored", "failed" if gated else "skipped", status_text(row))]
    states = {True: "passed", False: "failed" if gated else "skipped", None: "unknown" if gated else "skipped"}
    return [Case(name, goal["goal"], states[goal["met"]], goal["detail"]) for goal in row["verdict"]["goals"]]


def _refuse_uncomputed(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> None:
    """A goal that no sound row can be judged by is no goal but a mistake."""
    judged = [goal for row in rows if state_of(row) == "ok" for goal in row["verdict"]["goals"]]
    for name in dict.fromkeys(goal["goal"] for goal in judged):
        same = [goal for goal in judged if goal["goal"] == name]
        others = [goal for goal in same if goal["detail"] != "it is what the others are held against"]
        if all(goal["met"] is None for goal in others or same):
            metric = same[0]["metric"]
            why = _why(rows, metric) or (others or same)[0]["detail"].removeprefix("unknown: ")
            raise LlmopsError(f"goal {name}: nobody computed it: {why}; expected a figure to judge by; measure it "
                              "(`measure:`, a sensor, `evaluate:`), or drop the goal")


def _why(rows: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    from llmops.report.reading import batch_of, cost, score

    found: list[Quantity] = [cost(row, metric, batch_of(rows)) if metric in COSTS else score(row, metric)
                             for row in rows if state_of(row) == "ok"]
    missing = [each for each in found if each.value is None]
    return missing[0].method if len(missing) == len(found) and missing else None


def junit(found: Gate, path: Path) -> None:
    """Write the gate as JUnit XML, which every CI server shows. Raises LlmopsError when it cannot be written."""
    counts = {"tests": len(found.cases), "failures": sum(case.state == "failed" for case in found.cases),
              "errors": sum(case.state == "unknown" for case in found.cases),
              "skipped": sum(case.state == "skipped" for case in found.cases)}
    numbers = {key: str(value) for key, value in counts.items()}
    root = ElementTree.Element("testsuites", {"name": "llmops gate", **numbers})
    suite = ElementTree.SubElement(root, "testsuite", {
        "name": found.run, **numbers, "time": "0", "timestamp": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"})
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in (("ledger_head", found.head), ("winner", found.winner)):
        if value:
            ElementTree.SubElement(properties, "property", {"name": key, "value": value})
    for case in found.cases:
        element = ElementTree.SubElement(suite, "testcase", {"classname": f"{found.run}.{case.variant}",
                                                            "name": case.goal, "time": "0"})
        kind = {"failed": "failure", "unknown": "error", "skipped": "skipped"}.get(case.state)
        if kind:
            ElementTree.SubElement(element, kind, {"message": case.detail})
        else:
            ElementTree.SubElement(element, "system-out").text = case.detail
    ElementTree.indent(root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, "unicode"))
    except OSError as error:
        raise LlmopsError(f"{path}: cannot be written ({error}); expected a file in a folder that can be written to; "
                          "name another with --junit") from error

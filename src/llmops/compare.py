"""`llmops compare`: the rows of a finished run, and chosen variants paired anew from the items in the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError, unknown
from llmops.ledger import Ledger
from llmops.pairing import pair_rows
from llmops.report.compare import compare_as_json, compare_table
from llmops.report.verdict import judge
from llmops.store import Store

__all__ = ["compare_run", "labelled", "rows_of"]


def labelled(rows: Sequence[dict[str, Any]], ledger: Ledger) -> list[dict[str, Any]]:
    """The rows, with a warning among those of each where the ledger that they come from was tampered with."""
    found = ledger.tampered()
    if found is None:
        return list(rows)
    said = f"the ledger {found}; figures may not be those that were written; `llmops audit` lists all"
    return [{**row, "verdict": {**row["verdict"], "warnings": [said, *(row["verdict"].get("warnings") or [])]}}
            for row in rows]


def rows_of(runs: str | None, run: str | None) -> list[dict[str, Any]]:
    """The judged rows of a run (default: the latest). Raises LlmopsError when there is none of that name."""
    ledger = _ledger(runs)
    names = ledger.runs()
    if not names:
        raise LlmopsError(f"{ledger.path}: holds no run yet; run `llmops tune RECIPE` first")
    if run is not None and run not in names:
        raise LlmopsError(unknown("run", run, names))
    name = run or names[-1]
    return judge(_current(Store(runs).folder(name), ledger.rows(name)))


def compare_run(runs: str | None, run: str | None, variants: Sequence[str], against: str | None, *,
                as_json: bool = False) -> tuple[list[dict[str, Any]], Any]:
    """(rows, comparison): the comparison is None when neither variants nor a reference are chosen."""
    rows = labelled(rows_of(runs, run), _ledger(runs))
    if not variants and against is None:
        return rows, None
    ledger = _ledger(runs)

    def paired_anew(row: Mapping[str, Any], other: Mapping[str, Any], score: str) -> Mapping[str, Any] | None:
        return pair_rows(ledger, row, other, score)

    chosen = list(variants) or [row["identity"]["variant"] for row in rows]
    return rows, (compare_as_json if as_json else compare_table)(rows, chosen, against=against, paired=paired_anew)


def _ledger(runs: str | None) -> Ledger:
    store = Store(runs)
    if not (store.runs / "ledger.db").exists():
        raise LlmopsError(f"no ledger in {store.runs}; expected one written by `llmops tune`; name the folder of runs "
                          "with --runs")
    return store.ledger()


def _current(folder: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the order of the last run, without variants that the recipe has dropped since; all rows if it never ended."""
    by_name = {row["identity"]["variant"]: row for row in rows}
    try:
        shown = [row["identity"]["variant"] for row in json.loads((folder / "result.json").read_text("utf-8"))]
    except (OSError, ValueError):
        shown = list(by_name)
    return [by_name[name] for name in shown if name in by_name]

"""The pages of `llmops ui`, each a function from the ledger's rows to text.

Everything is read anew for every page, so a run that is going on shows what it has. The report of a run is the page
that lies beside it as report.html; a comparison is the same page over rows of several runs, each named RUN/VARIANT,
with scores and costs held together only where protocol, items, workload and machine agree.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.compare import labelled, rows_of
from llmops.errors import LlmopsError, unknown
from llmops.explain import explained
from llmops.export import exported
from llmops.pairing import pair_rows
from llmops.report.figures import show, told
from llmops.report.html import page, shell
from llmops.report.markup import Markup, tag
from llmops.report.reading import (
    Row,
    batch_of,
    cost,
    group,
    main_score,
    name_of,
    score,
    state_of,
)
from llmops.report.sections import scrolled
from llmops.report.side import side_by_side
from llmops.report.words import marked, zeros_note
from llmops.store import Store

__all__ = ["comparison", "listing", "missing", "run_page"]

COLUMNS = ("run", "variant", "made by", "state", "score", "value", "energy per token", "time per token", "on disk",
           "verdict", "when")
NUMBERS = ("value", "energy per token", "time per token", "on disk")
STATES = ("ok", "broken", "failed", "skipped")


def listing(store: Store) -> str:
    """Every variant of every run in one table: filter by words, state and what won; tick variants to compare them."""
    names = runs(store)
    found = [(name, row) for name in names for row in rows_of(str(store.runs), name)]
    states = [state for state in STATES if any(state_of(row) == state for _, row in found)]
    titles = [tag("th", tag("button", title, type="button", aria_label=f"sort by {title}"), scope="col",
                  class_="num" if title in NUMBERS else None) for title in COLUMNS]
    head = tag("tr", tag("th", tag("span", "compare", class_="unseen"), scope="col"), titles)
    lines = [_line(name, row, place) for place, (name, row) in enumerate(found)]
    table = tag("table", tag("caption", "All variants of all runs", class_="unseen"), tag("thead", head),
                tag("tbody", lines), id="rows", class_="wide listing")
    body = [tag("section", tag("h2", "Variants of all runs", id="runs"), _filters(names, states),
                tag("form", tag("p", tag("button", "Compare the ticked", type="submit"), class_="tools"),
                    scrolled("Table of all variants", table), method="get", action="/compare"),
                [tag("p", said, class_="dim") for said in zeros_note(row for _, row in found)],
                aria_labelledby="runs")] if found else [
        tag("p", f"{store.runs} holds no run yet; `llmops tune RECIPE` makes one.")]
    return shell("Runs", f"{len(names)} runs, {len(found)} variants in {store.runs}", body, home="/")


def _filters(names: Sequence[str], states: Sequence[str]) -> Markup:
    return tag("p", tag("label", "Filter ", tag("input", type="search", id="filter", autocomplete="off")), " ",
               _select("Run", "run", names), " ", _select("State", "state", states), " ",
               tag("label", tag("input", type="checkbox", id="won"), " winners and Pareto only"), " ",
               tag("output", "", id="count", for_="filter"), class_="tools screen")


def _select(title: str, name: str, choices: Sequence[str]) -> Markup:
    return tag("label", f"{title} ", tag("select", tag("option", "all", value=""),
                                         [tag("option", each, value=each) for each in choices], id=f"by-{name}"))


def _line(name: str, row: Row, place: int) -> Markup:
    picked = _score_and_batch(row)
    score_id, batch = picked
    figures = [score(row, score_id) if score_id else None, cost(row, "joules_per_token", batch),
               cost(row, "inter_token_ms", batch), cost(row, "disk_bytes", batch)]
    verdict = group(row, "verdict")
    marks = [word for word, on in (("★ winner", verdict.get("winner")), ("Pareto", verdict.get("pareto"))) if on]
    cells = [tag("td", tag("a", name, href=f"/run/{quoted(name)}"), data_v=name),
             tag("th", name_of(row), scope="row", class_="name", data_v=name_of(row)), tag("td", marked(row)),
             tag("td", state_of(row), class_=None if state_of(row) == "ok" else "bad",
                 title=group(row, "status").get("reason")),
             tag("td", score_id or "")]
    cells += [tag("td", show(each, with_interval=place_ == 0), class_="num", title=told(each),
                  data_v=None if each.value is None else f"{each.value:.9g}") if each else tag("td", "")
              for place_, each in enumerate(figures)]
    utc = str(group(row, "identity").get("utc") or "")
    cells += [tag("td", "".join(marks[:1]), title=", ".join(marks) or None), tag("td", utc, data_v=utc)]
    box = tag("input", type="checkbox", name="v", value=f"{name}/{name_of(row)}",
              aria_label=f"compare {name}/{name_of(row)}")
    return tag("tr", tag("td", box), cells, data_place=place, data_run=name, data_state=state_of(row),
               data_won="1" if marks else "0")


def _score_and_batch(row: Row) -> tuple[str | None, str]:
    return main_score([row]), batch_of([row])


def runs(store: Store) -> list[str]:
    """Names of the runs, the latest first; none where there is no ledger yet."""
    if not (store.runs / "ledger.db").exists():
        return []
    return list(reversed(store.ledger().runs()))


def run_page(store: Store, name: str) -> str:
    """The report of a run, from the ledger as it is now. Raises LlmopsError when there is none of that name."""
    rows = labelled(rows_of(str(store.runs), name), store.ledger())
    return page(rows, title=name, explained=explained(store.folder(name)),
                exported=exported(store.folder(name)), home="/")


def comparison(store: Store, wanted: Sequence[str]) -> str:
    """Rows of any runs on one page. wanted: RUN/VARIANT, at least two; RUN alone is all of its variants.

    Raises LlmopsError for a run or a variant that is not there, and for fewer than two rows.
    """
    found: list[tuple[str, dict[str, Any], set[str]]] = []
    for each in dict.fromkeys(wanted):
        name, _, variant = each.partition("/")
        rows = rows_of(str(store.runs), name)
        picked = [row for row in rows if not variant or name_of(row) == variant]
        if not picked:
            raise LlmopsError(unknown(f"variant of {name}", variant, [name_of(row) for row in rows]))
        found += [(name, row, {name_of(one) for one in rows}) for row in picked
                  if (name, name_of(row)) not in {(run, name_of(one)) for run, one, _ in found}]
    if len(found) < 2:
        raise LlmopsError(f"{len(found)} rows to compare; expected at least two: tick them in the list of runs")
    ledger = store.ledger()

    def paired(row: Row, other: Row, score_id: str) -> Mapping[str, Any] | None:
        return pair_rows(ledger, row, other, score_id)

    return page([_renamed(row, name, siblings) for name, row, siblings in found], home="/",
                title=f"{len(found)} variants of {len({name for name, _, _ in found})} runs",
                before=side_by_side([row for _, row, _ in found], paired))


def _renamed(row: Mapping[str, Any], run: str, siblings: set[str]) -> dict[str, Any]:
    """Under RUN/VARIANT, also where others name it; nobody wins among rows of several runs."""
    new = copy.deepcopy(dict(row))
    identity = new["identity"]
    for key in ("variant", "parent", "teacher"):
        if identity.get(key) in siblings:
            identity[key] = f"{run}/{identity[key]}"
    for body in group(new, "quality").values():
        for other in group(body, "versus").values() if isinstance(body, dict) else ():
            if isinstance(other, dict) and other.get("variant") in siblings:
                other["variant"] = f"{run}/{other['variant']}"
    new["verdict"] = {"winner": False, "pareto": None, "goals": [], "warnings": []}
    new["goals"] = {}
    return new


def missing(words: str) -> str:
    """A page that says what is not there."""
    return shell("Not here", "", [tag("p", words), tag("p", tag("a", "All runs", href="/"))], home="/")


def quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")

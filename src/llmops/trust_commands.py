"""Commands about what may be believed: `explain`, `gate`, `promote`, `champions`, `audit`. As in `cli.py`, each is a
function of plain arguments whose docstring is its help; each imports what it calls."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmops.arguments import JSON, QUIET, RUNS
from llmops.errors import LlmopsError
from llmops.parser import Argument, Command, at_least

__all__ = ["COMMANDS"]


def explain(run: str, variant: str, against: str | None, items: int, runs: str | None, as_json: bool,
            quiet: bool) -> None:
    """Show which items VARIANT of RUN answers otherwise than its parent, token by token, and which layers cause it."""
    from llmops.explain import explain as ask
    from llmops.explain import lines
    from llmops.measure.reserve import reserved
    from llmops.progress import Watcher

    with reserved(False, f"explain {run} {variant}"):
        found = ask(runs, run, variant, against, items=items, watcher=Watcher(quiet))
    _print(found, as_json, lines(found))


def gate(run: str, variants: Sequence[str], goals: Sequence[str], junit: str | None, runs: str | None,
         as_json: bool) -> int:
    """Judge RUN by its goals, for CI: exit 0 passed, 1 a goal missed, 2 nothing to judge by. With VARIANTs each of them
    must meet every goal, without them one variant must."""
    from llmops.gate import gate as judge
    from llmops.gate import junit as write

    found = judge(runs, run, variants, goals)
    if junit is not None:
        write(found, Path(junit))
    _print(found.as_json(), as_json, found.lines())
    return 0 if found.passed else 1


def promote(run: str, variant: str, name: str, why: str | None, margin: float | None, saving: str | None,
            batch: int | None, force: bool, runs: str | None, as_json: bool) -> int:
    """Make VARIANT of RUN the champion if it is shown to be no worse than the one in force, and cheaper; exit 1 when it
    is not. Who, when and why go into the ledger."""
    from llmops.champions import promote as decide

    found = decide(runs, run, variant, name=name, why=why, margin=margin, saving=saving, batch=batch, force=force)
    _print(found.as_json(), as_json, found.lines())
    return 0 if found.promoted else 1


def champions(name: str | None, history: bool, runs: str | None, as_json: bool) -> None:
    """The champions in force, or with --history every promotion: who, when, why."""
    from llmops.champions import champions as read

    found = read(runs, name, history=history)
    _print(found, as_json, [f"{each['name']}: {each['run']}/{each['variant']} since {each['utc']} by {each['who']}"
                            f"{' BY FORCE' if each['forced'] else ''}{': ' + each['why'] if each['why'] else ''}"
                            for each in found] or ["no variant was promoted yet"])


def audit(expect: str | None, runs: str | None, as_json: bool) -> int:
    """Verify the ledger: every row, its items and every promotion against the chain of hashes. Exit 1 names what was
    changed, removed or put in."""
    from llmops.store import Store

    store = Store(runs)
    if not (store.runs / "ledger.db").exists():
        raise LlmopsError(f"no ledger in {store.runs}; expected one written by `llmops tune`; name the folder of runs "
                          "with --runs")
    ledger = store.ledger()
    found, links = ledger.audit(), ledger.links()
    if expect is not None and expect not in [link.hash for link in links]:
        found.append(f"the hash {expect} is not in the chain: the ledger was cut, replaced, or is another one")
    head = links[-1].hash if links else None
    rows = sum(link.kind == "row" for link in links)
    told = found or [f"sound: {rows} rows, {len(links) - rows} promotions"]
    _print({"sound": not found, "problems": found, "links": len(links), "head": head}, as_json,
           [*told, f"ledger: {head}"])
    return 1 if found else 0


def _print(body: Any, as_json: bool, lines: Sequence[str]) -> None:
    print(json.dumps(body, indent=1, ensure_ascii=False) if as_json else "\n".join(lines))


def _number(given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise argparse.ArgumentTypeError(f'given "{given}"; expected a number') from None


NAMED: Argument = ("run",), {"metavar": "RUN", "help": "Name of a run."}
VARIANT: Argument = ("variant",), {"metavar": "VARIANT", "help": "A variant of the run."}

COMMANDS: dict[str, Command] = {
    "explain": (explain, NAMED, VARIANT,
                (("--against",), {"metavar": "VARIANT", "help": "The variant it is held against (default: its "
                                                                "parent)."}),
                (("--items",), {"metavar": "N", "type": at_least(1), "default": 16,
                                "help": "How many changed items of a score are shown and run again (default: 16)."}),
                RUNS, JSON, QUIET),
    "gate": (gate, NAMED, (("variants",), {"metavar": "VARIANT", "nargs": "*", "help": "Variants that must meet every "
                                                                                      "goal."}),
             (("--goal",), {"dest": "goals", "metavar": "GOAL", "action": "append", "default": [],
                            "help": "One more, as 'exact_match: {min: 0.9}'; may be repeated."}),
             (("--junit",), {"metavar": "FILE", "help": "Write JUnit XML there."}), RUNS, JSON),
    "promote": (promote, NAMED, VARIANT,
                (("--as",), {"dest": "name", "metavar": "NAME", "default": "champion",
                             "help": "What it becomes (default: champion); each name has a history of its own."}),
                (("--why",), {"metavar": "TEXT", "help": "The reason, for the record."}),
                (("--margin",), {"metavar": "X", "type": _number, "help": "How much worse scores may be where "
                                                                          "the goals say nothing."}),
                (("--saving",), {"metavar": "COST", "help": "The cost that must be better: joules_per_token (measured, "
                                                            "not estimated), decode_latency, disk_bytes or another "
                                                            "cost (default: `prefer` of the goals, else any)."}),
                (("--batch",), {"metavar": "N", "type": at_least(1),
                                "help": "Judge energy and speed at this batch size (default: at all measured ones)."}),
                (("--force",), {"action": "store_true", "help": "Promote in spite of reasons against; recorded."}),
                RUNS, JSON),
    "champions": (champions, (("name",), {"metavar": "NAME", "nargs": "?", "help": "One of them (default: all)."}),
                  (("--history",), {"action": "store_true", "help": "Every promotion, oldest first."}), RUNS, JSON),
    "audit": (audit, (("--expect",), {"metavar": "HASH", "help": "A hash kept from before, which must be in the "
                                                                 "chain."}), RUNS, JSON),
}

"""Champion and challenger: which variant is in use, and what it takes to replace it.

A challenger is compared with the champion on the champion's own items, whatever run each is from, and replaces it when

    every score with a margin is shown to be non-inferior    (all must be, so no correction: intersection-union)
    a saving is shown                                        (an interval that leaves "no better" out; bytes count:
                                                              `savings`)

Scores of other prompts are not compared, and nothing is promoted by them. `force` promotes all the same, and the record
says so, with the reasons that spoke against it. Records are links of the ledger's chain: who, when, why, what for. The
champion lies at `runs/_champions/NAME`, a link that is replaced in one step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmops.compare import rows_of
from llmops.errors import LlmopsError, unknown
from llmops.evaluate.noninferiority import LEVEL, drop_of, noninferiority_p, worst_drop
from llmops.gate import sound
from llmops.ledger import Ledger
from llmops.pairing import pair_rows
from llmops.report.figures import number
from llmops.report.reading import COSTS, figure, name_of, rising, score_ids, state_of, status_text
from llmops.report.verdict import drop_words
from llmops.savings import check_saving, savings
from llmops.store import Store

__all__ = ["CHAMPIONS", "Decision", "champions", "promote"]

CHAMPIONS = "_champions"  # no run can be called so


@dataclass
class Decision:
    """What was decided, and by what. `against`: reasons not to promote; `told`: all that was compared, in lines."""

    name: str
    run: str
    variant: str
    promoted: bool = False
    forced: bool = False
    champion: str | None = None
    told: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    scores: dict[str, Any] = field(default_factory=dict)
    savings: dict[str, Any] = field(default_factory=dict)
    hash: str | None = None

    def lines(self) -> list[str]:
        verdict = f"promoted: {self.run}/{self.variant} is {self.name}" if self.promoted else \
            f"NOT promoted: {self.run}/{self.variant}"
        over = f" instead of {self.champion}" if self.promoted and self.champion else ""
        forced = ", by force" if self.forced else ""
        return [*self.told, *(f"against it: {reason}" for reason in self.against), f"{verdict}{over}{forced}",
                *([f"ledger: {self.hash}"] if self.hash else [])]

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def promote(runs: str | None, run: str | None, variant: str, *, name: str = "champion", why: str | None = None,
            margin: float | None = None, saving: str | None = None, batch: int | None = None,
            force: bool = False) -> Decision:
    """Make a variant the champion `name` if it earns it.

    margin: where the run's goals have none, of its first score and others in the same unit; saving: one of SAVINGS, the
    cost that must be better (default: the goals' `prefer`, else any), at every batch size or at `batch`. Raises
    LlmopsError for what is not there, a variant that is not sound, no margin, scores of other prompts (unless forced),
    and a ledger that was tampered with.
    """
    rows = rows_of(runs, run)
    store = Store(runs)
    ledger = sound(store)
    row = next((each for each in rows if name_of(each) == variant), None)
    if row is None:
        raise LlmopsError(unknown("variant", variant, [name_of(each) for each in rows]))
    if state_of(row) != "ok":
        raise LlmopsError(f"{variant} is {status_text(row)}; expected a variant that was built and scored")
    check_saving(saving, batch)
    if margin is not None and margin <= 0:
        raise LlmopsError(f"--margin {margin:g}; expected a number above 0, in the unit of the score, as 0.02")
    found = Decision(name, str(row["identity"]["run"]), variant)
    before = ledger.promotions(name)
    champion = ledger.row(before[-1]["row_id"]) if before else None
    if champion is None:
        _first(found, row)
    else:
        _challenge(found, row, champion, ledger, margin, (saving, batch), force)
    found.forced = force and bool(found.against)
    found.promoted = not found.against or found.forced
    if found.promoted:
        _record(found, row, before, why, ledger, store)
    return found


def champions(runs: str | None, name: str | None = None, *, history: bool = False) -> list[dict[str, Any]]:
    """The promotions in force, or with `history` all of them, oldest first. LlmopsError for an unknown name."""
    store = Store(runs)
    if not (store.runs / "ledger.db").exists():
        raise LlmopsError(f"no ledger in {store.runs}; expected one written by `llmops tune`; name the folder of runs "
                          "with --runs")
    found = store.ledger().promotions(name)
    if name is not None and not found:
        raise LlmopsError(unknown("champion", name, dict.fromkeys(each["name"] for each in
                                                                  store.ledger().promotions()) or ["none yet"]))
    return found if history else list({each["name"]: each for each in found}.values())


def _first(found: Decision, row: Mapping[str, Any]) -> None:
    """Nothing to compare with: it has to meet the goals of its own run."""
    found.told.append(f"there is no {found.name} yet, so nothing to compare with")
    missed = [goal for goal in row["verdict"]["goals"] if not goal["met"]]
    found.told += [f"{goal['goal']}: {goal['detail']}" for goal in row["verdict"]["goals"] if goal["met"]]
    found.against += [f"{goal['goal']}: {goal['detail']}" for goal in missed]


def _challenge(found: Decision, row: Mapping[str, Any], champion: Mapping[str, Any], ledger: Ledger,
               margin: float | None, saving: tuple[str | None, int | None], force: bool) -> None:
    identity = champion["identity"]
    found.champion = f"{identity['run']}/{identity['variant']}"
    if row["row_id"] == champion["row_id"] or row["identity"]["key"] == identity["key"]:
        raise LlmopsError(f"{found.run}/{found.variant} is the build that is {found.name} already (promoted as "
                          f"{found.champion}); expected another build; nothing to do")
    judged = _margins(row, champion, margin)
    if margin is not None and any(limit != margin for limit in judged.values()):
        found.told.append(f"--margin {margin:g} is not used: the goals of {found.run} say how much worse scores may be")
    for score, limit in judged.items():
        try:
            body = pair_rows(ledger, row, champion, score)
            if body is None:
                raise LlmopsError(f"{score}: the items of one of the two are not in the ledger; score it again")
        except LlmopsError as error:
            if not force:
                raise LlmopsError(f"{found.champion} and {found.run}/{found.variant} cannot be compared: {error}") \
                    from error
            found.against.append(f"not comparable: {error}")
            continue
        _judge_score(found, score, body, limit, rising([row], score))
    _judge_saving(found, row, champion, *saving)


def _margins(row: Mapping[str, Any], champion: Mapping[str, Any], margin: float | None) -> dict[str, float]:
    shared = [score for score in score_ids([row]) if score in (champion.get("quality") or {})]
    if not shared:
        raise LlmopsError(f"{name_of(row)} and the champion {name_of(champion)} have no score in common ("
                          f"{', '.join(score_ids([row])) or 'none'}; {', '.join(score_ids([champion])) or 'none'}); "
                          "expected one: score both on the same data, under the same name")
    goals = (row.get("goals") or {}).get("quality") or {}
    found = {score: float(limit) for score in shared if (limit := (goals.get(score) or {}).get("noninferior")
                                                         or (goals.get(score) or {}).get("max_drop"))}
    if not found and margin is not None:  # it has the unit of one kind of score
        units = {score: figure(row, "quality", score, "value").unit for score in shared}
        found = {score: margin for score in shared if units[score] == units[shared[0]]}
    if not found:
        raise LlmopsError("no margin says how much worse a champion's successor may be; expected noninferior or "
                          "max_drop in the recipe's goals, or give --margin 0.02")
    return found


def _judge_score(found: Decision, score: str, body: Mapping[str, Any], margin: float, up: bool) -> None:
    p, drop, worst = noninferiority_p(body, margin, up), drop_of(body, up), worst_drop(body, up)
    found.scores[score] = {"margin": margin, "drop": drop, "worst": worst, "p": p, "n": body.get("n"),
                           "gained": body.get("gained"), "lost": body.get("lost"),
                           "changed_answers": body.get("changed_answers")}
    if p is None or drop is None:
        reason = (body.get("delta") or {}).get("method") or "no standard error"
        found.against.append(f"{score}: cannot be judged: {reason}")
        return
    words = (f"{score}: {drop_words(drop, worst)}; margin {margin:g}, p = {number(p)}, {body['n']} items, "
             f"{body.get('gained')} won, {body.get('lost')} lost")
    (found.told if p <= LEVEL else found.against).append(
        f"{words}: {'non-inferior' if p <= LEVEL else 'not shown to be non-inferior'}")


def _judge_saving(found: Decision, row: Mapping[str, Any], champion: Mapping[str, Any], saving: str | None,
                  batch: int | None) -> None:
    """Shown where one figure is better; of a figure that was named, none may be shown to be worse at another size."""
    prefer = (row.get("goals") or {}).get("prefer")
    wanted = saving or (prefer if prefer in COSTS else None)
    seen = savings(row, champion, wanted, batch)
    found.savings = {each.figure: each.as_dict() for each in seen}
    better = [f"{each.figure} {each.told()}" for each in seen if each.better]
    worse = [f"{each.figure} {each.told()}" for each in seen if each.better is False] if wanted else []
    if better:
        found.told.append(f"saving shown: {', '.join(better)}")
    if better and worse:
        found.against.append(f"it costs more: {', '.join(worse)}; name the size that counts with --batch")
    if not better:
        told = "; ".join(f"{each.figure}: {each.told()}" for each in seen) or "no cost was measured in both"
        found.against.append(f"no saving shown{f' in {wanted}' if wanted else ''} ({told})")


def _record(found: Decision, row: Mapping[str, Any], before: Sequence[Mapping[str, Any]], why: str | None,
            ledger: Ledger, store: Store) -> None:
    body = {"why": why, "run": found.run, "variant": found.variant, "key": row["identity"]["key"],
            "replaces": before[-1]["id"] if before else None, "forced": found.forced, "told": found.told,
            "against": found.against, "scores": found.scores, "savings": found.savings}
    _, found.hash = ledger.promote(found.name, int(row["row_id"]), json.loads(json.dumps(body)))
    if store.build(row["identity"]["key"]).is_dir():
        store.link(CHAMPIONS, found.name, row["identity"]["key"])

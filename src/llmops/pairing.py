"""Rows and scores brought together by their items: with which variants a variant is compared, and the comparison.

A comparison is what a row's `versus` holds: `statistics.paired` and its slices as plain values, or `not_comparable`
with the reason. Scores of other prompts or another protocol are never compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmops.errors import LlmopsError
from llmops.ledger import Ledger
from llmops.quantity import Quantity
from llmops.recipe.schema import BASE, Recipe

if TYPE_CHECKING:
    from llmops.evaluate.score import Score

__all__ = ["completed", "pair", "pair_rows", "reasoned", "references", "stored_score"]


def references(variant: str, parents: Sequence[str], recipe: Recipe) -> dict[str, str]:
    """Label -> name of every variant that `variant` is held against: its parent, base, and what goals name."""
    found = {"parent": parents[0]} if parents else {}
    found[BASE] = BASE
    found |= {f"variant {goal.against}": goal.against for goal in recipe.goals.quality.values() if goal.against}
    return {label: name for label, name in found.items() if name != variant}


def pair(score: Score, other: Score, seed: int) -> dict[str, Any]:
    """The comparison as a row holds it. Raises LlmopsError when the two are of different items or protocols."""
    from llmops.evaluate.slices import sliced_pair
    from llmops.evaluate.statistics import paired

    found = paired(score, other, seed)
    slices = sliced_pair(score, other, seed)
    body: dict[str, Any] = _plain({**found, "slices": slices} if slices else found)
    return body


def pair_rows(ledger: Ledger, row: Mapping[str, Any], other: Mapping[str, Any], score: str) -> dict[str, Any] | None:
    """The same of two rows, from the items in the ledger; None where one of them has no items. Raises as `pair`."""
    sides = [stored_score(ledger, each, score) for each in (row, other)]
    if sides[0] is None or sides[1] is None or not (sides[0].items and sides[1].items):
        return None
    return pair(sides[0], sides[1], int(row["identity"]["seed"]))


def stored_score(ledger: Ledger, row: Mapping[str, Any] | None, score: str) -> Score | None:
    """A score of a row with its items back from the ledger; None where the row has no such score."""
    from llmops.evaluate.score import Item, Score

    if row is None or score not in (row.get("quality") or {}):
        return None
    items = ledger.items(row["row_id"], score)
    return Score.from_dict(row["quality"][score], [Item(**item) for item in items])


def completed(quality: Mapping[str, Any], ledger: Ledger, row_id: int, others: Mapping[str, str],
              rows: Mapping[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """The scores of a row taken from another run, compared with what stands beside it in this one.

    row_id: where the items are; others: as `references`; rows: of this run, by variant.
    """
    found = {}
    for score_id, body in quality.items():
        score = stored_score(ledger, {"quality": quality, "row_id": row_id}, score_id)
        versus = {}
        for label, name in others.items():
            other = stored_score(ledger, rows.get(name), score_id)
            if score is not None and other is not None:
                versus[label] = {"variant": name, **reasoned(score, other, seed)}
        found[score_id] = {**body, "versus": versus}
    return found


def reasoned(score: Score, other: Score, seed: int) -> dict[str, Any]:
    """`pair`, or why not: other items, another protocol."""
    try:
        return pair(score, other, seed)
    except LlmopsError as reason:
        return {"not_comparable": str(reason)}


def _plain(body: Any) -> Any:
    if isinstance(body, Quantity):
        return body.as_dict()
    return {key: _plain(value) for key, value in body.items()} if isinstance(body, dict) else body

"""A score and the items it is made of.

A score without its items is a claim nobody can check: W3 quantization at "-1.5 points, p = 0.75" had changed 44 % of
the answers. So each item keeps the hash of what the model was shown, its own score, and the answer given; a table of
means is made from them, never instead of them. The protocol says how the number came about, in enough detail that
another program can repeat it; two scores whose protocols differ are not comparable
(`llmops.evaluate.statistics.paired`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmops.quantity import Quantity

__all__ = ["Item", "Score"]


@dataclass(frozen=True)
class Item:
    """One question, choice or window.

    id: first 16 hex digits of the SHA-256 of the exact token ids shown (for harness tasks: of document and prompt).
    score: 1 or 0 for right or wrong; mean next-token loss in nats for a perplexity window; None when it was not finite.
    answer: what the model said; empty where nothing is said (perplexity).
    detail: JSON-ready; `weight` (default 1) is the item's share of a weighted mean; `groups` holds its value in each
    column that the score is sliced by, `cluster` what it shares with other items (`labelled`).
    """

    id: str
    score: float | None
    answer: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        return float(self.detail.get("weight", 1.0))

    @property
    def groups(self) -> dict[str, str]:
        found = self.detail.get("groups")
        return found if isinstance(found, dict) else {}

    @property
    def cluster(self) -> str | None:
        return self.detail.get("cluster")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `Item(**body)` is its inverse."""
        return asdict(self)


@dataclass(frozen=True)
class Score:
    """One metric of one variant on one data set.

    id: "exact_match:test". value: with its 95% interval and n, the number of items. stderr: standard error of the
    value, sample standard deviation / sqrt(n) for a mean (as lm-eval has it); None when it cannot be had (one item).
    protocol: `id` names it, `aggregation` says how the items make the value (see statistics.AGGREGATIONS).
    """

    id: str
    metric: str
    higher_is_better: bool
    value: Quantity
    stderr: float | None
    protocol: dict[str, Any]
    items: list[Item] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The score as a ledger row holds it; the items are stored apart, of what was asked there is a hash here."""
        asked = hashlib.sha256("\n".join(item.id for item in self.items).encode()).hexdigest()
        return {"id": self.id, "metric": self.metric, "higher_is_better": self.higher_is_better,
                "value": self.value.as_dict(), "stderr": self.stderr, "n": self.value.n, "protocol": self.protocol,
                "items_sha256": asked if self.items else None}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], items: Iterable[Item] = ()) -> Score:
        """The inverse of `as_dict`, given the items; keys that `as_dict` does not write are ignored."""
        return cls(body["id"], body["metric"], body["higher_is_better"], Quantity.from_dict(body["value"]),
                   body["stderr"], dict(body["protocol"]), list(items))

"""Not worse by more than a margin: the test behind `noninferior`, from the comparison that a row holds.

"p > .05" shows nothing: with few items everything passes it. Here the burden is the other way round: the null is that
the variant lost `margin` or more, and a small p shows that it did not (one-sided, at 2.5%, which is what the end of a
95% interval within the margin says). Right/wrong items use Tango's score test, which holds its level with few flips;
clusters and other scores a t test on the paired standard error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmops.evaluate.paired_tests import normal_tail, tango

__all__ = ["LEVEL", "drop_of", "noninferiority_p", "worst_drop"]

LEVEL = 0.025


def drop_of(body: Mapping[str, Any], rising: bool) -> float | None:
    """How much worse the variant is, in the score's unit; negative where it is better."""
    value = (body.get("delta") or {}).get("value")
    return None if value is None else (-float(value) if rising else float(value))


def worst_drop(body: Mapping[str, Any], rising: bool) -> float | None:
    """The far end of the drop's 95% interval."""
    ends = (body.get("delta") or {}).get("ci95")
    return None if not ends else (-float(ends[0]) if rising else float(ends[1]))


def noninferiority_p(body: Mapping[str, Any], margin: float, rising: bool) -> float | None:
    """p of "the drop is `margin` or more"; None where the comparison holds no standard error.

    body: one of a row's `versus` (statistics.paired). rising: whether more is better. margin > 0, in the score's unit.
    """
    drop, n, counts = drop_of(body, rising), body.get("n"), body.get("score_test")
    if drop is None or not n:
        return None
    if counts and margin < counts["scale"]:
        return normal_tail(tango(counts["gained"], counts["lost"], counts["n"], -margin / counts["scale"]))
    stderr, units = body.get("delta_stderr"), int(body.get("clusters") or n)
    if not stderr:
        return None
    from scipy.special import stdtr

    return float(stdtr(units - 1, -(margin - drop) / stderr))

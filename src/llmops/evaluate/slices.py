"""Slices: the same comparison within every group of a column, because a mean hides whom compression hurts.

A group's `excess` says how much more its items lost than the others' did, with an interval of its own:

    excess_g = drop_g - drop_rest        drop = other - variant (for a score where more is better)

Its standard error is that of a difference of two ratio means over the same clusters (linearisation, as
`statistics.weighted_mean`; of a perplexity, exp of such a mean, by the delta method), so a document with questions in
several groups is counted as the one document it is. The p values of a column's groups are corrected by Holm. A group of
fewer than `LEAST` items (or clusters, where there are any) is shown and never judged: one answer of it would be more
than any margin. Items of a perplexity are what each document has in a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmops.errors import DataError, nearest
from llmops.evaluate.bootstrap import AGGREGATIONS, cluster_sums
from llmops.evaluate.paired_tests import holm
from llmops.evaluate.score import Item, Score
from llmops.evaluate.statistics import LARGEST_LOG, clusters_of, compare, summarize
from llmops.quantity import Quantity

__all__ = ["LEAST", "MOST", "NO_VALUE", "grouped", "labels", "sliced", "sliced_pair"]

Array = NDArray[np.float64]
LEAST = 10  # items (or clusters) a group needs to be judged
MOST = 50  # groups of a column
NO_VALUE = "(none)"


def labels(rows: Sequence[Mapping[str, Any]], slices: Sequence[str], cluster: str | None, where: str,
           ) -> list[dict[str, Any]]:
    """What each row adds to its item's detail: {"groups": {column: value}, "cluster": value}, {} where none is asked.

    A row without a value is in the group `NO_VALUE`; without one in the cluster's column it stands alone.
    Raises DataError when a column is in no row, holds lists or mappings, or has more than MOST groups.
    """
    for column in dict.fromkeys([*slices, *([cluster] if cluster else [])]):
        _check(rows, column, column in slices, where)
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        detail: dict[str, Any] = {}
        if slices:
            detail["groups"] = {column: _text(row.get(column)) for column in slices}
        if cluster:
            value = row.get(cluster)
            detail["cluster"] = _text(value) if value not in (None, "") else f"row {number + 1}"
        found.append(detail)
    return found


def grouped(items: Sequence[Item], column: str) -> dict[str, list[int]]:
    """Group -> places of its items, by the group's name."""
    found: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        found.setdefault(item.groups.get(column, NO_VALUE), []).append(place)
    return {group: found[group] for group in sorted(found)}


def sliced(score: Score) -> dict[str, Any]:
    """{column: {group: {"value", "stderr", "n"}}} of one score; {} without slices, and for a score that is no mean."""
    if score.protocol.get("aggregation") not in AGGREGATIONS:
        return {}
    found: dict[str, Any] = {}
    for column in _columns(score):
        found[column] = {}
        for group, places in grouped(score.items, column).items():
            value, stderr = summarize([score.items[place] for place in places], score.protocol["aggregation"],
                                      score.value.unit, f"{column} {group}")
            found[column][group] = {"value": value.as_dict(), "stderr": stderr, "n": len(places)}
    return found


def sliced_pair(variant: Score, other: Score, seed: int) -> dict[str, Any]:
    """{column: {"groups": {group: comparison}, "worst": group}} of two scores that `paired` has found comparable.

    comparison: what `statistics.compare` gives, with "p_holm" over the column's groups and "excess" (Quantity).
    worst: the judged group that lost most, None where none has LEAST items. {} without slices, and for scores that are
    neither a mean of their items nor exp of one.
    """
    aggregation = variant.protocol.get("aggregation")
    if aggregation not in AGGREGATIONS or any(item.score is None or (aggregation == "exp_mean"
                                                                     and item.score > LARGEST_LOG)
                                              for item in (*variant.items, *other.items)):
        return {}
    rising = variant.higher_is_better and aggregation == "mean"  # the items of an exp_mean are losses
    a, b = (np.array([item.score for item in score.items], dtype=np.float64) for score in (variant, other))
    w = np.array([item.weight for item in variant.items])
    clusters = clusters_of(variant.items)
    found: dict[str, Any] = {}
    for column in _columns(variant):
        groups: dict[str, dict[str, Any]] = {}
        for group, places in grouped(variant.items, column).items():
            at = np.array(places)
            within = [clusters[place] for place in places] if clusters is not None else None
            groups[group] = compare(a[at], b[at], w[at], seed, unit=variant.value.unit, aggregation=aggregation,
                                    rising=rising, clusters=within)
            lost, kept = (b, a) if rising else (a, b)  # drop = f(lost) - f(kept)
            groups[group]["excess"] = _excess(lost, kept, w, at, clusters, aggregation, variant.value.unit)
        corrected = holm({group: body["p"] for group, body in groups.items() if body["p"] is not None})
        for group, body in groups.items():
            body["p_holm"] = corrected.get(group)
        found[column] = {"groups": groups, "worst": _worst(groups, rising)}
    return found


def _excess(lost: Array, kept: Array, w: Array, at: NDArray[np.int64], clusters: Sequence[str] | None,
            aggregation: str, unit: str) -> Quantity:
    """Drop of the items `at` minus that of all others, with Student's interval. drop = f(mean lost) - f(mean kept)."""
    from scipy.special import stdtrit

    inside = np.zeros(len(lost), dtype=bool)
    inside[at] = True
    if inside.all():
        return Quantity.null(unit, "every item is in this group")
    value_of = AGGREGATIONS[aggregation]
    influence, means = np.zeros(len(lost)), []
    for mask, sign in ((inside, 1), (~inside, -1)):
        total, drop = w[mask].sum(), 0.0
        for each, side in ((lost, 1), (kept, -1)):
            mean = (w * each)[mask].sum() / total
            slope = float(value_of(mean)) if aggregation == "exp_mean" else 1.0  # d exp(mean) = exp(mean) d mean
            drop += side * float(value_of(mean))
            influence[mask] += sign * side * slope * w[mask] * (each[mask] - mean) / total
        means.append(drop)
    sums = influence if clusters is None else cluster_sums(influence[None], clusters)[0]
    units = len(sums)
    fewest = min(int(inside.sum()), int((~inside).sum()))
    if clusters is not None:
        fewest = min(len({name for name, here in zip(clusters, mask, strict=True) if here})
                     for mask in (inside, ~inside))
    value = means[0] - means[1]
    if fewest < 2:
        return Quantity.measured(value, unit, "drop of the group minus drop of the rest", n=int(inside.sum()))
    stderr = float(np.sqrt(units / (units - 1) * np.square(sums).sum()))
    half = float(stdtrit(fewest - 1, 0.975)) * stderr
    return Quantity.measured(value, unit, "drop of the group minus drop of the rest; Student t",
                             (value - half, value + half) if stderr > 0 else None, int(inside.sum()))


def _worst(groups: Mapping[str, Mapping[str, Any]], rising: bool) -> str | None:
    sign = 1 if rising else -1
    judged = {group: sign * body["delta"].value for group, body in groups.items()
              if (body["clusters"] or body["n"]) >= LEAST}
    return min(judged, key=lambda group: judged[group]) if judged else None


def _columns(score: Score) -> list[str]:
    return list(dict.fromkeys(column for item in score.items for column in item.groups))


def _check(rows: Sequence[Mapping[str, Any]], column: str, is_slice: bool, where: str) -> None:
    known = list(dict.fromkeys(key for row in rows for key in row))
    what = "slices" if is_slice else "cluster"
    if column not in known:
        raise DataError(f'{where}: {what} names the column "{column}", which no row has; found '
                        f"{', '.join(known)}{nearest(column, known)}; name one of them, or add the column to the data")
    odd = next((row[column] for row in rows if isinstance(row.get(column), list | dict)), None)
    if odd is not None:
        raise DataError(f'{where}: {what} names the column "{column}", which holds {type(odd).__name__}s; expected '
                        "text, numbers or truth values; name another column")
    count = len({_text(row.get(column)) for row in rows})
    if is_slice and count > MOST:
        raise DataError(f'{where}: slices names the column "{column}", which has {count} different values; expected at '
                        f"most {MOST} groups; name a coarser column (one whose items belong together is a `cluster`)")


def _text(value: Any) -> str:
    return NO_VALUE if value in (None, "") else str(value)

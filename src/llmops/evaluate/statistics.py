"""Intervals, and the paired comparison of two variants that answered the same questions.

Two variants of one model agree on most questions, so their difference is known far better than either score: on the
same 200 questions an unpaired test saw a standard error of 0.044 where the paired one is 0.009. Hence: pair by item,
resample items (bootstrap), test the flips (exact McNemar), and count flips both ways, since a mean of zero can hide
that a fifth of the answers changed hands (Dutta et al. 2024, "Accuracy is Not All You Need"). Scores whose items
differ are refused. Items that share a document (`cluster`) count as one observation of it: standard errors, bootstrap
and test are over clusters. Margins and several variants are judged from what is stored here (`noninferiority.py`).

Names: a, b are per-item scores of the variant and of the other; w are item weights; z, t are 97.5% quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmops.errors import LlmopsError
from llmops.evaluate.bootstrap import AGGREGATIONS, cluster_sums, paired_bootstrap
from llmops.evaluate.paired_tests import mcnemar, sign_flip, tango_interval
from llmops.evaluate.score import Item, Score
from llmops.quantity import Quantity

__all__ = ["AGGREGATIONS", "INCIDENTAL", "LARGEST_LOG", "check_comparable", "clusters_of", "compare", "is_binary",
           "mcnemar", "mean_interval", "paired", "paired_bootstrap", "proportion_interval", "standard_error",
           "summarize", "weighted_mean"]

Array = NDArray[np.float64]
Interval = tuple[float, float]

Z = 1.959963984540054  # 97.5% quantile of the normal distribution
LARGEST_LOG = 700.0  # exp of more does not fit a float
FEW = 20  # with fewer items that differ from what most did, a bootstrap is too narrow, down to nothing without any
INCIDENTAL = {"dtype", "tokenizer_sha256", "context_asked"}  # protocol keys in which two comparable scores may differ


def proportion_interval(successes: float, n: float) -> Interval:
    """Wilson's 95% score interval of a proportion; right at 0 and 1, where p +- z stderr collapses.

    Wilson 1927; centre (p + z^2/2n) / (1 + z^2/n). Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    successes = min(successes, n) if math.isclose(successes, n) else successes
    if not 0 <= successes <= n or n <= 0:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n > 0")
    p, zz = successes / n, Z * Z / n
    centre = (p + zz / 2) / (1 + zz)
    half = Z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def mean_interval(values: Sequence[float] | Array) -> Interval | None:
    """Student's 95% interval of a mean; None for fewer than two values."""
    _, stderr, interval = weighted_mean(values)
    return None if stderr is None else interval


def standard_error(values: Sequence[float] | Array) -> float | None:
    """Sample standard deviation / sqrt(n), for 0/1 values sqrt(p (1 - p) / (n - 1)); None for fewer than two values."""
    return weighted_mean(values)[1]


def weighted_mean(values: Sequence[float] | Array, weights: Sequence[float] | Array | None = None,
                  clusters: Sequence[Hashable] | None = None) -> tuple[float, float | None, Interval | None]:
    """(mean, stderr, 95% interval) of sum(w a) / sum(w), taken as a ratio of two sums over independent units.

    stderr^2 = G / (G - 1) * sum_g (sum_{i in g} w (a - mean))^2 / sum(w)^2 over G clusters (linearisation; Cochran
    1977, chapter 6; cluster-robust as Miller 2024, equation 4, with the factor G / (G - 1)); without clusters each
    item is its own, and with equal weights it is then exactly s / sqrt(n). The interval is mean +- t(G - 1) stderr.
    """
    from scipy.special import stdtrit

    a: Array = np.asarray(values, dtype=np.float64)
    w: Array = np.ones_like(a) if weights is None else np.asarray(weights, dtype=np.float64)
    total = w.sum()
    mean = float((w * a).sum() / total)
    residuals: Array = w * (a - mean)
    if clusters is not None:
        residuals = cluster_sums(residuals[None], clusters)[0]
    n = len(residuals)
    if n < 2:
        return mean, None, None
    stderr = float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / total)
    half = float(stdtrit(n - 1, 0.975)) * stderr
    return mean, stderr, (mean - half, mean + half)


def summarize(items: Sequence[Item], aggregation: str, unit: str, method: str) -> tuple[Quantity, float | None]:
    """The value (with interval and n) and standard error of a score.

    Means of 0/1 get Wilson's interval (of clusters: over the answers that they are worth), other means Student's,
    `exp_mean` exp of Student's on the log, with the delta method's standard error. Items without a finite score make
    the value null, with the reason.
    """
    missing = sum(item.score is None for item in items)
    if missing:
        return Quantity.null(unit, f"the loss was not finite in {missing} of {len(items)} items"), None
    a = np.array([item.score for item in items], dtype=np.float64)
    clusters = clusters_of(items)
    mean, stderr, interval = weighted_mean(a, [item.weight for item in items], clusters)
    if clusters is not None:
        method = f"{method}; {len(set(clusters))} clusters"
    if aggregation == "exp_mean":
        mean = max(mean, a.max()) if a.max() > LARGEST_LOG else mean  # a resampled mean may reach the worst item
        return _exponential(mean, stderr, interval, unit, method, len(a))
    if is_binary(a) and len({item.weight for item in items}) == 1:
        size = float(len(a)) if clusters is None else _effective(mean, stderr, len(a), len(set(clusters)))
        interval = proportion_interval(mean * size, size)
        return Quantity.measured(mean, unit, f"{method}; Wilson", interval, len(a)), stderr
    return Quantity.measured(mean, unit, f"{method}; Student t", interval, len(a)), stderr


def _effective(p: float, stderr: float | None, n: int, clusters: int) -> float:
    """How many independent answers tell as much: p (1 - p) / stderr^2, between the clusters and the items.

    All right or all wrong tells nothing of how clusters vary, and then each is one answer (Korn and Graubard 1998).
    """
    if not stderr or not 0 < p < 1:
        return float(clusters)
    return min(float(n), max(float(min(clusters, n)) / 2, p * (1 - p) / stderr ** 2))


def _exponential(mean: float, stderr: float | None, interval: Interval | None, unit: str, method: str, n: int,
                 ) -> tuple[Quantity, float | None]:
    if max(mean, *(interval or (mean,))) > LARGEST_LOG:
        return Quantity.null(unit, f"exp of a mean loss of {mean:.0f} nats is beyond what a float holds"), None
    value = math.exp(mean)
    ci95 = (math.exp(interval[0]), math.exp(interval[1])) if interval else None
    return (Quantity.measured(value, unit, f"{method}; exp of Student t over windows", ci95, n),
            None if stderr is None else value * stderr)


def clusters_of(items: Sequence[Item]) -> list[str] | None:
    """What each item shares with others; None where nothing does, so that each stands alone."""
    found = [item.cluster for item in items]
    return None if not items or any(each is None for each in found) else [str(each) for each in found]


def paired(variant: Score, other: Score, seed: int) -> dict[str, Any]:
    """The variant against the other (its parent, or base), item by item.

    Returns {"delta": variant - other with its interval, "delta_stderr": its paired standard error, "p": two-sided,
    that there is no difference ("p_of" names the test), "mcnemar_p": for right/wrong items, else None, "gained": items
    better than before, "lost": worse, "changed_answers": items whose answer is another one (None where nothing is
    answered), "n", "clusters": None where items stand alone, "score_test": the counts that a score test of a margin is
    about, None where a t test is}, and for perplexity "ratio": exp of the mean paired log
    difference, with Student's interval on the log. Raises LlmopsError when the two scores are of different items or
    protocols.
    """
    check_comparable(variant, other)
    unit, n = variant.value.unit, len(variant.items)
    spoken = any(item.answer for item in (*variant.items, *other.items))
    result: dict[str, Any] = {"n": n, "mcnemar_p": None, "gained": None, "lost": None, "changed_answers": None,
                              "p": None, "p_of": None, "delta_stderr": None, "clusters": None,
                              "score_test": None}
    if spoken:
        result["changed_answers"] = sum(i.answer != j.answer for i, j in zip(variant.items, other.items, strict=True))
    aggregation = variant.protocol.get("aggregation", "mean")
    reason = _unpairable(variant, other, aggregation)
    if reason:
        return {**result, "delta": Quantity.null(unit, reason)}
    a, b = (np.array([item.score for item in score.items], dtype=np.float64) for score in (variant, other))
    w = np.array([item.weight for item in variant.items])
    rising = variant.higher_is_better if aggregation == "mean" else False  # the items of an exp_mean are losses
    result |= compare(a, b, w, seed, unit=unit, aggregation=aggregation, rising=rising,
                      clusters=clusters_of(variant.items))
    assert variant.value.value is not None and other.value.value is not None
    result["delta"] = replace(result["delta"], value=variant.value.value - other.value.value)
    if aggregation == "exp_mean":
        result["ratio"] = _exponential(*weighted_mean(a - b, w, clusters_of(variant.items)), "ratio",
                                       "paired over windows", n)[0]
    return result


def compare(a: Array, b: Array, w: Array, seed: int, *, unit: str, aggregation: str, rising: bool,
            clusters: Sequence[str] | None) -> dict[str, Any]:
    """What `paired` returns of plain arrays: (n,) scores of the variant and of the other, and item weights."""
    better, worse = (a > b, a < b) if rising else (a < b, a > b)
    gained, lost, n = int(better.sum()), int(worse.sum()), len(a)
    units = len(set(clusters)) if clusters is not None else n
    binary = is_binary(a) and is_binary(b) and len(set(w)) == 1
    counts = _counts(better, worse, clusters) if binary else None
    odd = n - max(gained, lost, n - gained - lost)  # most stay as they were, or nearly all are gained, or lost
    if counts is not None and odd < FEW:
        interval, how = _score_interval(counts, rising, odd, gained + lost, clusters is not None)
    else:
        interval = paired_bootstrap(a, b, seed, weights=w, aggregation=aggregation, clusters=clusters)
        how = f"paired bootstrap over {'items' if clusters is None else f'{units} clusters'}, percentile"
    value = AGGREGATIONS[aggregation]
    means = [np.asarray((w * each).sum() / w.sum()) for each in (a, b)]
    if aggregation == "exp_mean":  # d exp(mean) = exp(mean) d mean
        stderr = weighted_mean(value(means[0]) * (a - means[0]) - value(means[1]) * (b - means[1]), w, clusters)[1]
    else:
        stderr = weighted_mean(a - b, w, clusters)[1]
    p, test = _p(a, b, w, better, worse, clusters, binary)
    return {"delta": Quantity.measured(float(value(means[0]) - value(means[1])), unit, how, interval, n),
            "delta_stderr": stderr, "gained": gained, "lost": lost, "p": p, "p_of": test,
            "score_test": counts if counts is not None and (clusters is None or odd < FEW) else None,
            "mcnemar_p": p if binary else None, "n": n, "clusters": units if clusters is not None else None}


def _counts(better: NDArray[np.bool_], worse: NDArray[np.bool_], clusters: Sequence[str] | None) -> dict[str, Any]:
    """What Tango's test is about: {"gained", "lost", "n"} units, and what one unit's flip is worth in items ("scale").

    Of clusters, each counts once, by the sign of its sum; a cluster that flips is worth as many items as those that
    did were on average (without any: all of its items), of n items.
    """
    n = len(better)
    if clusters is None:
        return {"gained": int(better.sum()), "lost": int(worse.sum()), "n": n, "scale": 1.0}
    sums = cluster_sums((better.astype(np.float64) - worse)[None], clusters)[0]
    flipped = np.abs(sums[sums != 0])
    each = float(flipped.mean()) if len(flipped) else n / len(sums)
    return {"gained": int((sums > 0).sum()), "lost": int((sums < 0).sum()), "n": len(sums),
            "scale": each * len(sums) / n}


def _score_interval(counts: dict[str, Any], rising: bool, odd: int, flips: int, clustered: bool,
                    ) -> tuple[Interval, str]:
    low, high = (counts["scale"] * end for end in tango_interval(counts["gained"], counts["lost"], counts["n"]))
    how = "score interval of Tango, since only " + (f"{flips} items flipped" if flips == odd else
                                                    f"{odd} items did not flip as the others did")
    return ((low, high) if rising else (-high, -low)), how + (f", over {counts['n']} clusters" if clustered else "")


def _p(a: Array, b: Array, w: Array, better: NDArray[np.bool_], worse: NDArray[np.bool_],
       clusters: Sequence[str] | None, binary: bool) -> tuple[float | None, str | None]:
    if binary and clusters is None:
        return mcnemar(int(better.sum()), int(worse.sum())), "exact McNemar"
    if binary and clusters is not None:
        sums = cluster_sums((better.astype(np.float64) - worse)[None], clusters)[0]
        return sign_flip([round(each) for each in sums]), "exact sign flips of clusters"
    mean, stderr, _ = weighted_mean(a - b, w, clusters)
    if stderr is None:
        return None, None
    if stderr == 0:
        return (1.0 if mean == 0 else 0.0), "paired t"
    from scipy.special import stdtr

    units = len(set(clusters)) if clusters is not None else len(a)
    return float(2 * stdtr(units - 1, -abs(mean / stderr))), "paired t"


def check_comparable(variant: Score, other: Score) -> None:
    """Raises LlmopsError, with what differs, unless metric, protocol and items are the same."""
    if variant.metric != other.metric:
        raise LlmopsError(f"{variant.id} is of {variant.metric} and {other.id} of {other.metric}: two metrics are not "
                          "compared; give two scores of one metric")
    differing = sorted(key for key in {*variant.protocol, *other.protocol} - INCIDENTAL
                       if variant.protocol.get(key) != other.protocol.get(key))
    if differing:
        key = differing[0]
        raise LlmopsError(f"{variant.id}: {key} is {variant.protocol.get(key)!r} in one score and "
                          f"{other.protocol.get(key)!r} in the other; expected one protocol; score both variants again")
    ids, others = [item.id for item in variant.items], [item.id for item in other.items]
    if ids != others:
        shared = len(set(ids) & set(others))
        raise LlmopsError(f"{variant.id}: the two scores are not of the same prompts ({len(ids)} and {len(others)} "
                          f"items, {shared} in common); expected the same items in the same order; score both variants "
                          "again on the same data, with the same tokenizer and chat template")


def _unpairable(variant: Score, other: Score, aggregation: str) -> str | None:
    if aggregation not in AGGREGATIONS:
        return f"{aggregation} is no mean of its items, so items cannot be resampled"
    for score in (variant, other):
        if score.value.value is None:
            return score.value.method
    return None if variant.items else "the score has no items"


def is_binary(values: Array) -> bool:
    """Whether every value is right or wrong."""
    return bool(np.isin(values, (0.0, 1.0)).all())

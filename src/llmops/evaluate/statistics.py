"""Intervals, and the paired comparison of two variants that answered the same questions.

Two variants of one model agree on most questions, so their difference is known far better than either score: on the
same 200 questions an unpaired test saw a standard error of 0.044 where the paired one is 0.009. Hence: pair by item,
resample items (bootstrap), test the flips (exact McNemar), and count flips both ways, since a mean of zero can hide
that a fifth of the answers changed hands (Dutta et al. 2024, "Accuracy is Not All You Need"). Scores whose items
differ are refused. Left out: clusters of items that share a document, correction over many variants, margins.

Names: a, b are per-item scores of the variant and of the other; w are item weights; z, t are 97.5% quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmops.errors import LlmopsError
from llmops.evaluate.score import Item, Score
from llmops.quantity import Quantity

__all__ = ["AGGREGATIONS", "mcnemar", "mean_interval", "paired", "paired_bootstrap", "proportion_interval",
           "standard_error", "summarize", "weighted_mean"]

Array = NDArray[np.float64]
Interval = tuple[float, float]

Z = 1.959963984540054  # 97.5% quantile of the normal distribution
RESAMPLES = 10_000
DRAWS = 4_000_000  # item draws held in memory at a time
MAX_DRAWS = 200_000_000  # above this, fewer resamples
LARGEST_LOG = 700.0  # exp of more does not fit a float
INCIDENTAL = {"dtype", "tokenizer_sha256", "context_asked"}  # protocol keys in which two comparable scores may differ

# How the items of a score make its value: a transform of their weighted mean.
AGGREGATIONS: dict[str, Callable[[Array], Array]] = {
    "mean": lambda mean: mean,
    "exp_mean": np.exp,  # perplexity: items are mean losses in nats
}


def proportion_interval(successes: float, n: int) -> Interval:
    """Wilson's 95% score interval of a proportion; right at 0 and 1, where p +- z stderr collapses.

    Wilson 1927; centre (p + z^2/2n) / (1 + z^2/n). Raises ValueError unless 0 <= successes <= n and n > 0.
    """
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
                  ) -> tuple[float, float | None, Interval | None]:
    """(mean, stderr, 95% interval) of sum(w a) / sum(w), taken as a ratio of two sums over independent items.

    stderr^2 = n / (n - 1) * sum((w (a - mean))^2) / sum(w)^2 (linearisation; Cochran 1977, chapter 6); with equal
    weights it is exactly s / sqrt(n). The interval is mean +- t(n - 1) stderr.
    """
    from scipy.special import stdtrit

    a: Array = np.asarray(values, dtype=np.float64)
    w: Array = np.ones_like(a) if weights is None else np.asarray(weights, dtype=np.float64)
    n, total = len(a), w.sum()
    mean = float((w * a).sum() / total)
    if n < 2:
        return mean, None, None
    stderr = float(np.sqrt(n / (n - 1) * np.square(w * (a - mean)).sum()) / total)
    half = float(stdtrit(n - 1, 0.975)) * stderr
    return mean, stderr, (mean - half, mean + half)


def summarize(items: Sequence[Item], aggregation: str, unit: str, method: str) -> tuple[Quantity, float | None]:
    """The value (with interval and n) and standard error of a score.

    Means of 0/1 get Wilson's interval, other means Student's, `exp_mean` exp of Student's on the log, with the delta
    method's standard error. Items without a finite score make the value null, with the reason.
    """
    missing = sum(item.score is None for item in items)
    if missing:
        return Quantity.null(unit, f"the loss was not finite in {missing} of {len(items)} items"), None
    a = np.array([item.score for item in items], dtype=np.float64)
    mean, stderr, interval = weighted_mean(a, [item.weight for item in items])
    if aggregation == "exp_mean":
        mean = max(mean, a.max()) if a.max() > LARGEST_LOG else mean  # a resampled mean may reach the worst item
        return _exponential(mean, stderr, interval, unit, method, len(a))
    if _binary(a) and len({item.weight for item in items}) == 1:
        interval = proportion_interval(float(a.sum()), len(a))
        return Quantity.measured(mean, unit, f"{method}; Wilson", interval, len(a)), stderr
    return Quantity.measured(mean, unit, f"{method}; Student t", interval, len(a)), stderr


def _exponential(mean: float, stderr: float | None, interval: Interval | None, unit: str, method: str, n: int,
                 ) -> tuple[Quantity, float | None]:
    if max(mean, *(interval or (mean,))) > LARGEST_LOG:
        return Quantity.null(unit, f"exp of a mean loss of {mean:.0f} nats is beyond what a float holds"), None
    value = math.exp(mean)
    ci95 = (math.exp(interval[0]), math.exp(interval[1])) if interval else None
    return (Quantity.measured(value, unit, f"{method}; exp of Student t over windows", ci95, n),
            None if stderr is None else value * stderr)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: gained ~ Binomial(gained + lost, 1/2) when neither variant is better.

    gained: wrong before and right now; lost: the reverse. 1.0 when nothing flipped.
    """
    from scipy.special import bdtr

    flips = gained + lost
    return min(1.0, 2.0 * float(bdtr(min(gained, lost), flips, 0.5))) if flips else 1.0


def paired_bootstrap(a: Sequence[float] | Array, b: Sequence[float] | Array, seed: int, *,
                     weights: Sequence[float] | Array | None = None, aggregation: str = "mean",
                     resamples: int = RESAMPLES) -> Interval:
    """95% percentile interval of value(a) - value(b), resampling items as pairs (Efron 1979; Miller 2024, 2411.00640).

    a, b: (n,) scores of the same items. When the differences take few values, as right/wrong does, the counts of each
    value are drawn from the multinomial: the same distribution as drawing items, at a hundredth of the cost.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    n = len(x)
    rng = np.random.default_rng(seed)
    resamples = max(100, min(resamples, MAX_DRAWS // n))
    rows: Array = np.stack([w, w * x, w * y])
    kinds, counts = np.unique(rows, axis=1, return_counts=True)
    if kinds.shape[1] <= 16:
        sums = (rng.multinomial(n, counts / n, size=resamples) @ kinds.T).T
    else:
        step = max(1, DRAWS // n)
        parts = [rows[:, rng.integers(0, n, size=(min(step, resamples - start), n))].sum(-1)
                 for start in range(0, resamples, step)]
        sums = np.concatenate(parts, axis=1)  # (3, resamples)
    value = AGGREGATIONS[aggregation]
    low, high = np.quantile(value(sums[1] / sums[0]) - value(sums[2] / sums[0]), [0.025, 0.975])
    return float(low), float(high)


def paired(variant: Score, other: Score, seed: int) -> dict[str, Any]:
    """The variant against the other (its parent, or base), item by item.

    Returns {"delta": variant - other with its interval, "mcnemar_p": for right/wrong items, else None, "gained": items
    better than before, "lost": worse, "changed_answers": items whose answer is another one (None where nothing is
    answered), "n"}, and for perplexity "ratio": exp of the mean paired log difference, with Student's interval on the
    log. Raises LlmopsError when the two scores are of different items or protocols.
    """
    _check_comparable(variant, other)
    unit, n = variant.value.unit, len(variant.items)
    spoken = any(item.answer for item in (*variant.items, *other.items))
    result: dict[str, Any] = {"n": n, "mcnemar_p": None, "gained": None, "lost": None, "changed_answers": None}
    if spoken:
        result["changed_answers"] = sum(i.answer != j.answer for i, j in zip(variant.items, other.items, strict=True))
    aggregation = variant.protocol.get("aggregation", "mean")
    reason = _unpairable(variant, other, aggregation)
    if reason:
        return {**result, "delta": Quantity.null(unit, reason)}
    a, b = (np.array([item.score for item in score.items], dtype=np.float64) for score in (variant, other))
    w = np.array([item.weight for item in variant.items])
    assert variant.value.value is not None and other.value.value is not None
    interval = paired_bootstrap(a, b, seed, weights=w, aggregation=aggregation)
    result["delta"] = Quantity.measured(variant.value.value - other.value.value, unit,
                                        "paired bootstrap over items, percentile", interval, n)
    rising = variant.higher_is_better if aggregation == "mean" else False  # the items of an exp_mean are losses
    better, worse = (a > b, a < b) if rising else (a < b, a > b)
    result["gained"], result["lost"] = int(better.sum()), int(worse.sum())
    if _binary(a) and _binary(b):
        result["mcnemar_p"] = mcnemar(result["gained"], result["lost"])
    if aggregation == "exp_mean":
        result["ratio"] = _exponential(*weighted_mean(a - b, w), "ratio", "paired over windows", n)[0]
    return result


def _check_comparable(variant: Score, other: Score) -> None:
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


def _binary(values: Array) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())

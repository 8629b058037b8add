"""The paired bootstrap: what the difference of two scores could have been with other questions.

Items are resampled as pairs (Efron 1979; Miller 2024, arXiv 2411.00640), and where items share a document, whole
documents are: questions about one text fail together, so a thousand questions about twenty texts are nearer to twenty
observations than to a thousand. A cluster enters as the sum of its items, so both cases are one.

The percentiles are those of Hesterberg's expanded interval (2014, arXiv 1411.5279, section 4.3): of Phi(-sqrt(n/(n-1))
t_{0.975, n-1}) instead of 2.5%, because a percentile interval of few units is too narrow by sqrt((n-1)/n) and by z
against t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from llmops.evaluate.paired_tests import normal_tail

__all__ = ["AGGREGATIONS", "RESAMPLES", "cluster_sums", "expanded_tail", "paired_bootstrap"]

Array = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 10_000
DRAWS = 4_000_000  # item draws held in memory at a time
MAX_DRAWS = 200_000_000  # above this, fewer resamples
FEW_KINDS = 16

# How the items of a score make its value: a transform of their weighted mean.
AGGREGATIONS: dict[str, Callable[[Array], Array]] = {
    "mean": lambda mean: mean,
    "exp_mean": np.exp,  # perplexity: items are mean losses in nats
}


def expanded_tail(units: int) -> float:
    """The tail that each end of a 95% percentile interval over so many resampled units leaves out, at most 0.025."""
    from scipy.special import stdtrit

    if units < 2:
        return 0.0
    return normal_tail(math.sqrt(units / (units - 1)) * float(stdtrit(units - 1, 0.975)))


def cluster_sums(rows: Array, clusters: Sequence[Hashable]) -> Array:
    """(k, n) per-item rows summed within clusters: (k, number of clusters), in the order of first appearance."""
    numbers: dict[Hashable, int] = {}
    places = np.array([numbers.setdefault(each, len(numbers)) for each in clusters])
    return np.stack([np.bincount(places, weights=row, minlength=len(numbers)) for row in rows])


def paired_bootstrap(a: Sequence[float] | Array, b: Sequence[float] | Array, seed: int, *,
                     weights: Sequence[float] | Array | None = None, aggregation: str = "mean",
                     resamples: int = RESAMPLES, clusters: Sequence[Hashable] | None = None) -> Interval:
    """95% percentile interval of value(a) - value(b).

    a, b: (n,) scores of the same items. clusters: what each item is resampled with, n of them; default: each item
    alone. When the units take few values, as right/wrong does, the counts of each value are drawn from the
    multinomial: the same distribution as drawing units, at a hundredth of the cost.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    rows: Array = np.stack([w, w * x, w * y])
    if clusters is not None:
        rows = cluster_sums(rows, clusters)
    n = rows.shape[1]
    rng = np.random.default_rng(seed)
    resamples = max(100, min(resamples, MAX_DRAWS // n))
    kinds, counts = np.unique(rows, axis=1, return_counts=True)
    if kinds.shape[1] <= FEW_KINDS:
        sums = (rng.multinomial(n, counts / n, size=resamples) @ kinds.T).T
    else:
        step = max(1, DRAWS // n)
        parts = [rows[:, rng.integers(0, n, size=(min(step, resamples - start), n))].sum(-1)
                 for start in range(0, resamples, step)]
        sums = np.concatenate(parts, axis=1)  # (3, resamples)
    value, tail = AGGREGATIONS[aggregation], expanded_tail(n)
    low, high = np.quantile(value(sums[1] / sums[0]) - value(sums[2] / sums[0]), [tail, 1 - tail])
    return float(low), float(high)

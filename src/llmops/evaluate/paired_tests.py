"""Exact and score tests of paired right/wrong answers, and Holm's correction over several comparisons.

Two variants of one model answer the same n questions. gained: wrong before, right now; lost: the reverse. All that
tells them apart is in these two counts, so every test here is closed or nearly so:

    mcnemar        exact two-sided p that neither is better: gained ~ Binomial(gained + lost, 1/2)
    sign_flip      the same where items share a document: the signs of documents' sums are flipped, not those of items
    tango          the score statistic of Tango (1998) for a difference of delta, and the interval it inverts to
    holm           step-down adjusted p values (Holm 1979): the chance of one false claim stays at the level

Tango's interval keeps its level where flips are few, where a bootstrap does not: without a single flip a bootstrap
says that nothing can ever flip. Exact for independent items; for documents the number of documents stands for n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["holm", "mcnemar", "normal_tail", "sign_flip", "tango", "tango_interval"]

Interval = tuple[float, float]
Z = 1.959963984540054  # 97.5% quantile of the normal distribution
EXACT = 4_000_000  # cells of the exact distribution of a sign-flip sum; above this, the normal one


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: gained ~ Binomial(gained + lost, 1/2) when neither variant is better.

    gained: wrong before and right now; lost: the reverse. 1.0 when nothing flipped.
    """
    from scipy.special import bdtr

    flips = gained + lost
    return min(1.0, 2.0 * float(bdtr(min(gained, lost), flips, 0.5))) if flips else 1.0


def sign_flip(sums: Sequence[int]) -> float:
    """Exact two-sided p of a sign-flip test: P(|sum(+-s_g)| >= |sum(s_g)|) with a fair coin for each cluster's sign.

    sums: gained minus lost of each cluster (a document's questions). Under "neither is better" a cluster's sum is as
    likely as its negative, whatever its items share. The distribution is a convolution over clusters; with one flip a
    cluster it is McNemar's. Many and large sums are taken as normal. 1.0 when nothing is left after cancelling.
    """
    sizes = [abs(int(each)) for each in sums if each]
    total, observed = sum(sizes), abs(sum(int(each) for each in sums))
    if not sizes:
        return 1.0
    if len(sizes) * total > EXACT:
        return min(1.0, 2 * normal_tail(observed / math.sqrt(sum(size * size for size in sizes))))
    chances = np.zeros(2 * total + 1)  # of each sum, -total .. total
    chances[total] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # never wraps: within +-total
    place = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(chances[place >= observed].sum()))


def normal_tail(z: float) -> float:
    """P(Z > z) of a standard normal."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def tango(gained: int, lost: int, n: int, delta: float) -> float:
    """z of Tango's score test that the true difference (share gained - share lost) is `delta`.

    Tango 1998, Statistics in Medicine 17, equations 8 to 10: z = (b - c - n delta) / sqrt(n (2 q + delta (1 - delta)))
    with b = gained, c = lost, q the share lost by maximum likelihood under `delta`: the root of 2n q^2 + B q + C.
    0.0 where the difference is exactly `delta` and nothing varies. Raises ValueError unless 0 < gained + lost <= n or
    n > 0, and |delta| < 1.
    """
    if n <= 0 or min(gained, lost) < 0 or gained + lost > n or not -1 < delta < 1:
        raise ValueError(f"{gained} gained, {lost} lost of {n}, delta {delta}: expected gained + lost <= n > 0 and "
                         "-1 < delta < 1")
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
    spread = n * (2 * q + delta * (1 - delta))
    above = gained - lost - n * delta
    return above / math.sqrt(spread) if spread > 0 else 0.0 if above == 0 else math.copysign(math.inf, above)


def tango_interval(gained: int, lost: int, n: int) -> Interval:
    """95% interval of share gained - share lost: the delta that Tango's test does not reject, by bisection."""
    middle = (gained - lost) / n

    def edge(inside: float, outside: float) -> float:
        for _ in range(60):
            half = (inside + outside) / 2
            inside, outside = (half, outside) if abs(tango(gained, lost, n, half)) <= Z else (inside, half)
        return inside

    near = 1 - 1e-12
    inside = min(max(middle, -near), near)
    return min(edge(inside, -near), middle), max(edge(inside, near), middle)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p values in the order given: max over the smaller ones of (m - rank) p, at most 1 (Holm 1979)."""
    order = sorted(p, key=lambda name: p[name])
    found, worst = dict[str, float](), 0.0
    for rank, name in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p[name]))
        found[name] = worst
    return {name: found[name] for name in p}

"""Intervals of few repeated blocks: a median with its interval, and a paired ratio on the log.

Blocks of one benchmark are few (5 to 10) and now and then one is hit by something else, so the middle is a median. Its
interval is t times the standard error of a median under a normal law, sqrt(pi/2) x s / sqrt(n), on logarithms where
all values are positive (times, speeds and energies are skewed, and can't be negative).

A ratio of variant to base is the mean of ln(v_i / b_i) over pairs of neighbouring blocks, with its t interval, raised
again. Pairing takes out what drifts (heat, other load), which moves both blocks of a pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median, stdev

__all__ = ["LEAST_PAIRS", "log_ratio", "mean_interval", "median_interval", "t_quantile"]

LEAST_PAIRS = 5  # of blocks, before a difference is said to be shown
MEDIAN_FACTOR = math.sqrt(math.pi / 2)


def t_quantile(degrees: float) -> float:
    """The 97.5 % quantile of Student's t, for two-sided intervals of 95 %."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def median_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Median and its 95 % interval; no interval for a single value. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    if len(values) < 2:
        return values[0], None
    logs = all(value > 0 for value in values)
    scaled = [math.log(value) for value in values] if logs else list(values)
    middle = median(scaled)
    half = t_quantile(len(values) - 1) * MEDIAN_FACTOR * stdev(scaled) / math.sqrt(len(values))
    if logs:
        return math.exp(middle), (math.exp(middle - half), math.exp(middle + half))
    return middle, (middle - half, middle + half)


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % t interval; no interval for a single value. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    middle = fmean(values)
    if len(values) < 2:
        return middle, None
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return middle, (middle - half, middle + half)


def log_ratio(variant: Sequence[float], base: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """exp(mean ln(v_i / b_i)) and its 95 % t interval. Pairs in the same order, at least two, all positive."""
    logs = [math.log(v / b) for v, b in zip(variant, base, strict=True)]
    if len(logs) < 2:
        raise ValueError("a ratio with an interval needs at least two pairs")
    middle = fmean(logs)
    half = t_quantile(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), (math.exp(middle - half), math.exp(middle + half))

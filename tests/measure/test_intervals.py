from __future__ import annotations

import math
import random

import pytest

from llmops.measure.intervals import log_ratio, median_interval, t_quantile


def test_the_log_ratio_is_the_paired_t_interval_of_the_books():
    from scipy import stats

    variant, base = [5.1, 4.8, 5.5, 5.0, 4.9], [10.0, 10.4, 9.9, 10.1, 10.6]
    value, (low, high) = log_ratio(variant, base)
    logs = [math.log(v / b) for v, b in zip(variant, base, strict=True)]
    brute = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert value == pytest.approx(math.exp(sum(logs) / 5))
    assert (low, high) == pytest.approx((math.exp(brute.low), math.exp(brute.high)))


def test_pairing_takes_out_what_drifts():
    draw = random.Random(3)
    drift = [10 ** draw.uniform(0, 2) for _ in range(6)]
    base = [d * math.exp(draw.gauss(0, 0.01)) for d in drift]
    variant = [0.8 * d * math.exp(draw.gauss(0, 0.01)) for d in drift]
    value, (low, high) = log_ratio(variant, base)
    assert value == pytest.approx(0.8, rel=0.02) and high - low < 0.05


def test_intervals_cover_the_truth_about_95_times_in_100():
    draw = random.Random(0)
    inside = {"ratio": 0, "median": 0}
    runs = 1000
    for _ in range(runs):
        base = [math.exp(draw.gauss(0, 0.1)) for _ in range(5)]
        variant = [0.9 * math.exp(draw.gauss(0, 0.1)) for _ in range(5)]
        _, (low, high) = log_ratio(variant, base)
        inside["ratio"] += low <= 0.9 <= high
        _, interval = median_interval(base)
        assert interval is not None
        inside["median"] += interval[0] <= 1.0 <= interval[1]
    assert 0.93 < inside["ratio"] / runs < 0.97
    assert 0.92 < inside["median"] / runs < 0.98


def test_one_value_has_no_interval_and_none_is_an_error():
    assert median_interval([4.0]) == (4.0, None)
    with pytest.raises(ValueError):
        median_interval([])
    with pytest.raises(ValueError):
        log_ratio([1.0], [2.0])
    with pytest.raises(ValueError):
        log_ratio([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_median_lies_in_its_interval_and_negative_values_stay_linear():
    value, interval = median_interval([3.0, 1.0, 2.0, 40.0, 2.5])
    assert interval is not None and value == pytest.approx(2.5) and 0 < interval[0] < value < interval[1]
    value, interval = median_interval([-1.0, 1.0, 3.0])
    assert interval is not None and value == 1.0 and interval[0] + interval[1] == pytest.approx(2.0)
    assert t_quantile(4) == pytest.approx(2.7764, abs=1e-4)

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from llmops.evaluate.noninferiority import noninferiority_p
from llmops.evaluate.paired_tests import holm, mcnemar, sign_flip, tango, tango_interval
from llmops.evaluate.power import ASSUMED, needed, smallest_margin


def by_likelihood(gained, lost, n, delta):
    """Tango's statistic with the share lost found by a search over the likelihood under `delta`."""
    def minus(q):
        p = q + delta
        return -(gained * math.log(max(p, 1e-300)) + lost * math.log(max(q, 1e-300))
                 + (n - gained - lost) * math.log(max(1 - p - q, 1e-300)))

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = optimize.minimize_scalar(minus, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize("gained, lost, n", [(3, 9, 100), (0, 4, 60), (12, 2, 300), (1, 1, 40)])
@pytest.mark.parametrize("delta", [-0.1, -0.02, 0.03])
def test_tango_equals_a_search_over_the_likelihood(gained, lost, n, delta):
    assert tango(gained, lost, n, delta) == pytest.approx(by_likelihood(gained, lost, n, delta), rel=1e-4)


@pytest.mark.parametrize("gained, lost, n", [(3, 9, 100), (0, 0, 24), (0, 7, 60), (25, 0, 25), (0, 25, 25)])
def test_the_interval_is_what_the_test_does_not_reject(gained, lost, n):
    low, high = tango_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    for end, step in ((low, -1e-6), (high, 1e-6)):
        if -1 < end + step < 1:
            assert abs(tango(gained, lost, n, end)) <= 1.96 <= abs(tango(gained, lost, n, end + step)) + 1e-3
    assert tango_interval(lost, gained, n) == pytest.approx((-high, -low), abs=1e-9)


def test_without_a_flip_the_interval_is_not_nothing():
    low, high = tango_interval(0, 0, 100)
    assert high == pytest.approx(1.96 ** 2 / (100 + 1.96 ** 2), abs=1e-4) and low == -high


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="3 gained, 3 lost of 5"):
        tango(3, 3, 5, 0.0)


@pytest.mark.parametrize("sums", [(1, 1, -1), (3, -1, 2, 1), (2, 2, 2, -2, 1, 0), (5,), ()])
def test_sign_flips_equal_all_of_them(sums):
    flips = list(itertools.product((-1, 1), repeat=len(sums)))
    held = sum(abs(sum(s * f for s, f in zip(sums, signs, strict=True))) >= abs(sum(sums)) for signs in flips)
    assert sign_flip(sums) == pytest.approx(held / len(flips))


@pytest.mark.parametrize("gained, lost", [(0, 1), (5, 0), (3, 9), (40, 22)])
def test_sign_flips_of_single_items_are_mcnemars(gained, lost):
    assert sign_flip([1] * gained + [-1] * lost) == pytest.approx(mcnemar(gained, lost), rel=1e-9)


def test_many_flips_are_taken_as_normal(monkeypatch):
    sums = list(np.random.default_rng(0).integers(-3, 4, 200))
    exact = sign_flip(sums)
    monkeypatch.setattr("llmops.evaluate.paired_tests.EXACT", 1)
    assert sign_flip(sums) == pytest.approx(exact, abs=0.02)


def test_holm_is_the_step_down_of_bonferroni():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(holm(p)) == list(p) and holm({}) == {} and holm({"x": 0.7}) == {"x": 0.7}


def body(gained, lost, n, stderr=None, clusters=None):
    return {"delta": {"value": (gained - lost) / n}, "n": n, "delta_stderr": stderr, "clusters": clusters,
            "score_test": None if clusters else {"gained": gained, "lost": lost, "n": n, "scale": 1.0}}


def test_non_inferiority_is_the_end_of_the_interval():
    for gained, lost, n in ((3, 9, 400), (0, 2, 300), (10, 40, 1000)):
        worst = -tango_interval(gained, lost, n)[0]
        assert noninferiority_p(body(gained, lost, n), worst * 1.001, True) < 0.025
        assert noninferiority_p(body(gained, lost, n), worst * 0.999, True) > 0.025


def test_a_score_without_counts_is_judged_by_t():
    p = noninferiority_p(body(2, 10, 400, stderr=0.01, clusters=30), 0.05, True)
    assert p == pytest.approx(stats.t.cdf(-(0.05 - 0.02) / 0.01, 29))
    falling = {"delta": {"value": 0.3}, "n": 50, "delta_stderr": 0.1}
    assert noninferiority_p(falling, 0.5, False) == pytest.approx(stats.t.cdf(-2, 49))
    assert noninferiority_p({"delta": {"value": 0.0}, "n": 1, "delta_stderr": None}, 0.5, False) is None


def test_as_many_items_as_said_have_the_power_said():
    """2,000 truly equal variants at the n that `needed` gives: four in five are shown non-inferior (4 sigma: 3.6)."""
    margin = 0.04
    n = needed(margin, math.sqrt(ASSUMED), share=True)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, [ASSUMED / 2, ASSUMED / 2, 1 - ASSUMED], size=2000)
    shown = sum(noninferiority_p(body(int(g), int(lost), n), margin, True) < 0.025 for g, lost, _ in counts)
    assert shown / 2000 == pytest.approx(0.8, abs=0.036)
    assert smallest_margin(n, math.sqrt(ASSUMED), share=True) == pytest.approx(margin, rel=0.01)
    assert smallest_margin(needed(0.5, 2.0), 2.0) == pytest.approx(0.5, rel=0.01)
    assert needed(0.02, 0.3, drop=0.02) is None and needed(0.02, 0.3, drop=0.01) > needed(0.02, 0.3)

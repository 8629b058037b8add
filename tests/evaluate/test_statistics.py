import math

import numpy as np
import pytest
from scipy import stats

from llmops.errors import LlmopsError
from llmops.evaluate.noninferiority import noninferiority_p
from llmops.evaluate.paired_tests import tango_interval
from llmops.evaluate.score import Item, Score
from llmops.evaluate.statistics import (
    compare,
    mcnemar,
    mean_interval,
    paired,
    paired_bootstrap,
    proportion_interval,
    standard_error,
    summarize,
    weighted_mean,
)


def score(values, *, answers=None, ids=None, aggregation="mean", weights=None, **protocol):
    answers = answers or ["" if aggregation == "exp_mean" else "x"] * len(values)
    items = [Item(ids[i] if ids else f"q{i}", value, answers[i], {"weight": weights[i]} if weights else {})
             for i, value in enumerate(values)]
    protocol = {"id": "test", "aggregation": aggregation, **protocol}
    unit = "perplexity" if aggregation == "exp_mean" else "fraction"
    value, stderr = summarize(items, aggregation, unit, "a test")
    metric, rising = ("perplexity", False) if aggregation == "exp_mean" else ("exact_match", True)
    return Score(f"{metric}:test", metric, rising, value, stderr, protocol, items)


@pytest.mark.parametrize("successes, n", [(0, 10), (10, 10), (1, 3), (137, 500), (499, 500)])
def test_wilson_equals_scipy(successes, n):
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert proportion_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_what_is_no_proportion():
    with pytest.raises(ValueError, match="3 successes of 2"):
        proportion_interval(3, 2)


def test_mean_interval_equals_scipy():
    values = np.random.default_rng(0).normal(3, 2, 25)
    expected = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)
    assert mean_interval([1.0]) is None


def test_standard_error_of_right_and_wrong():
    p = 7 / 20
    assert standard_error([1.0] * 7 + [0.0] * 13) == pytest.approx(math.sqrt(p * (1 - p) / 19), rel=1e-12)


def test_weighted_mean_equals_repeating_what_weighs_more():
    mean, stderr, _ = weighted_mean([1.0, 4.0, 2.0], [2.0, 1.0, 3.0])
    assert mean == pytest.approx((2 * 1 + 4 + 3 * 2) / 6)
    residuals = np.array([2 * (1 - mean), 4 - mean, 3 * (2 - mean)])
    assert stderr == pytest.approx(math.sqrt(3 / 2 * (residuals ** 2).sum()) / 6)


@pytest.mark.parametrize("gained, lost", [(0, 0), (0, 1), (5, 0), (3, 9), (12, 12), (40, 22), (0, 60)])
def test_mcnemar_equals_the_exact_binomial_test(gained, lost):
    expected = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)
    flips = gained + lost
    tail = sum(math.comb(flips, k) for k in range(min(gained, lost) + 1)) / 2 ** flips
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_summary_of_a_proportion_a_mean_and_a_perplexity():
    value, _ = summarize([Item(str(i), float(i < 3)) for i in range(10)], "mean", "fraction", "m")
    assert value.ci95 == pytest.approx(proportion_interval(3, 10)) and value.n == 10
    value, _ = summarize([Item(str(i), s) for i, s in enumerate([0.2, 0.5, 0.9])], "mean", "score", "m")
    assert value.ci95 == pytest.approx(mean_interval([0.2, 0.5, 0.9]))
    losses = [2.0, 2.5, 3.0]
    value, stderr = summarize([Item(str(i), s) for i, s in enumerate(losses)], "exp_mean", "perplexity", "m")
    low, high = mean_interval(losses)
    assert value.value == pytest.approx(math.exp(2.5)) and value.ci95 == pytest.approx((math.exp(low), math.exp(high)))
    assert stderr == pytest.approx(math.exp(2.5) * standard_error(losses))


@pytest.mark.parametrize("losses, reason", [([2.0, None, 3.0], "not finite in 1 of 3"), ([2.0, 900.0], "900")])
def test_a_ruined_model_has_no_perplexity(losses, reason):
    value, stderr = summarize([Item(str(i), s) for i, s in enumerate(losses)], "exp_mean", "perplexity", "m")
    assert value.value is None and value.provenance == "null" and reason in value.method and stderr is None


def test_flips_are_counted_both_ways():
    a = score([1, 1, 0, 1, 0, 0], answers=["a", "b", "x", "d", "y", "f"])
    b = score([1, 0, 1, 1, 0, 0], answers=["a", "z", "c", "d", "x", "f"])
    found = paired(a, b, 0)
    assert (found["gained"], found["lost"], found["changed_answers"], found["n"]) == (1, 1, 3, 6)
    assert found["delta"].value == 0 and found["mcnemar_p"] == 1.0
    assert found["delta"].ci95[0] < 0 < found["delta"].ci95[1]


def test_a_score_against_itself_shows_no_difference():
    a = score([1, 0, 1, 1, 0])
    found = paired(a, a, 0)
    assert found["delta"].value == 0 and found["delta"].ci95 == pytest.approx((-0.4344825, 0.4344825))  # of five items
    assert (found["gained"], found["lost"], found["changed_answers"]) == (0, 0, 0)


@pytest.mark.parametrize("missed", [0, 3])
def test_where_nearly_all_flip_the_interval_does_not_collapse(missed):
    """0 of 89 right before, 89 - missed after: a bootstrap would give [1, 1], as if nothing else could ever happen."""
    a, b = score([1.0] * (89 - missed) + [0.0] * missed), score([0.0] * 89)
    gained, lost = paired(a, b, 0), paired(b, a, 0)
    low, high = gained["delta"].ci95
    assert (low, high) == tango_interval(89 - missed, 0, 89) and "did not flip" in gained["delta"].method
    assert low < 0.97 and high >= (89 - missed) / 89
    assert lost["delta"].ci95 == pytest.approx((-high, -low))
    grouped = compare(np.ones(89), np.zeros(89), np.ones(89), 0, unit="fraction", aggregation="mean", rising=True,
                      clusters=[f"d{place // 2}" for place in range(89)])
    assert grouped["delta"].ci95[0] < 0.93 and grouped["delta"].ci95[1] == pytest.approx(1.0)
    assert noninferiority_p({**grouped, "delta": grouped["delta"].as_dict()}, 0.02, True) < 1e-6


def test_where_nearly_all_flip_the_interval_covers():
    """Of every possible outcome of 60 items that flip with 0.97: the bootstrap held the truth in 84 % of its weight."""
    weights = stats.binom.pmf(range(61), 60, 0.97)
    held = sum(weight for count, weight in enumerate(weights) if weight > 1e-9 and _holds(count, 60, 0.97))
    assert 0.93 <= held <= 0.985


def _holds(gained, n, truth):
    a = np.arange(n) < gained
    found = compare(a.astype(float), np.zeros(n), np.ones(n), 0, unit="fraction", aggregation="mean", rising=True,
                    clusters=None)
    return found["delta"].ci95[0] <= truth <= found["delta"].ci95[1]


def test_pairing_is_narrower_than_two_separate_intervals():
    rng = np.random.default_rng(1)
    b = (rng.random(400) < 0.7).astype(float)
    a = np.where(rng.random(400) < 0.03, 1 - b, b)
    low, high = paired(score(list(a)), score(list(b)), 0)["delta"].ci95
    unpaired = 2 * 1.96 * math.hypot(standard_error(a), standard_error(b))
    assert high - low < unpaired / 2


def test_both_ways_of_resampling_agree():
    rng = np.random.default_rng(2)
    a, b = (rng.random(300) < 0.8).astype(float), (rng.random(300) < 0.7).astype(float)
    few = paired_bootstrap(a, b, 0)
    nudged = a + rng.normal(0, 1e-9, 300)  # as many kinds as items: items are drawn one by one
    assert paired_bootstrap(nudged, b, 0) == pytest.approx(few, abs=0.01)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    rng = np.random.default_rng(3)
    a, b = rng.random(50), rng.random(50)
    assert paired_bootstrap(a, b, 7) == paired_bootstrap(a, b, 7) != paired_bootstrap(a, b, 8)


def test_the_bootstrap_covers_the_true_difference():
    """400 simulated pairs of known difference: 95 % intervals hold it in 91 to 98 % of them (3 sigma: 3.3 points)."""
    rng = np.random.default_rng(4)
    runs, n, gains, losses = 400, 300, 0.05, 0.10
    held = 0
    for run in range(runs):
        u = rng.random(n)
        base = np.where(u < gains, 0.0, np.where(u < gains + losses, 1.0, (rng.random(n) < 0.6).astype(float)))
        variant = np.where(u < gains, 1.0, np.where(u < gains + losses, 0.0, base))
        low, high = paired_bootstrap(variant, base, run, resamples=1000)
        held += low <= gains - losses <= high
    assert 0.91 <= held / runs <= 0.98


def test_perplexity_is_paired_over_windows_on_the_log():
    rng = np.random.default_rng(5)
    b = rng.normal(3.0, 0.5, 40)  # windows differ much, variants little
    a = b + rng.normal(0.02, 0.01, 40)
    weights = list(rng.integers(50, 100, 40).astype(float))
    found = paired(score(list(a), aggregation="exp_mean", weights=weights),
                   score(list(b), aggregation="exp_mean", weights=weights), 0)
    mean, stderr, _ = weighted_mean(a - b, weights)
    t = stats.t.ppf(0.975, 39)
    assert found["ratio"].value == pytest.approx(math.exp(mean))
    assert found["ratio"].ci95 == pytest.approx((math.exp(mean - t * stderr), math.exp(mean + t * stderr)))
    w = np.array(weights)
    expected = math.exp((w * a).sum() / w.sum()) - math.exp((w * b).sum() / w.sum())
    assert found["delta"].value == pytest.approx(expected)
    assert 0 < found["delta"].ci95[0] < expected < found["delta"].ci95[1]
    assert found["gained"] == (a < b).sum() and found["lost"] == (a > b).sum()
    assert found["mcnemar_p"] is None and found["changed_answers"] is None


@pytest.mark.parametrize("other, message", [
    (score([1, 0], ids=["q0", "other"]), "not of the same prompts.*1 in common"),
    (score([1, 0, 1]), "2 and 3 items"),
    (score([1, 0], ids=["q1", "q0"]), "same order"),
    (score([1, 0], max_new_tokens=8), "max_new_tokens is None .* and 8"),
    (score([1, 0], aggregation="exp_mean"), "exact_match .* perplexity"),
])
def test_scores_of_different_questions_are_refused(other, message):
    with pytest.raises(LlmopsError, match=message):
        paired(score([1, 0]), other, 0)


def test_dtype_may_differ():
    assert paired(score([1, 0], dtype="bfloat16"), score([1, 1], dtype="float32"), 0)["lost"] == 1


@pytest.mark.parametrize("variant, reason", [
    (score([2.0, None], aggregation="exp_mean"), "not finite"),
])
def test_a_delta_to_a_null_score_is_null(variant, reason):
    found = paired(variant, score([2.0, 2.0], aggregation="exp_mean"), 0)
    assert found["delta"].value is None and reason in found["delta"].method and found["n"] == 2


def test_corpus_metrics_are_not_resampled():
    a = score([0.5, 0.2], answers=["a", "b"])
    b = Score.from_dict(a.as_dict() | {"protocol": {"id": "test", "aggregation": "lm-eval bleu"}}, a.items)
    found = paired(b, b, 0)
    assert found["delta"].value is None and "lm-eval bleu" in found["delta"].method
    assert found["changed_answers"] == 0

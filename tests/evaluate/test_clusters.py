import numpy as np
import pytest
from scipy import stats

from llmops.evaluate.bootstrap import cluster_sums, expanded_tail, paired_bootstrap
from llmops.evaluate.score import Item, Score
from llmops.evaluate.statistics import paired, summarize, weighted_mean


def clustered(rng, documents, size, delta, spread):
    """(variant, base, cluster names) of right/wrong items whose documents differ in how the variant does."""
    base, variant, names = [], [], []
    for document in range(documents):
        shift = np.clip(delta + rng.normal(0, spread), -0.5, 0.5)
        for _ in range(size):
            right = rng.random() < 0.5
            base.append(float(right))
            flips = rng.random() < abs(shift) * 2
            variant.append(float(right if not flips else shift > 0 if right != (shift > 0) else right))
            names.append(f"d{document}")
    return np.array(variant), np.array(base), names


def test_clusters_of_one_are_no_clusters():
    rng = np.random.default_rng(0)
    a, b = rng.random(80), rng.random(80)
    alone = [str(i) for i in range(80)]
    assert paired_bootstrap(a, b, 3, clusters=alone) == paired_bootstrap(a, b, 3)
    assert weighted_mean(a, clusters=alone) == weighted_mean(a)


def test_saying_everything_twice_tells_nothing_new():
    rng = np.random.default_rng(1)
    a, b = (rng.random(60) < 0.7).astype(float), (rng.random(60) < 0.5).astype(float)
    names = [str(i) for i in range(60)]
    twice = paired_bootstrap(np.tile(a, 2), np.tile(b, 2), 0, clusters=names * 2)
    assert twice == paired_bootstrap(a, b, 0)
    assert weighted_mean(np.tile(a, 2), clusters=names * 2)[1] == pytest.approx(weighted_mean(a)[1])
    value, stderr = summarize([Item(f"{i}", float(x), detail={"cluster": name}) for i, (x, name) in
                               enumerate(zip(np.tile(a, 2), names * 2, strict=True))], "mean", "fraction", "m")
    single, _ = summarize([Item(f"{i}", float(x)) for i, x in enumerate(a)], "mean", "fraction", "m")
    assert value.ci95 == pytest.approx(single.ci95, abs=0.003) and "60 clusters" in value.method


def test_the_standard_error_is_the_cluster_robust_one():
    rng = np.random.default_rng(2)
    a, names = rng.random(30), [f"d{i % 7}" for i in range(30)]
    residual = a - a.mean()
    total = sum(residual[[k for k in range(30) if names[k] == name]].sum() ** 2 for name in set(names))
    assert weighted_mean(a, clusters=names)[1] == pytest.approx(np.sqrt(7 / 6 * total) / 30)
    assert cluster_sums(a[None], names).shape == (1, 7)


def test_the_clustered_bootstrap_equals_drawing_documents_one_by_one():
    rng = np.random.default_rng(3)
    a, b, names = clustered(rng, 25, 8, -0.1, 0.15)
    documents = [np.array([k for k, name in enumerate(names) if name == each]) for each in dict.fromkeys(names)]
    drawn = []
    for _ in range(4000):
        picked = np.concatenate([documents[i] for i in rng.integers(0, 25, 25)])
        drawn.append(a[picked].mean() - b[picked].mean())
    tail = expanded_tail(25)
    assert paired_bootstrap(a, b, 0, clusters=names) == pytest.approx(np.quantile(drawn, [tail, 1 - tail]), abs=0.012)


def test_the_tail_is_hesterbergs_and_goes_to_a_fortieth():
    assert expanded_tail(10) == pytest.approx(stats.norm.cdf(-np.sqrt(10 / 9) * stats.t.ppf(0.975, 9)))
    assert expanded_tail(100_000) == pytest.approx(0.025, abs=1e-4) and expanded_tail(1) == 0


def test_documents_widen_what_is_paired_and_say_so():
    rng = np.random.default_rng(4)
    a, b, names = clustered(rng, 40, 15, -0.1, 0.3)

    def score(values, with_clusters):
        items = [Item(f"q{k}", float(x), "x", {"cluster": names[k]} if with_clusters else {})
                 for k, x in enumerate(values)]
        value, stderr = summarize(items, "mean", "fraction", "m")
        return Score("exact_match:test", "exact_match", True, value, stderr, {"aggregation": "mean"}, items)

    plain, grouped = (paired(score(a, on), score(b, on), 0) for on in (False, True))
    wide, narrow = (found["delta"].ci95[1] - found["delta"].ci95[0] for found in (grouped, plain))
    assert wide > 1.3 * narrow and grouped["delta_stderr"] > 1.3 * plain["delta_stderr"]
    assert grouped["clusters"] == 40 and plain["clusters"] is None
    assert grouped["p"] > plain["p"] and grouped["p_of"] == "exact sign flips of clusters"
    assert grouped["delta"].value == plain["delta"].value


def test_few_flips_of_documents_get_a_score_interval_in_items():
    a, b = np.ones(120), np.ones(120)
    a[[0, 1, 50]] = 0  # two questions of one document, one of another
    names = [f"d{k // 6}" for k in range(120)]
    items = [[Item(f"q{k}", float(x), "x", {"cluster": names[k]}) for k, x in enumerate(side)] for side in (a, b)]
    scores = [Score("m:t", "m", True, *summarize(each, "mean", "fraction", "m"), {"aggregation": "mean"}, each)
              for each in items]
    found = paired(*scores, 0)
    assert "Tango" in found["delta"].method and "20 clusters" in found["delta"].method
    assert found["delta"].ci95[0] < -3 / 120 < found["delta"].ci95[1] and found["delta"].ci95[0] > -0.12
    assert found["score_test"] == {"gained": 0, "lost": 2, "n": 20, "scale": 1.5 * 20 / 120}

import numpy as np
import pytest

from llmops.errors import DataError
from llmops.evaluate.score import Item, Score
from llmops.evaluate.slices import LEAST, labels, sliced, sliced_pair
from llmops.evaluate.statistics import paired, summarize


def score(values, topics, clusters=None):
    items = [Item(f"q{k}", float(x), "x", {"groups": {"topic": topics[k]},
                                           **({"cluster": clusters[k]} if clusters else {})})
             for k, x in enumerate(values)]
    value, stderr = summarize(items, "mean", "fraction", "m")
    return Score("exact_match:test", "exact_match", True, value, stderr, {"aggregation": "mean"}, items)


@pytest.fixture
def sides():
    rng = np.random.default_rng(0)
    topics = ["river"] * 80 + ["town"] * 80 + ["rare"] * 4
    base = (rng.random(164) < 0.9).astype(float)
    variant = base.copy()
    variant[rng.permutation(80)[:24]] = 0  # of the rivers
    return score(variant, topics), score(base, topics)


def test_a_group_is_compared_as_if_it_were_alone(sides):
    found = sliced_pair(*sides, 0)["topic"]
    for group in ("river", "town", "rare"):
        parts = [Score("s", "exact_match", True, *summarize(
            picked := [item for item in side.items if item.groups["topic"] == group], "mean", "fraction", "m"),
            {"aggregation": "mean"}, picked) for side in sides]
        alone, body = paired(*parts, 0), found["groups"][group]
        assert body["delta"].value == pytest.approx(alone["delta"].value)
        assert body["delta"].ci95 == pytest.approx(alone["delta"].ci95)
        assert (body["gained"], body["lost"], body["n"], body["p"]) == (alone["gained"], alone["lost"], alone["n"],
                                                                        alone["p"])
    own = sliced(sides[0])["topic"]["river"]
    assert own["value"]["value"] == pytest.approx(np.mean([i.score for i in sides[0].items[:80]]))


def test_the_worst_group_is_named_and_one_too_small_is_not(sides):
    found = sliced_pair(*sides, 0)["topic"]
    assert found["worst"] == "river"
    assert found["groups"]["rare"]["n"] < LEAST
    variant, base = sides
    broken = score([0.0 if i.groups["topic"] == "rare" else i.score for i in base.items],
                   [i.groups["topic"] for i in base.items])
    assert sliced_pair(broken, base, 0)["topic"]["worst"] != "rare"
    assert found["groups"]["river"]["p_holm"] == pytest.approx(3 * found["groups"]["river"]["p"])


def test_excess_is_the_drop_of_the_group_less_that_of_the_rest(sides):
    variant, base = sides
    drop = np.array([b.score - a.score for a, b in zip(variant.items, base.items, strict=True)])
    excess = sliced_pair(variant, base, 0)["topic"]["groups"]["river"]["excess"]
    assert excess.value == pytest.approx(drop[:80].mean() - drop[80:].mean())
    rng = np.random.default_rng(1)
    drawn = [drop[:80][rng.integers(0, 80, 80)].mean() - drop[80:][rng.integers(0, 84, 84)].mean()
             for _ in range(4000)]
    assert excess.ci95 == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_a_document_in_two_groups_is_one_document(sides):
    variant, base = sides
    topics = [i.groups["topic"] for i in base.items]
    names = [f"d{k % 80}" for k in range(160)] + ["x"] * 4  # every document has a river and a town
    together = [score([i.score for i in side.items], topics, names) for side in sides]
    apart = sliced_pair(variant, base, 0)["topic"]["groups"]["river"]["excess"]
    joined = sliced_pair(*together, 0)["topic"]["groups"]["river"]["excess"]
    assert joined.value == pytest.approx(apart.value) and joined.ci95 != apart.ci95


ROWS = [{"q": "a", "topic": "x", "doc": 1}, {"q": "b", "topic": None, "doc": None}, {"q": "c", "doc": 1}]


def test_labels_are_text_and_missing_ones_are_named():
    assert labels(ROWS, ["topic"], "doc", "test") == [
        {"groups": {"topic": "x"}, "cluster": "1"}, {"groups": {"topic": "(none)"}, "cluster": "row 2"},
        {"groups": {"topic": "(none)"}, "cluster": "1"}]
    assert labels(ROWS, [], None, "test") == [{}, {}, {}]


@pytest.mark.parametrize("rows, slices, cluster, message", [
    (ROWS, ["topik"], None, r'slices names the column "topik", which no row has; found q, topic, doc; did you mean'),
    (ROWS, [], "document", r'cluster names the column "document", which no row has'),
    ([{"topic": ["a"]}], ["topic"], None, r'"topic", which holds lists'),
    ([{"topic": k} for k in range(60)], ["topic"], None, r'60 different values; expected at most 50'),
])
def test_columns_that_cannot_be_groups_are_refused(rows, slices, cluster, message):
    with pytest.raises(DataError, match=message):
        labels(rows, slices, cluster, "exact_match:test")


def test_scores_without_groups_have_no_slices():
    items = [Item("a", 2.0), Item("b", 3.0)]
    plain = Score("p:t", "perplexity", False, *summarize(items, "exp_mean", "perplexity", "m"),
                  {"aggregation": "exp_mean"}, items)
    assert sliced(plain) == {} and sliced_pair(plain, plain, 0) == {}

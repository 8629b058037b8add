"""Whose tokens a perplexity lost: documents within windows, their groups and clusters; the figure stays what it was."""

import json
import math

import numpy as np
import pytest
import torch
from tests.runs import recipe, workplace
from tests.twins import twin
from torch.nn.functional import cross_entropy

from llmops.data.render import text_stream
from llmops.data.sources import Rows
from llmops.data.stream import owned_stream
from llmops.errors import DataError
from llmops.evaluate.options import Perplexity
from llmops.evaluate.perplexity import evaluate, score_stream, windows
from llmops.evaluate.replay import questions
from llmops.evaluate.slices import sliced, sliced_pair
from llmops.evaluate.statistics import paired, weighted_mean
from llmops.explain import explain
from llmops.gate import gate
from llmops.recipe import parse_recipe
from llmops.runner import run

PLACES = ("river", "lake", "town")
TEXTS = [{"text": f"The {place} number {n} runs past {n * 37} clocks." * (1 + n % 3), "topic": place,
          "book": f"b{n % 4}"} for n in range(12) for place in PLACES]
ROWS = Rows("test", "text", TEXTS)
OPTIONS = {"data": "test", "context": 48}


@pytest.fixture(scope="module")
def pair():
    model, tokenizer = twin("llama", torch.float32)
    hurt, _ = twin("llama", torch.float32)
    with torch.no_grad():
        for parameter in hurt.parameters():
            parameter.mul_(1.1)
    return model, hurt, tokenizer


def scored(model, tokenizer, **options):
    return evaluate(model, tokenizer, ROWS, Perplexity(**{**OPTIONS, **options}), id="perplexity:test")[0]


@pytest.mark.parametrize("separator", ["blank_line", "eos"])
def test_every_token_has_the_row_that_it_is_from(separator, pair):
    tokenizer = pair[2]
    ids, owners = owned_stream(ROWS, tokenizer, separator)
    assert ids == text_stream(ROWS, tokenizer, separator) and owners == sorted(owners)
    for number, row in enumerate(TEXTS):
        own = tokenizer.decode([token for token, owner in zip(ids, owners, strict=True) if owner == number])
        assert own.removesuffix(tokenizer.eos_token).strip() == row["text"]
    chats = Rows("c", "messages", [{"messages": [{"role": "user", "content": name},
                                                 {"role": "assistant", "content": "yes"}]} for name in "abc"])
    ids, owners = owned_stream(chats, tokenizer)
    assert ids == text_stream(chats, tokenizer) and set(owners) == {0, 1, 2}


@pytest.mark.parametrize("stride", [None, 20])
def test_the_figure_is_that_of_the_windows_and_of_a_plain_loop(pair, stride):
    model, _, tokenizer = pair
    whole, apart = (scored(model, tokenizer, stride=stride, **more) for more in ({}, {"slices": ["topic"]}))
    ids = text_stream(ROWS, tokenizer)
    losses = []
    with torch.no_grad():
        for start, end, first in windows(len(ids), 48, stride):
            logits = model(torch.tensor([ids[start:end]])).logits[0].double()
            losses += cross_entropy(logits[first - start - 1:-1], torch.tensor(ids[first:end]),
                                    reduction="none").tolist()
    assert apart.value.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-6)
    assert apart.value.value == pytest.approx(whole.value.value, rel=1e-9)
    assert len(apart.items) > len(whole.items) == whole.protocol["windows"] == apart.protocol["windows"]
    assert sum(item.weight for item in apart.items) == len(losses) == apart.protocol["tokens"]


def test_a_group_is_the_mean_over_its_own_tokens(pair):
    model, _, tokenizer = pair
    score = scored(model, tokenizer, slices=["topic"])
    ids, owners = owned_stream(ROWS, tokenizer)
    own = {place: [] for place in PLACES}
    with torch.no_grad():
        for start, end, first in windows(len(ids), 48, None):
            losses = cross_entropy(model(torch.tensor([ids[start:end]])).logits[0, :-1].double(),
                                   torch.tensor(ids[first:end]), reduction="none")
            for place, loss in zip(range(first, end), losses.tolist(), strict=True):
                own[TEXTS[owners[place]]["topic"]].append(loss)
    found = sliced(score)["topic"]
    assert {place: found[place]["value"]["value"] for place in PLACES} == {
        place: pytest.approx(math.exp(np.mean(losses)), rel=1e-6) for place, losses in own.items()}


def test_parts_of_one_document_are_a_cluster_and_a_column_may_be_coarser(pair):
    model, hurt, tokenizer = pair
    by_row = scored(model, tokenizer, slices=["topic"])
    names = [item.cluster for item in by_row.items]
    assert len(set(names)) == len({item.detail["document"] for item in by_row.items}) < len(names)
    book, other = (scored(each, tokenizer, cluster="book") for each in (hurt, model))
    assert {item.cluster for item in book.items} == {"b0", "b1", "b2", "b3"} and "4 clusters" in book.value.method
    found = paired(book, other, 0)
    assert found["clusters"] == 4
    a, b = (np.array([item.score for item in each.items]) for each in (book, other))
    w = [item.weight for item in book.items]
    assert found["ratio"].ci95 == pytest.approx(np.exp(weighted_mean(a - b, w, [i.cluster for i in book.items])[2]))


def test_windows_of_one_document_are_a_cluster_without_being_asked(pair):
    model, _, tokenizer = pair
    long = Rows("test", "text", [{"text": " ".join(row["text"] for row in TEXTS[start::4])} for start in range(4)])
    score, = evaluate(model, tokenizer, long, Perplexity(**OPTIONS), id="p")
    assert len({item.cluster for item in score.items}) == 4 < len(score.items) and "4 clusters" in score.value.method
    alone = score_stream(model, tokenizer, text_stream(long, tokenizer), Perplexity(**OPTIONS), id="p")
    assert alone.value.value == score.value.value and alone.items[0].cluster is None
    one, = evaluate(model, tokenizer, Rows("test", "text", [{"text": " ".join(row["text"] for row in TEXTS)}]),
                    Perplexity(**OPTIONS), id="p")
    assert one.items[0].cluster is None and one.value.ci95 is not None  # a single document: its windows stand alone


def test_excess_of_a_perplexity_is_the_rise_of_the_group_less_that_of_the_rest(pair):
    model, hurt, tokenizer = pair
    variant, base = (scored(each, tokenizer, slices=["topic"]) for each in (hurt, model))
    body = sliced_pair(variant, base, 0)["topic"]
    ends = {}
    rng = np.random.default_rng(0)
    for place in PLACES:
        inside = np.array([item.groups["topic"] == place for item in base.items])
        sides = [np.array([item.score for item in each.items]) for each in (variant, base)]
        w = np.array([item.weight for item in base.items])

        def rise(at, sides=sides, w=w):
            return np.subtract(*(math.exp((w * each)[at].sum() / w[at].sum()) for each in sides))

        found = body["groups"][place]
        assert found["delta"].value == pytest.approx(rise(inside))
        assert found["excess"].value == pytest.approx(rise(inside) - rise(~inside))
        documents = [[k for k, item in enumerate(base.items) if item.detail["document"] == number + 1]
                     for number in range(len(TEXTS))]
        groups = [[each for number, each in enumerate(documents) if (TEXTS[number]["topic"] == place) == side and each]
                  for side in (True, False)]
        drawn = [rise(np.concatenate([groups[0][i] for i in rng.integers(0, len(groups[0]), len(groups[0]))]))
                 - rise(np.concatenate([groups[1][i] for i in rng.integers(0, len(groups[1]), len(groups[1]))]))
                 for _ in range(400)]
        width = np.diff(np.quantile(drawn, [0.025, 0.975]))[0]
        assert np.diff(found["excess"].ci95)[0] == pytest.approx(width, rel=0.35)
        ends[place] = found["delta"].value
    assert body["worst"] == max(ends, key=ends.get)


def test_items_are_known_again_by_their_hash_and_repeat(pair):
    model, _, tokenizer = pair
    for more in ({}, {"slices": ["topic"]}, {"stride": 20, "cluster": "book"}):
        options = Perplexity(**OPTIONS, **more)
        score, again = (evaluate(model, tokenizer, ROWS, options, id="p")[0] for _ in range(2))
        assert score == again
        known = questions("perplexity", model, tokenizer, ROWS, options)
        assert [item.id for item in score.items] == list(known)
        if more:
            asked = known[score.items[1].id]
            assert len(asked.answers[""]) == score.items[1].weight and asked.text.strip() in "\n\n".join(
                row["text"] for row in TEXTS)


def test_a_column_that_is_not_there_and_a_tokenizer_without_offsets(pair):
    model, _, tokenizer = pair
    with pytest.raises(DataError, match='slices names the column "topik".*did you mean "topic"'):
        scored(model, tokenizer, slices=["topik"])
    with pytest.raises(DataError, match="expected a fast one"):
        score_stream(model, tokenizer, text_stream(ROWS, tokenizer), Perplexity(**OPTIONS, slices=["topic"]), id="p")


def test_a_run_with_groups_of_a_perplexity_through_gate_and_explain(tmp_path):
    place = workplace(tmp_path)
    (place / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    body = recipe({"w2": {"quantize": {"method": "rtn", "scheme": "w2a16", "group_size": 32}}}, goals={
        "perplexity": {"max_gap": 1e6, "noninferior": 1e6}, "prefer": "weights_bytes"})
    body["data"]["stories"] = {"source": "stories.jsonl"}
    body["evaluate"] = [{"perplexity": {"data": "stories", "context": 48, "slices": ["topic"]}}]
    runs = tmp_path / "runs"
    result = run(parse_recipe(body, base_dir=place), runs=runs)
    row = {each["identity"]["variant"]: each for each in result.rows}["w2"]
    assert set(row["quality"]["perplexity:stories"]["slices"]["topic"]) == set(PLACES) and result.winner == "w2"
    assert row["quality"]["perplexity:stories"]["versus"]["parent"]["clusters"] == len(TEXTS)
    assert gate(str(runs), "r", ["w2"]).passed
    missed = gate(str(runs), "r", ["w2"], ["perplexity: {max_gap: 0, noninferior: 1e-9}"])
    assert not missed.passed and any("more than the rest" in case.detail for case in missed.cases)
    found = explain(str(runs), "r", "w2", items=3)["scores"]["perplexity:stories"]
    assert len(found["items"]) == 3 and all(item["tokens"] and item["groups"] for item in found["items"])
    assert "perplexity:stories by topic" in (runs / "r" / "report.html").read_text()

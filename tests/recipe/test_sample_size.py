"""Items that a margin needs: from what is assumed, from earlier rows, and against what the data hold."""

import json

import pytest
from tests.recipe import makers

from llmops.recipe import parse_recipe
from llmops.recipe.plan import make_plan
from llmops.recipe.sample_size import WARNING, count_rows
from llmops.recipe.show import render

GOALS = "goals: {exact_match: {noninferior: 0.05, against: tuned}}"


@pytest.fixture
def place(tmp_path):
    makers.folder(tmp_path)
    return tmp_path


def read(place, **sections):
    return parse_recipe(makers.text(**sections), base_dir=place)


def row(stderr, n=100, run="trial", against="tuned", score="exact_match:test"):
    return {"identity": {"run": run}, "quality": {score: {"versus": {"parent": {
        "variant": against, "delta_stderr": stderr, "n": n}}}}}


def test_too_few_items_are_a_warning_that_a_plan_prints(place):
    found = make_plan(read(place, name=f"name: trial\n{GOALS}"), place / "store")
    [line] = found.advice
    assert line.startswith(f"{WARNING}exact_match:test noninferior 0.05 against tuned: about 350 items are needed")
    assert "10% of answers assumed to flip" in line and "there are 4," in line
    assert line in render(found) and found.as_json()["advice"] == [line]


def test_items_enough_are_said_too(place):
    rows = [json.dumps({"prompt": f"q{k}", "completion": "a"}) for k in range(400)]
    (place / "test.jsonl").write_text("\n".join(rows))
    [line] = make_plan(read(place, name=f"name: trial\n{GOALS}"), place / "store").advice
    assert line.endswith("; there are 400")


def test_earlier_rows_tell_how_items_vary_those_of_the_run_first(place):
    recipe = read(place, name=f"name: trial\n{GOALS}")
    rows = [row(0.01), row(0.02, run="other"), row(0.03, against="base"), row(0.05, score="else:test"),
            {"identity": {}}]
    [line] = make_plan(recipe, place / "store", rows).advice
    assert "as items varied in 1 earlier comparisons" in line and "about 114 items" in line
    [line] = make_plan(recipe, place / "store", rows[1:]).advice
    assert "about 190 items" in line


def test_perplexity_is_not_guessed(place):
    sections = {"evaluate": "evaluate:\n  - perplexity: {data: test, context: 64}",
                "name": "name: trial\ngoals: {perplexity: {max_drop: 0.5}}"}
    [line] = make_plan(read(place, **sections), place / "store").advice
    assert "cannot be told before a first run" in line
    [line] = make_plan(read(place, **sections), place / "store", [row(0.1, 60, against="base",
                                                                      score="perplexity:test")]).advice
    assert "about 19 items" in line and "not known before the data are read" not in line


def test_without_margins_nothing_is_said(place):
    assert make_plan(read(place, name="name: trial\ngoals: {exact_match: {min: 0.5}}"), place / "store").advice == ()


@pytest.mark.parametrize("source, count", [
    ("{source: test.jsonl}", 4), ('{source: train.jsonl, split: "[:50%]"}', 3),
    ("{source: train.jsonl, samples: 2}", 2), ("{from: train, samples: 5}", 5), ("{source: table.csv}", 2),
    ("{source: builtin:facts, split: test}", 600), ('{source: builtin:choices, split: "validation[:10%]"}', 50),
    ("{source: builtin:world}", None), ("{source: owner/name}", None)])
def test_rows_are_counted_where_that_is_cheap(place, source, count):
    (place / "table.csv").write_text('prompt,completion\n"a\nb",c\nd,e\n')
    recipe = read(place, data=f"data:\n  train: {{source: train.jsonl}}\n  test: {{source: test.jsonl}}\n  x: {source}")
    assert count_rows("x", recipe.data, place) == count

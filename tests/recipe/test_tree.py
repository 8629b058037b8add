"""`--set`, `matrix` and the order of building."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.recipe import makers

from llmops.errors import RecipeError
from llmops.recipe import Recipe, parse_recipe
from llmops.recipe.tree import build_order, cycle


def read(home: Path, *sets: str, **sections: str) -> Recipe:
    return parse_recipe(makers.text(**sections), file="r.yaml", base_dir=home, sets=sets)


def test_set_overrides_adds_and_replaces(home: Path) -> None:
    recipe = read(home, "variants.tuned.finetune.rank=8", "variants.tuned.finetune.learning_rate=1e-5", "seed=3",
                  "measure.repeats=7", "runtime.dtype=float32", "evaluate.0.exact_match.max_new_tokens=4",
                  "data.train.limits.dropped=0.5", "evaluate.1={perplexity: {data: test}}",
                  "variants.more={from: tuned, prune: {method: magnitude}}", "goals.perplexity.max=9")
    assert (recipe.variants["tuned"].options.rank, recipe.variants["tuned"].options.learning_rate) == (8, 1e-5)
    assert recipe.seed == 3 and recipe.measure is not None and recipe.measure.repeats == 7
    assert recipe.runtime.dtype == "float32" and recipe.data["train"].limits.dropped == 0.5
    assert recipe.score_ids() == ["exact_match:test", "perplexity:test"]
    assert recipe.variants["more"].parent == "tuned" and recipe.goals.quality["perplexity:test"].max == 9


def test_set_finds_names_with_dots(home: Path) -> None:
    named = "variants:\n  w4.5: {prune: {method: magnitude}}"
    assert read(home, "variants.w4.5.prune.sparsity=0.25", variants=named).variants["w4.5"].options.sparsity == 0.25


@pytest.mark.parametrize(("text", "phrases"), [
    ("variants.tunde.finetune.rank=8", ["unknown path variants.tunde", 'did you mean "tuned"']),
    ("variants.tuned.finetune.rnak=8", ['unknown key "rnak"', 'did you mean "rank"']),
    ("variants.tuned.finetune.rank=many", ['given "many"', "whole number"]),
    ("variants.tuned.finetune.rank", ["no path or no value", "path=value"]),
    ("=3", ["no path or no value"]),
    ("seed=[1", ["not YAML", "close the bracket"]),
    ("name.more=1", ["name has", "which holds no keys"]),
    ("evaluate.4.exact_match.data=test", ["a list of 1", "from 0 to 0"]),
    ("evaluate.first=1", ["a list of 1"]),
    ("modle=small", ['unknown key "modle"', 'did you mean "model"']),
])
def test_a_wrong_set_is_named_with_its_text(text: str, phrases: list[str], home: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read(home, text)
    assert len(caught.value.problems) == 1 and str(caught.value).startswith(f"--set {text}: ")
    for phrase in phrases:
        assert phrase in str(caught.value)


def test_a_matrix_becomes_its_product_in_order(home: Path) -> None:
    recipe = read(home, variants=(
        "variants:\n  tuned: {finetune: {method: lora, data: train}}\n"
        "  w: {from: tuned, quantize: {method: rtn}, matrix: {scheme: [w8a16, w4a16], group_size: [32, -1]}}\n"
        "  s: {score: false, matrix: {from: [tuned, base], sparsity: [0.5]}, prune: {method: magnitude}}\n"
        "  d: {prune: {method: depth}, matrix: {layers: [3, [0, 5]]}}\n"
        "  m: {prune: {sparsity: 0.5}, matrix: {method: [magnitude]}}\n"
        "  h: {from: s-base-0.5, finetune: {method: full, data: train}}"))
    names = [name for name in recipe.variants if name.startswith("w-")]
    assert names == ["w-w8a16-32", "w-w8a16--1", "w-w4a16-32", "w-w4a16--1"]
    assert recipe.variants["w-w4a16--1"].options.group == -1 and recipe.variants["w-w4a16--1"].parent == "tuned"
    assert recipe.variants["s-tuned-0.5"].parent == "tuned" and recipe.variants["s-base-0.5"].parent == "base"
    assert not recipe.variants["s-base-0.5"].score and recipe.variants["s-base-0.5"].options.sparsity == 0.5
    assert recipe.variants["d-0_5"].options.layers == [0, 5] and recipe.variants["d-3"].options.layers == 3
    assert recipe.variants["m-magnitude"].method == "magnitude" and recipe.variants["h"].parent == "s-base-0.5"
    assert {"w", "s", "d", "m"}.isdisjoint(recipe.variants)


def test_set_reaches_into_a_matrix(home: Path) -> None:
    written = "variants:\n  w: {quantize: {method: rtn}, matrix: {scheme: [w8a16]}}"
    recipe = read(home, "variants.w.matrix.scheme=[w4a16, w2a16]", variants=written)
    assert list(recipe.variants) == ["w-w4a16", "w-w2a16"]


def test_order_is_that_of_the_file_with_parents_first() -> None:
    assert build_order({"c": ["b", "base"], "a": ["base"], "b": ["a"]}) == ["a", "b", "c"]
    assert build_order({"a": ["base"], "c": ["base"], "b": ["base"]}) == ["a", "c", "b"]


def test_cycles_are_found_wherever_they_begin() -> None:
    assert cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert cycle({"a": ["base"], "b": ["a", "base"]}) is None

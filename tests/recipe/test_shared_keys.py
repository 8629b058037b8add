"""What students share of a teacher, known before anything is built; and students that are no variants."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.recipe import makers
from tests.recipe.test_plan import TREE

from llmops.errors import RecipeError
from llmops.recipe import Plan, make_plan, parse_recipe
from llmops.recipe.cache_checks import check_caches
from llmops.recipe.model import Dims, dims_from_config
from llmops.recipe.shared_keys import SIGNAL_PARTS, foreign

STEP = "  {}: {{from: half, distill: {{method: logits, teacher: other, data: {}, {}}}}}\n"


def plan(home: Path, *lines: str, data: str = "") -> Plan:
    """TREE with more variants, and more data."""
    text = makers.text(variants=TREE + "".join(lines), data=makers.HEAD["data"] + data)
    return make_plan(parse_recipe(text, base_dir=home), home / "runs" / "store")


def test_students_share_signals_where_the_teacher_says_the_same_to_all(home: Path) -> None:
    options = {"a": "offline: {k: 8}", "b": "offline: {k: 8}, loss: reverse_kl, max_steps: 3, learning_rate: 0.1",
               "c": "offline: {k: 9}", "d": "offline: {k: 8}, temperature: 2.0", "e": "offline: {k: 8}, max_length: 16",
               "f": "loss: reverse_kl", "g": "offline: {k: 8}, stop: {holdout: 0.1}"}
    made = plan(home, *(STEP.format(name, "train", given) for name, given in options.items()),
                STEP.format("h", "test", "offline: {k: 8}"))
    shares = {name: made.stage(name).shares for name in "abcdefgh"}
    assert len(shares["a"]) == 1 and shares["a"] == shares["b"] and shares["f"] == []
    assert len({shares[name][0] for name in "acdegh"}) == 6
    assert len({made.keys[name] for name in "abcdefgh"}) == 8
    assert made.stage("c").describe() == "distill logits offline top 9 1 epoch from half, taught by other"


def test_where_signals_lie_changes_no_student(home: Path) -> None:
    (home / "there").mkdir()
    (home / "there" / "manifest.json").write_text("{}")
    made = plan(home, STEP.format("a", "train", "offline: {}"), STEP.format("b", "train", "offline: {cache: there}"))
    assert made.keys["a"] == made.keys["b"]


def test_what_differs_between_two_sets_of_parts_is_named() -> None:
    words = {"teacher": "the teacher", "k": "k"}
    assert foreign({"teacher": "a", "k": "8"}, {"teacher": "a", "k": "8"}, words) == ""
    assert foreign({"data": '["0123456789abcdef", "b"]'}, {"data": '["c"]'}, {}) == "data (0123456789ab and b, here c)"
    assert foreign({"teacher": "abcdefghijklmnop", "k": "8"}, {"teacher": "b", "k": "32"}, words) == (
        "the teacher (abcdefghijkl, here b), k (8, here 32)")


@pytest.mark.parametrize("part", ["", *SIGNAL_PARTS])
def test_signals_that_were_made_of_something_else_are_refused_with_the_plan(home: Path, part: str) -> None:
    line = STEP.format("a", "train", "offline: {cache: there}")
    (home / "there").mkdir()
    (home / "there" / "manifest.json").write_text("{}")
    parts = dict(plan(home, line).stage("a").signals or {})
    if part:
        parts[part] = "else"
    made = plan(home, line)
    (home / "there" / "manifest.json").write_text(json.dumps({"parts": parts}))
    if not part:
        return check_caches(made)
    said = rf":\d+:\d+: variants.a.distill.offline.cache: .*another {SIGNAL_PARTS[part]} \(else, here"
    with pytest.raises(RecipeError, match=said):
        check_caches(made)
    check_caches(replace(made, stages=[replace(stage, built=True) for stage in made.stages]))  # it has what it needs
    return None


def test_options_that_came_later_leave_the_keys_of_older_builds(home: Path) -> None:
    parts = plan(home).stage("student").key_parts
    assert not {"option.student", "option.offline", "option.on_policy", "option.beta", "option.top_k"} & set(parts)
    assert "option.loss" in parts and "option.hidden_weight" in parts


def test_who_writes_data_is_built_before_who_reads_it(home: Path) -> None:
    reader = "  reader: {finetune: {method: full, data: some}}\n"

    def made(samples: int = 3, options: str = "") -> Plan:
        return plan(home, reader, data=f"\n  said: {{synthesize: {{teacher: w4, prompts: train{options}}}}}"
                                       f"\n  some: {{from: said, samples: {samples}}}")

    first, fewer, longer = made(), made(4), made(3, ", max_new_tokens: 5")
    order = [stage.variant for stage in first.stages]
    assert order.index("w4") < order.index("reader") and first.stage("reader").parents == ("base", "w4")
    assert first.stage("reader").teacher is None and "taught by" not in first.stage("reader").describe()
    assert len(first.stage("reader").shares) == 1
    assert fewer.keys["reader"] != first.keys["reader"] and fewer.stage("reader").shares == first.stage("reader").shares
    assert longer.stage("reader").shares != first.stage("reader").shares


@pytest.mark.parametrize(("config", "expected"), [
    ("num_hidden_layers: 2, hidden_size: 64", {"layers": 2, "hidden": 64}),
    ("num_hidden_layers: 9", {"layers": 9}), ("intermediate_size: 128", {"intermediate": 128})])
def test_a_fresh_student_is_counted_as_it_will_be(home: Path, config: str, expected: dict[str, int]) -> None:
    made = plan(home, f"  fresh: {{distill: {{method: logits, teacher: tuned, data: train, student: {{config: "
                      f"{{{config}}}}}}}}}\n", "  child: {from: fresh, prune: {method: depth, layers: 1}}\n")
    dims = Dims(**{**vars(dims_from_config(makers.CONFIG)), **expected})
    assert made.stage("fresh").estimate.parameters.value == dims.parameters()
    assert made.stage("child").estimate.parameters.value == dims.parameters(1)


def test_a_pretrained_student_has_the_dimensions_of_its_folder(home: Path) -> None:
    (home / "wide").mkdir()
    body = {**makers.CONFIG, "hidden_size": 256}
    (home / "wide" / "config.json").write_text(str(body).replace("'", '"').replace("True", "true"))
    line = "  other-one: {distill: {method: logits, teacher: tuned, data: train, student: {model: wide}}}\n"
    made = plan(home, line)
    assert made.stage("other-one").estimate.parameters.value == dims_from_config(body).parameters()
    (home / "wide" / "model.safetensors").write_bytes(b"other weights")
    assert plan(home, line).keys["other-one"] != made.keys["other-one"]

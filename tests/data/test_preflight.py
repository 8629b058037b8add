"""What is refused, and what is proved, before a weight is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmops.data_view import data_view
from llmops.errors import DataError, RecipeError
from llmops.methods.finetune.options.dpo import Dpo
from llmops.preflight import preflight, preflight_report, report_text
from llmops.recipe import Recipe, make_plan, parse_recipe
from llmops.recipe.plan import Plan

PAIRS = [{"prompt": f"Where does {name} live?", "completion": f"In {name}ville."} for name in ("Ada", "Bo", "Cy")]
CHOICES = [{"prompt": "Two and three?", "chosen": "Five.", "rejected": "Six."},
           {"prompt": "Four and one?", "chosen": "Five.", "rejected": "Five."}]


def recipe_of(folder: Path, rows: list[dict[str, Any]], *, limits: str = "{}", max_length: int = 64) -> Recipe:
    """A recipe with two steps on one file, the second taking shorter rows."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ("version: 1\nname: check\nmodel: builtin:tiny\ndata:\n"
            f"  train: {{source: train.jsonl, limits: {limits}}}\nvariants:\n"
            f"  tuned: {{finetune: {{method: lora, data: train, max_length: {max_length}}}}}\n"
            "  short: {finetune: {method: full, data: train, max_length: 48}}\n"
            f"  again: {{from: tuned, finetune: {{method: full, data: train, max_length: {max_length}}}}}\n")
    (folder / "recipe.yaml").write_text(text)
    return parse_recipe(text, file=str(folder / "recipe.yaml"), base_dir=folder)


def with_dpo(recipe: Recipe, *names: str) -> Recipe:
    pairs = Dpo(method="dpo", data="train", max_length=64)
    variants = {name: replace(variant, options=pairs) if name in names else variant
                for name, variant in recipe.variants.items()}
    return replace(recipe, variants=variants)


def plan_of(recipe: Recipe, folder: Path) -> Plan:
    return make_plan(recipe, folder / "store")


def test_the_report_proves_every_data_set_at_every_length(tmp_path: Path) -> None:
    entries = preflight_report(plan_of(recipe_of(tmp_path, PAIRS), tmp_path))
    assert [(entry["data"], entry["max_length"], entry["variants"]) for entry in entries] == [
        ("train", 64, ["tuned", "again"]), ("train", 48, ["short"])]
    for entry in entries:
        assert entry["kind"] == "prompt_completion" and entry["rows"] == entry["examples"] == 3
        assert 0 < entry["trained_tokens"] < entry["tokens"] and 0 < entry["longest"] <= 48
        assert entry["terminator_trained"] is True and len(entry["template_hash"]) == 64
        assert entry["dropped"] == entry["truncated"] == 0
    text = report_text(entries)
    assert "data train (prompt_completion) for tuned, again: 3 rows, 3 examples" in text
    assert text.count("terminator trained: yes; template " + entries[0]["template_hash"][:12]) == 2
    assert json.loads(json.dumps(entries)) == entries
    assert report_text([]) == "no step trains on data"


def test_a_terminator_that_is_cut_from_every_row_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": "Two?", "completion": "very far away " * 40}]
    (entry,) = preflight_report(plan_of(drop(recipe_of(tmp_path, rows, limits="{truncated: 1}"), "short"), tmp_path))
    assert entry["truncated"] == 1 and entry["longest"] > 64 and entry["terminator_trained"] is False
    assert "terminator trained: NO" in report_text([entry])


def drop(recipe: Recipe, *names: str) -> Recipe:
    return replace(recipe, variants={name: each for name, each in recipe.variants.items() if name not in names})


def test_the_shortest_length_counts_too(tmp_path: Path) -> None:
    """Two steps on one data set: what fits the one may not fit the other."""
    rows = [{"prompt": "Two and three? " * 3, "completion": "five " * 6}]
    long, short = (plan_of(drop(recipe_of(tmp_path, rows, max_length=512), name), tmp_path) for name in ("short", "x"))
    assert preflight(long)
    with pytest.raises(DataError, match="1 of 1 rows are longer than max_length 48"):
        preflight(short)


def test_pairs_are_checked_as_pairs(tmp_path: Path) -> None:
    recipe = with_dpo(recipe_of(tmp_path, CHOICES, limits="{dropped: 0.5}"), "tuned", "short", "again")
    (entry,) = preflight_report(plan_of(recipe, tmp_path))
    assert (entry["kind"], entry["pairs"], entry["identical"], entry["dropped"]) == ("preference", 1, 1, 1)
    assert entry["terminator_trained"] is True and entry["variants"] == ["tuned", "short", "again"]
    assert "1 pairs" in report_text([entry]) and "1 identical" in report_text([entry])
    assert any("1 pairs" in line for line in preflight(plan_of(recipe, tmp_path)))
    with pytest.raises(DataError, match="1 of 2 rows are equal on both sides"):
        preflight(plan_of(with_dpo(recipe_of(tmp_path, CHOICES), "tuned", "short", "again"), tmp_path))


def test_a_step_with_the_wrong_kind_is_named(tmp_path: Path) -> None:
    pairs = plan_of(with_dpo(recipe_of(tmp_path, PAIRS), "short"), tmp_path)
    with pytest.raises(DataError, match='variant short: data "train" holds rows of kind prompt_completion; the step '
                                        r"trains on preference \(prompt, chosen, rejected\)"):
        preflight(pairs)
    with pytest.raises(DataError, match=r"variant tuned, again: .*kind preference.*completion: chosen.*method dpo"):
        preflight(plan_of(with_dpo(recipe_of(tmp_path, CHOICES), "short"), tmp_path))


def test_held_out_data_is_checked_as_what_is_trained_on(tmp_path: Path) -> None:
    def recipe(held: list[dict[str, Any]], scored: str = "") -> Plan:
        for name, rows in (("train", PAIRS[:2]), ("held", held), ("test", PAIRS[2:])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = ("version: 1\nname: check\nmodel: builtin:tiny\ndata:\n  train: {source: train.jsonl}\n"
                f"  held: {{source: held.jsonl}}\n  test: {{source: test.jsonl}}\n{scored}variants:\n"
                "  tuned: {finetune: {method: lora, data: train, stop: {data: held}}}\n")
        return plan_of(parse_recipe(text, file="recipe.yaml", base_dir=tmp_path), tmp_path)

    fresh = [{"prompt": "Where does Di live?", "completion": "In Diville."}]
    assert [(entry["data"], entry["variants"]) for entry in preflight_report(recipe(fresh))] == [
        ("train", ["tuned"]), ("held", ["tuned (held out)"])]
    with pytest.raises(DataError, match=r'variant tuned \(held out\): data "held" holds rows of kind preference'):
        preflight(recipe(CHOICES[:1]))
    with pytest.raises(DataError, match="1 of 1 rows of held stand in the training data train"):
        preflight(recipe(PAIRS[:1]))
    with pytest.raises(DataError, match="1 of 1 rows of test stand in the training data held"):
        preflight(recipe(PAIRS[2:], "evaluate:\n  - exact_match: {data: test}\n"))


def test_a_split_that_the_file_does_not_have_is_told_with_the_recipes_line(tmp_path: Path) -> None:
    text = recipe_of(tmp_path, PAIRS).text.replace("{source: train.jsonl,", '{split: "[5:9]", source: train.jsonl,')
    recipe = parse_recipe(text, file="recipe.yaml", base_dir=tmp_path)
    with pytest.raises(DataError, match=r"^recipe\.yaml:5:18: data\.train\.split: train\.jsonl:3: .*the 3 rows"):
        preflight(plan_of(recipe, tmp_path))


def test_stages_that_are_done_are_in_the_report_and_not_checked_again(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, PAIRS)
    plan = plan_of(recipe, tmp_path)
    done = replace(plan, stages=[replace(stage, built=True) for stage in plan.stages])
    assert preflight(done) == [] and len(preflight_report(done)) == 2


def test_data_show_takes_preferences(tmp_path: Path) -> None:
    recipe_of(tmp_path, CHOICES, limits="{dropped: 0.5}")
    body = data_view(tmp_path / "recipe.yaml", None, 2, as_json=True)
    assert body["kind"] == "preference" and body["report"]["pairs"] == 1
    assert set(body["samples"][0]) == {"row", "place", "chosen", "rejected"}


def test_a_hub_models_dimensions_are_checked_before_its_weights_are_loaded(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe is valid, since nothing is fetched for that; the run refuses it as it refuses that of a folder."""
    config = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
              "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("llmops.models.load.hub_config", lambda *_: tmp_path / "config.json")
    text = ("version: 1\nname: hub\nmodel: some/model\ndata:\n  calib: {source: calib.jsonl}\nvariants:\n"
            "  small: {quantize: {method: auto, bits: 3.5, data: calib}}\n")
    (tmp_path / "calib.jsonl").write_text('{"text": "one"}\n')
    recipe = parse_recipe(text, file="hub.yaml", base_dir=tmp_path)
    with pytest.raises(RecipeError, match=r"hub\.yaml:7:.* given no group_size, so 128, but q_proj takes 576 inputs.*"
                                          "expected a divisor"):
        preflight(plan_of(recipe, tmp_path))
    (tmp_path / "config.json").unlink()  # not there, or of a family that is not known: loading the model will tell
    assert preflight(plan_of(recipe, tmp_path)) == []


def test_calibration_data_that_does_not_fill_a_crop_is_told_before_anything_is_built(tmp_path: Path) -> None:
    """The context of the built-in model is 512, so a crop of 2,048 is one of 512."""
    text = ("version: 1\nname: thin\nmodel: builtin:tiny\ndata:\n  calib: {source: calib.txt}\nvariants:\n"
            "  a: {quantize: {method: gptq, scheme: w4a16, data: calib, length: 16}}\n"
            "  b: {from: base, prune: {method: wanda, sparsity: 0.5, data: calib}}\n")
    (tmp_path / "calib.txt").write_text("Ada lives in Adaville. " * 20)
    recipe = parse_recipe(text, file="thin.yaml", base_dir=tmp_path)
    with pytest.raises(DataError, match=r"variant b: calib: its 1 rows have \d+ tokens, and one calibration crop needs "
                                        "512"):
        preflight(plan_of(recipe, tmp_path))
    (tmp_path / "calib.txt").write_text("Ada lives in Adaville. " * 200)
    assert preflight(plan_of(parse_recipe(text, file="thin.yaml", base_dir=tmp_path), tmp_path)) == []

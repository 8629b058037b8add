"""What is written down for people is what the code says."""

import json
from pathlib import Path

from llmops.recipe import STEPS, json_schema
from llmops.recipe.compatibility import PARENTS, children, compatibility, verdict
from llmops.recipe.reference import markdown

ROOT = Path(__file__).parent.parent.parent


def test_the_reference_is_current():
    assert (ROOT / "docs" / "options.md").read_text() == markdown(), "run: llmops schema --markdown > docs/options.md"


def test_the_schema_beside_the_recipes_is_current():
    assert json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()) == json_schema(), (
        "run: llmops schema > recipes/recipe.schema.json")


def test_the_compatibility_table_is_current_and_whole():
    assert (ROOT / "docs" / "compatibility.md").read_text() == compatibility(), (
        "run: llmops schema --compatibility > docs/compatibility.md")
    assert {(step, method) for step, method, _, _ in children()} == {
        (step, method) for step, methods in STEPS.items() for method in methods}


def test_the_table_says_what_the_validator_says():
    assert verdict("base", "finetune", "lora", {"dora": True}) is None
    assert "DoRA rescales whole rows" in verdict("pruned 2:4", "finetune", "lora", {"dora": True})
    assert verdict("pruned", "finetune", "lora", {"rslora": True}) is None
    assert verdict("quantized", "finetune", "lora", {}) is verdict("quantized, healed", "distill", "logits", {}) is None
    assert "round once more" in verdict("quantized, healed", "finetune", "qlora", {})
    assert verdict("adapter on quantized", "quantize", "rtn", {"scheme": "w4a16", "group_size": 32}) is None
    assert all(verdict(parent, "finetune", "lora", {"init": "loftq"}) for parent in PARENTS)

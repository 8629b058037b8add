"""What is written down for people is what the code says."""

import json
from pathlib import Path

from llmops.recipe import json_schema
from llmops.recipe.reference import markdown

ROOT = Path(__file__).parent.parent.parent


def test_the_reference_is_current():
    assert (ROOT / "docs" / "options.md").read_text() == markdown(), "run: llmops schema --markdown > docs/options.md"


def test_the_schema_beside_the_recipes_is_current():
    assert json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()) == json_schema(), (
        "run: llmops schema > recipes/recipe.schema.json")

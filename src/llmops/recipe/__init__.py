"""The recipe: one strict file that names a model, data and a tree of variants.

`load_recipe` reads and checks it (every problem at once, each with file:line:column), `make_plan` says what has to be
built, `why` says what changed since the last time, `json_schema` serves editors. Nothing here imports torch.

    source.py   YAML to values, with places        model.py      what config.json tells
    secret.py   what may not stand in a recipe     keys.py       what a build depends on
    tree.py     --set, matrix, order               hashing.py    hashes of files, remembered
    blocks.py   one block against its options      estimate.py   what a stage will take
    names.py    names given and referred to        plan.py       the stages, in order
    schema.py   the Recipe                         changes.py    what changed
    checks.py, data_checks.py   the whole          show.py       a plan for people
    read.py     all of the left, in order          editor.py     the JSON Schema
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmops.recipe.read import load_recipe, parse_recipe
from llmops.recipe.schema import BASE, COSTS, STEPS, Goal, Goals, ModelSource, Recipe, Runtime, Variant

if TYPE_CHECKING:
    from llmops.recipe.changes import why
    from llmops.recipe.editor import json_schema
    from llmops.recipe.plan import Plan, Stage, make_plan

__all__ = ["BASE", "COSTS", "STEPS", "Goal", "Goals", "ModelSource", "Plan", "Recipe", "Runtime", "Stage", "Variant",
           "json_schema", "load_recipe", "make_plan", "parse_recipe", "why"]

# Validating needs none of these, and each costs start-up time.
_HOMES = {"Plan": "plan", "Stage": "plan", "make_plan": "plan", "json_schema": "editor", "why": "changes"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What a run would do, worked out without loading a model. Imports little, so that `llmops plan` answers at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmops.recipe import Recipe, load_recipe, parse_recipe
from llmops.recipe.cache_checks import check_caches
from llmops.recipe.plan import Plan, make_plan
from llmops.store import Store

__all__ = ["as_recipe", "budgeted", "plan"]


def plan(recipe: Recipe | Mapping[str, Any] | str | Path, *, sets: Sequence[str] = (),
         runs: str | Path | None = None) -> Plan:
    """What `run` would do: the stages in order, which of them are done, and what the rest needs. Loads no model.

    Raises RecipeError when the recipe is wrong, also about signals that it names (`check_caches`).
    """
    parsed, store = as_recipe(recipe, sets), Store(runs)
    rows = store.ledger().rows() if (store.runs / "ledger.db").exists() else []
    made = make_plan(parsed, store.builds, rows)
    check_caches(made)
    return replace(made, advice=(*made.advice, *budgeted(made, store, rows)))


def budgeted(made: Plan, store: Store, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines on the recipe's budget. Raises LlmopsError when what is left to do is known to need more."""
    if made.recipe.budget is None:
        return []
    from llmops.grids import grid_of
    from llmops.recipe.energy_estimate import check_budget

    grid = grid_of(made.recipe) if made.recipe.budget.carbon_g is not None else None
    return check_budget(made, rows, store.folder(made.recipe.name), grid)


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path, sets: Sequence[str] = ()) -> Recipe:
    """A recipe as it is, or read from a mapping or a file. Raises RecipeError when it is wrong."""
    if isinstance(recipe, Recipe):
        return recipe
    return parse_recipe(recipe, sets=sets) if isinstance(recipe, Mapping) else load_recipe(recipe, sets)

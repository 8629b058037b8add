"""Signals that a recipe names by hand (`offline.cache`), held against those that it would make itself.

What a teacher's signals depend on is known once there is a plan (`shared_keys.signal_parts`), and what a cache was made
of stands in its manifest. So signals of another teacher, template, tokenizer or data are refused by `llmops plan`, and
by `tune` before it builds anything. That the rows have the very same tokens is seen when they are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmops.recipe.plan import Plan
from llmops.recipe.shared_keys import SIGNAL_PARTS, foreign
from llmops.recipe.source import Problems, from_values, parse, shown

__all__ = ["check_caches"]


def check_caches(plan: Plan) -> None:
    """Raise RecipeError, with file and line, where a variant that is still to be built names signals that are not those
    of its teacher, template, tokenizer and data."""
    recipe = plan.recipe
    problems = Problems(parse(recipe.text, recipe.file) if recipe.text else from_values({}, recipe.file))
    for stage in plan.stages:
        if stage.built or stage.signals is None:
            continue
        variant = recipe.variants[stage.variant]
        cache = variant.options.offline.cache
        made_of = _parts(recipe.base_dir / Path(cache).expanduser()) if cache is not None else None
        wrong = foreign(made_of, stage.signals, SIGNAL_PARTS) if made_of is not None else ""
        if wrong:
            problems.add(("variants", stage.variant, variant.kind, "offline", "cache"),
                         f"given {shown(cache)}, signals made with another {wrong}; expected those of the teacher "
                         f'"{stage.teacher}", with this template and data: leave `cache` out, and they are made anew')
    problems.raise_if_any()


def _parts(folder: Path) -> dict[str, Any] | None:
    """What the signals in a folder were made of; None where that cannot be read, which others refuse."""
    try:
        return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

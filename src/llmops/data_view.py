"""`llmops data show`: the rows of a recipe's data, rendered with the tokenizer and the mask that training will use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError, unknown
from llmops.preflight import rows_of
from llmops.recipe import Recipe, load_recipe

__all__ = ["data_view"]


def data_view(path: Path, name: str | None, samples: int, sets: Sequence[str] = (), *, as_json: bool = False) -> Any:
    """A rich renderable, or plain values with `as_json`, of `samples` rows of the data called `name`.

    Without a name: the first data that a step trains on, else the first there is. Raises what loading and masking
    the data raise.
    """
    from llmops.data.pairs import encode_pairs
    from llmops.data.render import encode
    from llmops.data.show import show, show_json
    from llmops.models.builtin import locate
    from llmops.models.load import load_tokenizer

    recipe = load_recipe(path, sets)
    lengths = _trained_lengths(recipe)
    if name is None:
        name = next(iter([*lengths, *recipe.data]), None)
    if name is None:
        raise LlmopsError(f"{path}: names no data; add a source under `data:`")
    if name not in recipe.data:
        raise LlmopsError(unknown("data", name, recipe.data))
    rows = rows_of(recipe, name)
    tokenizer = load_tokenizer(locate(recipe.model.id, recipe.base_dir), revision=recipe.model.revision,
                               trust_remote_code=recipe.model.trust_remote_code)
    encoded: Any = None
    if rows.kind not in ("choices", "prompts"):
        encoder: Any = encode_pairs if rows.kind == "preference" else encode
        encoded = encoder(rows, tokenizer, max_length=lengths.get(name, 1024), limits=recipe.data[name].limits)
    return (show_json if as_json else show)(rows, tokenizer, encoded, samples)


def _trained_lengths(recipe: Recipe) -> Mapping[str, int]:
    """{data that a step trains on: the longest row it takes}."""
    return {name: variant.options.max_length for variant in recipe.variants.values()
            if hasattr(variant.options, "max_length") for name in variant.read_names()}

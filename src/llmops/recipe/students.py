"""The dimensions of students that a distillation brings itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llmops.recipe.model import Dims, read_dims
from llmops.recipe.schema import BASE, ModelSource, Recipe, Variant

if TYPE_CHECKING:
    from llmops.methods.distill.options import Student

__all__ = ["after_students", "changed", "dims_below"]

#: Key of config.json -> field of `Dims`.
_FIELDS = {"hidden_size": "hidden", "intermediate_size": "intermediate", "num_hidden_layers": "layers",
           "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim",
           "max_position_embeddings": "context", "tie_word_embeddings": "tied"}


def after_students(recipe: Recipe, name: str, dims: Dims | None, reason: str) -> tuple[Dims | None, str]:
    """(dimensions of the model that the variant `name` goes back to, ""), or (None, why they are not known): those of
    the recipe's model, or of the nearest student above that another model takes the place of."""
    for variant in reversed(recipe.chain(name)):
        student: Student | None = getattr(variant.options, "student", None)
        if student is None:
            continue
        if student.model is not None:
            return read_dims(ModelSource(id=student.model, revision=student.revision), recipe.base_dir)
        if dims is None:
            return None, reason
        teacher, why = (dims, reason) if variant.options.teacher == BASE else after_students(
            recipe, variant.options.teacher, dims, reason)
        return (changed(teacher, student), why) if teacher is not None else (None, why)
    return dims, reason


def dims_below(variants: Mapping[str, Variant], name: str, dims: Dims | None) -> Dims | None:
    """The same for the checks of a recipe, which open no other model: None below a pretrained student."""
    seen: set[str] = set()
    while name in variants and name not in seen:
        seen.add(name)
        student: Student | None = getattr(variants[name].options, "student", None)
        if student is not None:
            return changed(dims, student) if student.model is None and dims is not None else None
        name = variants[name].parent
    return dims


def changed(dims: Dims, student: Student) -> Dims:
    """The dimensions with those keys of config.json that a fresh student changes."""
    given = {_FIELDS[key]: value for key, value in (student.config or {}).items()
             if key in _FIELDS and isinstance(value, int)}
    return replace(dims, quantized=False, integers=False, **given)  # type: ignore[arg-type]

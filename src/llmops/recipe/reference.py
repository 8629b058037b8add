"""The reference of every option, written from the models themselves: `llmops schema --markdown` > docs/options.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from llmops.data.options import DataSource, Limits
from llmops.evaluate.options import EVALUATIONS
from llmops.measure.options import Budget, MeasureOptions
from llmops.recipe.schema import COSTS, STEPS, Card, Goal, ModelSource, Runtime, Tracking

__all__ = ["markdown"]

_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("model", ModelSource), ("runtime", Runtime), ("data.NAME", DataSource), ("data.NAME.limits", Limits),
    ("measure", MeasureOptions), ("goals.METRIC", Goal), ("tracking", Tracking), ("budget", Budget),
    ("card", Card))


def markdown() -> str:
    """One table a block: option, type, default, meaning."""
    lines = ["# Every option of a recipe", "",
             "Written by `llmops schema --markdown` from the code that checks recipes; docs/recipe.md explains the "
             "whole.", ""]
    for title, model in _SECTIONS:
        lines += _section(f"`{title}`", model)
    for metric, options in EVALUATIONS.items():
        lines += _section(f"`evaluate: - {metric}`", options)
    for kind, methods in STEPS.items():
        for method, step in methods.items():
            lines += _section(f"`{kind}`, `method: {method}`", step)
    costs = ", ".join(f"`{name}`" for name in COSTS)
    return "\n".join([*lines, f"Costs that `goals` can bound and `prefer` can name: {costs}.", ""])


def _section(title: str, model: type[BaseModel]) -> list[str]:
    purpose = " ".join((model.__doc__ or "").split())
    return [f"## {title}", "", purpose, "", "| option | values | default | meaning |", "|-|-|-|-|", *_rows(model), ""]


def _rows(model: type[BaseModel]) -> Iterator[str]:
    schema = model.model_json_schema(by_alias=True)
    for name, body in schema["properties"].items():
        if name == "method":
            continue
        default = "required" if name in schema.get("required", ()) else f"`{json.dumps(body.get('default'))}`"
        yield f"| `{name}` | {_values(body)} | {default} | {_cell(body.get('description', ''))} |"


def _values(body: dict[str, Any]) -> str:
    """The type in words, with its bounds."""
    if "anyOf" in body:
        return " or ".join(dict.fromkeys(_values(choice) for choice in body["anyOf"]))
    if "enum" in body or "const" in body:
        return ", ".join(f"`{value}`" for value in body.get("enum", [body.get("const")]))
    if body.get("type") == "array":
        return f"list of {_values(body.get('items', {}))}"
    bounds = [f"{sign} {body[key]:g}" for key, sign in (("exclusiveMinimum", ">"), ("minimum", ">="),
                                                        ("exclusiveMaximum", "<"), ("maximum", "<=")) if key in body]
    word = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false",
            "object": "mapping", "null": "nothing"}.get(body.get("type", ""), "mapping")
    return _cell(" ".join([word, ", ".join(bounds)]).strip())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

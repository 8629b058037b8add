"""The JSON Schema of a recipe, for editors and other tools.

The leaves come from the same pydantic models that read a recipe; what holds them together (one step a variant, one key
an entry of `evaluate`, the methods of each step) is written here and is as strict as the reader. What only the whole
shows (names that lead nowhere, layers that a model does not have) is left to `llmops validate`.

An editor uses it through the first line of a recipe: `# yaml-language-server: $schema=recipe.schema.json`.
"""

from __future__ import annotations

import copy
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from llmops.data.options import DataSource
from llmops.evaluate.options import EVALUATIONS
from llmops.measure.options import Budget, MeasureOptions
from llmops.recipe.schema import (
    BOUNDS,
    COSTS,
    NAME,
    RESERVED,
    STEPS,
    TRACKERS,
    Card,
    Goal,
    ModelSource,
    Runtime,
    Tracking,
)

__all__ = ["json_schema"]

_DRAFT = "http://json-schema.org/draft-07/schema#"
_STEP_WORDS = {"finetune": "train on data", "prune": "remove weights or layers", "quantize": "fewer bits a weight",
               "distill": "train with a teacher"}


def json_schema() -> dict[str, Any]:
    """The schema, as plain values (JSON Schema draft 7, which editors understand)."""
    models = [model for methods in STEPS.values() for model in methods.values()]
    models += [*EVALUATIONS.values(), DataSource, MeasureOptions, ModelSource, Runtime, Goal, Tracking, Budget, Card]
    _, whole = models_json_schema([(model, "validation") for model in models], by_alias=True)
    defs: dict[str, Any] = whole["$defs"]
    for kind, methods in STEPS.items():
        defs[kind] = {"description": _STEP_WORDS[kind], "type": "object", "required": ["method"],
                      "properties": {"method": {"enum": list(methods)}},
                      "allOf": [_when_method(name, _ref(model)) for name, model in methods.items()]}
        defs[f"{kind}-matrix"] = {
            "type": "object", "anyOf": [_relaxed(defs[model.__name__]) for model in methods.values()]}
    defs["DataSource"]["oneOf"] = [{"required": [origin]} for origin in ("source", "from", "synthesize")]
    defs["Student"] |= {"oneOf": [{"required": ["config"]}, {"required": ["model"]}],
                        "dependencies": {"revision": ["model"]}}
    defs["Goal"]["anyOf"] = [{"required": [bound]} for bound in BOUNDS]
    defs["Variant"] = _variant()
    return {"$schema": _DRAFT, "title": "llmops recipe", "type": "object", "additionalProperties": False,
            "required": ["version", "name", "model", "variants"], "properties": _top(), "$defs": defs}


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{model.__name__}"}


def _when_method(name: str, then: dict[str, Any]) -> dict[str, Any]:
    return {"if": {"properties": {"method": {"const": name}}, "required": ["method"]}, "then": then}


def _relaxed(model: dict[str, Any]) -> dict[str, Any]:
    """A method's options where a matrix may give some of those that are required."""
    free = copy.deepcopy(model)
    free.pop("required", None)
    return free


def _variant() -> dict[str, Any]:
    steps = dict.fromkeys(STEPS, True)
    matrix = {
        "description": "option of the step (or from): list of values; the variant becomes one for each combination, "
                       "named name-value", "type": "object", "minProperties": 1,
        "additionalProperties": {"type": "array", "minItems": 1, "uniqueItems": True,
                                 "items": {"type": ["string", "number", "boolean", "array"]}}}
    return {
        "description": "one step from another variant", "type": "object", "additionalProperties": False,
        "properties": {
            "from": {"type": "string", "description": "the variant this starts from; default: base, the model itself"},
            "score": {"type": "boolean", "description": "false builds the variant without scoring it", "default": True},
            "matrix": matrix, **steps},
        "oneOf": [{"required": [kind]} for kind in STEPS],
        "if": {"required": ["matrix"]},
        "then": {"properties": {kind: {"$ref": f"#/$defs/{kind}-matrix"} for kind in STEPS}},
        "else": {"properties": {kind: {"$ref": f"#/$defs/{kind}"} for kind in STEPS}}}


def _named(value: dict[str, Any], description: str, reserved: tuple[str, ...] = ()) -> dict[str, Any]:
    names: dict[str, Any] = {"pattern": NAME, "not": {"enum": sorted({*RESERVED, *reserved})}}
    return {"description": description, "type": "object", "propertyNames": names, "additionalProperties": value}


def _top() -> dict[str, Any]:
    """The sections of a recipe."""
    source = {"anyOf": [{"type": "string", "minLength": 1}, _ref(DataSource)]}
    entry = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False,
             "properties": {name: _ref(model) for name, model in EVALUATIONS.items()}}
    goals = {"prefer": {"type": "string", "description": f"what the winner is best at: a score, or {', '.join(COSTS)}"},
             **{cost: _ref(Goal) for cost in COSTS}}
    return {
        "version": {"const": 1, "type": "integer", "description": "format of the recipe"},
        "name": {"type": "string", "pattern": NAME, "not": {"enum": sorted(RESERVED)},
                 "description": "name of the run; its folder under runs/"},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "default": 0},
        "model": {"anyOf": [{"type": "string", "minLength": 1}, _ref(ModelSource)],
                  "description": "hub id (with @revision), folder, or builtin:tiny"},
        "runtime": {"anyOf": [_ref(Runtime), {"type": "null"}]},
        "data": {"anyOf": [_named(source, "data, named once and used by name"), {"type": "null"}]},
        "evaluate": {"anyOf": [{"type": "array", "items": entry}, {"type": "null"}],
                     "description": "scores that every variant gets"},
        "measure": {"anyOf": [_ref(MeasureOptions), {"type": "null"}],
                    "description": "the workload whose speed, memory and energy are compared; null measures none"},
        "variants": _named({"$ref": "#/$defs/Variant"}, "the tree of variants", ("base",)),
        "report_to": {"anyOf": [{"type": "array", "items": {"enum": list(TRACKERS)}}, {"type": "null"}],
                      "description": "trackers that are told every step of every training"},
        "tracking": {"anyOf": [_ref(Tracking), {"type": "null"}]},
        "budget": {"anyOf": [_ref(Budget), {"type": "null"}]},
        "card": {"anyOf": [_ref(Card), {"type": "null"}]},
        "goals": {"anyOf": [{"type": "object", "properties": goals, "additionalProperties": _ref(Goal)},
                            {"type": "null"}],
                  "description": "bounds on scores and costs; which variant wins"}}

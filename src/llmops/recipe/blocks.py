"""One block of a recipe against one options model, with complaints that a reader can act on.

pydantic decides what is right. What is wrong is said here, in one form for every field: what was given, what was
expected (told from the field's own annotation and bounds, so it can never drift from the schema), and what the field is
for. Values are never coerced: text that looks like a number is not one.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llmops.errors import nearest
from llmops.options import Options
from llmops.recipe.secret import redacted
from llmops.recipe.source import Problems, Trail, shown

__all__ = ["expected", "field_names", "mapping", "read"]

Model = TypeVar("Model", bound=Options)
_PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_BARE_TRUTH = frozenset(("yes", "no", "on", "off", "y", "n"))


def field_names(model: type[BaseModel]) -> dict[str, str]:
    """Key in the recipe -> attribute of the model."""
    return {info.alias or name: name for name, info in model.model_fields.items()}


def mapping(problems: Problems, trail: Trail, value: Any, what: str) -> dict[str, Any] | None:
    """`value` if it is a mapping; otherwise a problem and None."""
    if isinstance(value, Mapping):
        return dict(value)
    problems.add(trail, f"given {shown(value)}; expected {what}", key=value is None)
    return None


def unknown_keys(problems: Problems, trail: Trail, given: Iterable[str], known: Iterable[str], what: str) -> None:
    """A problem for every key of a block that nobody knows."""
    names = list(known)
    for key in given:
        if key not in names:
            problems.add((*trail, key), f"unknown key {shown(key)} in {what}; expected one of {', '.join(names)}"
                         f"{nearest(key, names)}", key=True)


def read(problems: Problems, trail: Trail, value: Any, model: type[Model], what: str) -> Model | None:
    """The options in `value`, or None after noting every problem. `trail` is where the block stands."""
    body = mapping(problems, trail, value, f"a mapping ({what} with {', '.join(field_names(model))})")
    if body is None:
        return None
    names = field_names(model)
    unknown_keys(problems, trail, body, names, what)
    for key, info in ((key, model.model_fields[name]) for key, name in names.items()):
        if key not in body and info.is_required():
            problems.add(trail, f'missing key "{key}" in {what}; expected {expected(info)}'
                         f"{_purpose(info)}", key=True)
    sound = {key: item for key, item in body.items() if key in names and _finite(problems, (*trail, key), item)}
    required = {key for key, name in names.items() if model.model_fields[name].is_required()}
    try:
        options = model.model_validate(sound, strict=True)
    except ValidationError as error:
        for place, said in _wrong_places(error, model):
            if said:
                problems.add((*trail, *place), said, key=not place)
            else:
                _complain(problems, trail, body, model, place)
        return None
    return options if len(sound) == len(body) and required <= set(sound) else None


def expected(info: FieldInfo) -> str:
    """What a field takes, in words: "a whole number from 1 to 4096"."""
    return _type_in_words(info.annotation) + _bounds(info.metadata)


def _finite(problems: Problems, trail: Trail, value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        problems.add(trail, f"given {value}; expected a finite number")
        return False
    if isinstance(value, list):
        return all([_finite(problems, (*trail, index), item) for index, item in enumerate(value)])
    if isinstance(value, Mapping):
        return all([_finite(problems, (*trail, key), item) for key, item in value.items()])
    return True


def _wrong_places(error: ValidationError, model: type[BaseModel]) -> list[tuple[Trail, str]]:
    """(trail of the wrong value, what a validator of the model says about it or ""), each once.

    The names of union members that pydantic puts into its locations are left out.
    """
    places: dict[tuple[Trail, str], None] = {}
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        if item["type"] == "missing" and len(item["loc"]) == 1:
            continue  # said already
        location = item["loc"]
        said = item["msg"].removeprefix("Value error, ") if item["type"] == "value_error" else ""
        name = field_names(model).get(str(location[0])) if location else None
        annotation = model.model_fields[name].annotation if name is not None else None
        if _is_union(annotation):
            location = location[:1] if _model_of(annotation) is None else location
        places[(tuple(location), said)] = None
    return list(places)


def _complain(problems: Problems, trail: Trail, body: Any, model: type[BaseModel], place: Trail) -> None:
    """One problem at `place`: the given value, the expected one, its purpose, and a cure where one is plain."""
    given = body
    info: FieldInfo | None = None
    holder: type[BaseModel] | None = model
    for part in place:
        if holder is not None and part not in field_names(holder):
            unknown_keys(problems, (*trail, *place[:-1]), [str(part)], field_names(holder), f'"{place[-2]}"')
            return
        if holder is not None:
            info = holder.model_fields[field_names(holder)[str(part)]]
            holder = _model_of(info.annotation)
        given = cast(Any, given)[part] if isinstance(given, Mapping | list) else given
    if info is None:
        problems.add(trail, f"given {shown(given)}, which does not fit")
        return
    inside = len(place) > 1 and get_origin(info.annotation) in (list, dict)
    wanted = _type_in_words(get_args(info.annotation)[-1]) if inside else expected(info)
    where = f' in "{place[0]}"' if inside else ""
    problems.add((*trail, *place), f"given {_kinded(given, wanted)}{where}; expected {wanted}{_purpose(info)}"
                 f"{_cure(given, info)}")


def _kinded(value: Any, wanted: str) -> str:
    """The given value; text where a number was wanted says that it is text."""
    return shown(value) + (" (text)" if isinstance(value, str) and "number" in wanted else "")


def _cure(given: Any, info: FieldInfo) -> str:
    literals = [str(item) for item in _literals(info.annotation)]
    if isinstance(given, str):
        if near := nearest(given, literals):
            return near
        if any(get_origin(member) is list for member in _members(info.annotation)) and redacted(given) == given:
            return f"; write [{given}]"
        if info.annotation is bool and given.lower() in _BARE_TRUTH:
            return f"; write {'true' if given.lower() in ('yes', 'on', 'y') else 'false'}"
        try:
            float(given)
        except ValueError:
            return ""
        return "; remove the quotes" if float in _members(info.annotation) or int in _members(info.annotation) else ""
    if isinstance(given, bool | int | float) and str in _members(info.annotation):
        return f'; put quotes around it: "{shown(given)}"'
    if any(type(given) in get_args(member) for member in _members(info.annotation) if get_origin(member) is list):
        return f"; write [{shown(given)}]"
    return ""


def _purpose(info: FieldInfo) -> str:
    return f" ({info.description})" if info.description else ""


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _members(annotation: Any) -> tuple[Any, ...]:
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in members)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, be it optional; None for everything else."""
    models = [member for member in _members(annotation) if member is not type(None)]
    only = models[0] if len(models) == 1 else None
    return only if isinstance(only, type) and issubclass(only, BaseModel) else None


def _literals(annotation: Any) -> list[Any]:
    return [item for member in _members(annotation) if get_origin(member) is Literal for item in get_args(member)]


def _type_in_words(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        inner, *noted = get_args(annotation)
        return _type_in_words(inner) + _bounds([item for note in noted for item in getattr(note, "metadata", [note])])
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if _is_union(annotation):
        return " or ".join(_type_in_words(member) for member in get_args(annotation) if member is not type(None))
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
        return f'"{values[0]}"' if len(values) == 1 else "one of " + ", ".join(str(value) for value in values)
    if get_origin(annotation) is list and get_origin(get_args(annotation)[0]) is Literal:
        return f"a list out of {', '.join(map(str, get_args(get_args(annotation)[0])))}"
    if get_origin(annotation) is list:
        plural = {int: "whole numbers", float: "numbers", str: "text"}
        return f"a list of {plural.get(get_args(annotation)[0], 'entries')}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with {', '.join(field_names(annotation))}"
    return "a mapping"


def _bounds(metadata: Iterable[Any]) -> str:
    """The bounds of a field in words: ", at least 1 and at most 4096"."""
    words = []
    for item in metadata:
        for name, text in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if getattr(item, name, None) is not None:
                words.append(f"{text} {getattr(item, name)}")
        if getattr(item, "min_length", None):
            words.append("not empty")
        if getattr(item, "pattern", None):
            words.append(_pattern_in_words(str(item.pattern)))
    return ", " + " and ".join(words) if words else ""


def _pattern_in_words(pattern: str) -> str:
    return {"^[A-Z][A-Z0-9]+([-_][A-Z0-9]+)*$": "a code of capital letters, as FRA",
            "^(auto|cpu|cuda(:[0-9]+)?)$": "auto, cpu, cuda or cuda:N",
            }.get(pattern, f"that matches {pattern}")

"""Three changes of a recipe's raw values before anything is checked: `--set`, `matrix`, and the order of building.

`--set a.b.c=value`. The value is YAML. Every key but the last must be there already (or be a section or a sub-block
that may be left out), so a misspelt variant is an error and not a new variant. A number steps into a list. A name with
dots is found whole.

`matrix:` stands in the variant, beside its step:

    w: {from: tuned, quantize: {method: rtn}, matrix: {scheme: [w8a16, w4a16], group_size: [32, 128]}}

Each key is an option of the step (or `from`), each value the list of what it takes. The variant is replaced by one for
every combination, named `w-w8a16-32`, `w-w8a16-128`, ..., in the order written; a sign that no folder name can hold
becomes `_` (`2:4` -> `2_4`), and the entries of a list are joined by `_`. Other variants refer to the expanded names.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmops.errors import RecipeError, nearest
from llmops.recipe.secret import redacted, secret_keys
from llmops.recipe.source import Document, Place, Problems, Trail, parse, shown

__all__ = ["apply_sets", "build_order", "cycle", "expand_matrices"]

_SECTIONS = ("data", "runtime", "measure", "goals", "tracking", "budget", "card")
_SUB_BLOCKS = ("limits", "columns", "matrix")
_MOST_VARIANTS = 512


def apply_sets(document: Document, sets: Sequence[str], problems: Problems) -> None:
    """Change `document` by every `a.b.c=value`, in order; what they set stands at "--set a.b.c=value"."""
    for position, text in enumerate(sets):
        path, sign, value = text.partition("=")
        label = f"--set {_safe(text)}"
        place = Place(position + 1, 0, 0, label)
        if not sign or not path.strip():
            problems.at(place, "given no path or no value; expected path=value, for example "
                               "variants.tuned.finetune.rank=8")
            continue
        try:
            parsed = parse(value, "value").value
        except RecipeError as error:
            problems.at(place, error.problems[0].split(": ", 1)[-1])
            continue
        _set(document, path.strip(), parsed, place, problems)


def _safe(text: str) -> str:
    path, _, value = text.partition("=")
    bare = redacted(text)
    hidden = bare != text or any(True for _ in secret_keys({path.rsplit(".", 1)[-1]: value}))
    return f"{redacted(path)}=(hidden)" if hidden else text


def _set(document: Document, path: str, value: Any, place: Place, problems: Problems) -> None:
    here: Any = document.value
    trail: Trail = ()
    rest = path.split(".")
    if not isinstance(here, dict):
        return
    while True:
        key, rest = _step(here, rest)
        outer: Trail = trail
        trail = (*trail, key)
        if isinstance(here, list):
            if not isinstance(key, int) or not 0 <= key < len(here) + (not rest):
                _refuse(problems, place, trail, f"a list of {len(here)}: write a number from 0 to {len(here) - 1}")
                return
        elif not isinstance(here, dict):
            _refuse(problems, place, trail, f"{shown(here)}, which holds no keys: set {_dotted(outer)}")
            return
        if not rest:
            break
        if isinstance(here, dict) and here.get(key) is None:
            if not _may_be_made(outer, str(key)):
                known = ", ".join(here) or "nothing"
                _refuse(problems, place, trail, f"only {known}{nearest(str(key), here)}")
                return
            here[key] = {}
        here = here[key]
    document.forget(trail)
    _place_all(document, trail, value, place)
    if isinstance(here, list) and trail[-1] == len(here):
        here.append(value)
    else:
        here[trail[-1]] = value


def _step(here: Any, rest: list[str]) -> tuple[str | int, list[str]]:
    """The next key and what is left: the longest run of dotted parts that names a key which is there."""
    if isinstance(here, list):
        return (int(rest[0]) if rest[0].isdigit() else rest[0]), rest[1:]
    if isinstance(here, Mapping):
        for end in range(len(rest), 0, -1):
            if ".".join(rest[:end]) in here:
                return ".".join(rest[:end]), rest[end:]
    return rest[0], rest[1:]


def _may_be_made(outer: Trail, key: str) -> bool:
    return ((outer == () and key in _SECTIONS) or (len(outer) == 2 and key in _SUB_BLOCKS)
            or outer == ("goals",))


def _refuse(problems: Problems, place: Place, trail: Trail, there: str) -> None:
    problems.at(place, f"unknown path {_dotted(trail)}; {_dotted(trail[:-1]) or 'the recipe'} has {there}")


def _dotted(trail: Trail) -> str:
    return ".".join(str(part) for part in trail)


def _place_all(document: Document, trail: Trail, value: Any, place: Place) -> None:
    document.keys[trail] = document.values[trail] = place
    inner: Iterable[tuple[str | int, Any]] = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in inner:
        _place_all(document, (*trail, key), item, place)


def expand_matrices(document: Document, steps: Iterable[str], problems: Problems) -> dict[str, list[str]]:
    """Replace every variant that has a `matrix` in document.value["variants"]; returns name -> expanded names."""
    variants = document.value["variants"]
    expanded: dict[str, Any] = {}
    made: dict[str, list[str]] = {}
    for name, body in variants.items():
        if not isinstance(body, dict) or "matrix" not in body:
            new = {name: body}
        else:
            new = _combinations(document, name, body, list(steps), problems)
            made[name] = list(new)
        for each, inner in new.items():
            if each in expanded or (each in variants and each != name):
                problems.add(("variants", name, "matrix"), f'given a matrix that makes a variant "{each}", a name that '
                             "is taken; expected names of their own: rename one of the two", key=True)
            expanded[each] = inner
    document.value["variants"] = expanded
    return made


def _combinations(document: Document, name: str, body: dict[str, Any], steps: list[str],
                  problems: Problems) -> dict[str, Any]:
    trail: Trail = ("variants", name, "matrix")
    rest = {key: item for key, item in body.items() if key != "matrix"}
    step = next((key for key in steps if isinstance(rest.get(key), dict)), None)
    if step is None:
        return {name: rest}
    if not _sound_matrix(body, rest[step], trail, problems):
        first = {key: values[0] for key, values in body["matrix"].items() if isinstance(values, list) and values
                 } if isinstance(body["matrix"], dict) else {}
        return {name: rest | {step: first | rest[step]}}  # so that its other mistakes are still found
    matrix = body["matrix"]
    if math.prod(len(values) for values in matrix.values()) > _MOST_VARIANTS:
        problems.add(trail, f"given a matrix with more than {_MOST_VARIANTS} combinations; expected fewer: split it",
                     key=True)
        return {name: rest}
    made: dict[str, Any] = {}
    for chosen in itertools.product(*(range(len(values)) for values in matrix.values())):
        picks = {key: (index, matrix[key][index]) for key, index in zip(matrix, chosen, strict=True)}
        each = "-".join([name, *(_name_part(value) for _, value in picks.values())])
        inner = {key: dict(item) if key == step else item for key, item in rest.items()}
        new: Trail = ("variants", each)
        for key, (index, value) in picks.items():
            target = new + (("from",) if key == "from" else (step, key))
            (inner if key == "from" else inner[step])[key] = value
            place = document.place((*trail, key, index))
            document.keys[target] = document.place((*trail, key), key=True)
            _place_values(document, target, value, place)
        document.copy_places(("variants", name), new)
        made[each] = inner
    return made


def _place_values(document: Document, trail: Trail, value: Any, place: Place) -> None:
    document.values[trail] = place
    if isinstance(value, list):
        for index in range(len(value)):
            document.values[(*trail, index)] = place


def _sound_matrix(body: dict[str, Any], step: dict[str, Any], trail: Trail, problems: Problems) -> bool:
    matrix = body["matrix"]
    wanted = "a mapping of option: list of values, for example {scheme: [w8a16, w4a16]}"
    if not isinstance(matrix, dict) or not matrix:
        problems.add(trail, f"given {shown(matrix)}; expected {wanted}", key=True)
        return False
    sound = True
    for key, values in matrix.items():
        texts = [_name_part(value) for value in values] if isinstance(values, list) else []
        if not isinstance(values, list) or not values:
            problems.add((*trail, key), f"given {shown(values)}; expected a list of values"
                         f"{'' if isinstance(values, list | dict) or values is None else f': [{values}]'}")
            sound = False
        elif any(isinstance(value, dict) or value is None for value in values):
            problems.add((*trail, key), "given an entry that is a mapping or nothing; expected text, numbers or lists")
            sound = False
        elif len(set(texts)) < len(texts):
            problems.add((*trail, key), "given the same value twice; expected each once: remove one")
            sound = False
        if key in step or (key == "from" and "from" in body):
            problems.add((*trail, key), f'given "{key}" in the matrix and in the variant; expected one of them: remove '
                         "the one outside the matrix", key=True)
            sound = False
    return sound


def _name_part(value: Any) -> str:
    if isinstance(value, list):
        return "_".join(_name_part(item) for item in value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_") or "_"


def build_order(parents: Mapping[str, Sequence[str]]) -> list[str]:
    """Names in the order given, each after all its parents (depth first); names that are not keys are left out.

    Must not be called with a cycle.
    """
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in order or name not in parents:
            return
        for parent in parents[name]:
            visit(parent)
        order[name] = None

    for name in parents:
        visit(name)
    return list(order)


def cycle(parents: Mapping[str, Sequence[str]]) -> list[str] | None:
    """The names around one cycle, first = last, or None. Cut the edge first -> second to go on looking."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name):], name]
        if name in done or name not in parents:
            return None
        for parent in parents[name]:
            found = visit(parent, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    return next((found for name in parents if (found := visit(name, []))), None)

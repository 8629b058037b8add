"""YAML text to plain values, with the line and column of every key and value.

The text is composed into nodes (PyYAML) and the nodes are turned into values here, for three reasons. A node knows
where it stands, so every later complaint can name line and column. PyYAML follows YAML 1.1, in which `on` and `no` are
truth values, `2:4` is the number 124 and `1e-4` is text; editors and every other reader follow YAML 1.2, and so does
this file. And a repeated key, an anchor or a tag is refused instead of being resolved behind the reader's back.

Left out: anchors and merge keys (a variant inherits through `from`, and `matrix` repeats a step), several documents in
one file, tags, and keys that are not text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from llmops.errors import RecipeError
from llmops.recipe.secret import redacted

__all__ = ["Document", "Place", "Problems", "Trail", "from_values", "parse", "shown"]

Trail = tuple[str | int, ...]  # ("variants", "tuned", "finetune", "rank")

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_STR, _MAP, _SEQ = "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OTHER_INT = re.compile(r"(?:0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_MOST_DEEP = 40
_MOST_BYTES = 1_000_000
_CURES = (
    ("cannot start any token", "quote text that begins with one of @ ` % or a tab"),
    ("mapping values are not allowed", "a colon stands where no key can: quote text that holds ': '"),
    ("could not find expected ':'", "write `key: value`, with a space after the colon"),
    ("did not find expected key", "check the indentation: keys of one block stand in one column"),
    ("expected <block end>", "check the indentation: keys of one block stand in one column"),
    ("single document", "a recipe is one document: remove the `---` and what follows"),
    ("expected ',' or", "close the bracket, or put a comma between the entries"),
    ("unexpected end", "close the quote"),
    ("flow", "close the bracket, or put a comma between the entries"),
)


class Place(NamedTuple):
    """Where something was written. Sorts in the order in which a reader meets it: the file, then each --set."""

    order: int
    line: int  # from 1; 0 where there is no text
    column: int
    text: str  # "recipe.yaml:12:5", or "--set seed=1"

    def __str__(self) -> str:
        return self.text


class _Loader(_Base):  # type: ignore[misc]
    """Resolves no plain scalar: `_scalar` below does, by the rules of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}


@dataclass
class Document:
    """Values with their places. `keys` and `values` map a trail to where its key, and its value, is written."""

    file: str
    value: Any = None
    text: str = ""
    keys: dict[Trail, Place] = field(default_factory=dict)
    values: dict[Trail, Place] = field(default_factory=dict)

    def place(self, trail: Trail, *, key: bool = False) -> Place:
        """Where `trail` is written; for what is not written, the nearest thing around it."""
        for end in range(len(trail), -1, -1):
            first, second = (self.keys, self.values) if key or end < len(trail) else (self.values, self.keys)
            found = first.get(trail[:end]) or second.get(trail[:end])
            if found is not None:
                return found
        return Place(0, 0, 0, self.file)

    def copy_places(self, old: Trail, new: Trail) -> None:
        """Let everything under `new` stand where `old` is written."""
        for table in (self.keys, self.values):
            for trail, place in list(table.items()):
                if trail[: len(old)] == old:
                    table.setdefault(new + trail[len(old):], place)

    def forget(self, trail: Trail) -> None:
        """Drop the places of everything at and below `trail`."""
        for table in (self.keys, self.values):
            for known in [known for known in table if known[: len(trail)] == trail]:
                del table[known]


class Problems:
    """Collects everything that is wrong, so that one run of `llmops validate` shows it all."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._found: dict[tuple[Place, str], str] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, trail: Trail, text: str, *, key: bool = False) -> None:
        """Note a problem at the value (or the key) of `trail`. What is wrong once at one place is said once."""
        place = self.document.place(trail, key=key)
        dotted = ".".join(str(part) for part in trail)
        self._found.setdefault((place, text), f"{place}: {dotted}: {text}" if dotted else f"{place}: {text}")

    def at(self, place: Place, text: str) -> None:
        """Note a problem that belongs to no key."""
        self._found.setdefault((place, text), f"{place}: {text}")

    def raise_if_any(self) -> None:
        """Raises RecipeError with every problem in the order of the file."""
        if self._found:
            raise RecipeError([redacted(self._found[at]) for at in sorted(self._found, key=lambda at: at[0])])


def shown(value: Any) -> str:
    """A given value as a message can print it: short, and never a secret."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        short = value if len(value) <= 60 else value[:57] + "..."
        return f'"{redacted(short)}"' if redacted(value) == value else '"(hidden)"'
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"{value!r}"


def parse(text: str, file: str) -> Document:
    """Compose `text`; raises RecipeError with file:line:column for what YAML itself, or this dialect, refuses."""
    document = Document(file, text=text)
    if len(text) > _MOST_BYTES:
        raise RecipeError(f"{file}:1:1: {len(text)} characters; a recipe has at most {_MOST_BYTES}")
    try:
        _refuse_tokens(text, file)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(_syntax(error, text, file)) from None
    except RecursionError:
        raise RecipeError(f"{file}:1:1: nested too deeply; a recipe needs at most {_MOST_DEEP} levels") from None
    problems = Problems(document)
    if node is not None:
        document.value = _value(node, (), document, problems)
    problems.raise_if_any()
    return document


def from_values(values: Any, file: str) -> Document:
    """A document made of Python values; its problems name `file` and the path of keys."""
    document = Document(file)
    problems = Problems(document)
    document.value = _plain(values, (), problems)
    problems.raise_if_any()
    return document


def place_of(mark: Any, file: str) -> Place:
    return Place(0, mark.line + 1, mark.column + 1, f"{file}:{mark.line + 1}:{mark.column + 1}")


def _refuse_tokens(text: str, file: str) -> None:
    """Anchors, aliases and tags leave no trace in the composed nodes, so they are looked for in the tokens."""
    if not any(sign in text for sign in "&*!"):
        return
    found = []
    token: Any
    for token in yaml.scan(text, Loader=_Loader):
        name = type(token).__name__
        if name in ("AnchorToken", "AliasToken"):
            sign = "&" if name == "AnchorToken" else "*"
            found.append(f"{place_of(token.start_mark, file)}: given the YAML {name[:-5].lower()} "
                         f'"{sign}{token.value}"; expected none: write the block out, let a variant inherit through '
                         "`from`, or repeat a step with `matrix`; text that begins with & or * goes in quotes")
        elif name == "TagToken":
            found.append(f"{place_of(token.start_mark, file)}: given a YAML tag; expected none: a recipe holds only "
                         "text, numbers, true, false, lists and mappings; text that begins with ! goes in quotes")
    if found:
        raise RecipeError([redacted(line) for line in found])


def _syntax(error: yaml.YAMLError, text: str, file: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # a reader error: a character that no YAML text may hold
        position = int(getattr(error, "position", 0) or 0)
        line = text.count("\n", 0, position) + 1
        column = position - (text.rfind("\n", 0, position) + 1) + 1
        return f"{file}:{line}:{column}: given a control character; expected printable text: remove it"
    problem = redacted(str(getattr(error, "problem", None) or error))
    context = getattr(error, "context", None)
    lines = text.splitlines()
    row = min(mark.line, len(lines) - 1)
    if row >= 0 and "\t" in lines[row][: mark.column + 1]:
        cure = "a tab stands in this line: indent with spaces"
    else:
        whole = f"{problem} {context or ''}"
        cure = next((cure for sign, cure in _CURES if sign in whole), "see the line before, too")
    return f"{place_of(mark, file)}: given text that is not YAML ({problem}); cure: {cure}"


def _value(node: Any, trail: Trail, document: Document, problems: Problems) -> Any:
    document.values[trail] = place_of(node.start_mark, document.file)
    if len(trail) > _MOST_DEEP:
        problems.add(trail, f"nested more than {_MOST_DEEP} levels deep")
        return None
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else _scalar(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*trail, index), document, problems) for index, item in enumerate(node.value)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        at = place_of(key_node.start_mark, document.file)
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            problems.add(trail, f"given a list or mapping as a key, at {at}; expected text: a template needs quotes")
            continue
        inner = (*trail, key)
        if key in mapping:
            problems.at(at, f'given the key "{key}" twice (first at {document.keys[inner]}); expected it once: remove '
                            "one or rename it")
            continue
        document.keys[inner] = at
        if key == "<<":
            problems.add(inner, "given a merge key; expected none: a variant inherits through `from`", key=True)
        elif not key_node.style and not isinstance(_scalar(key), str):
            problems.add(inner, f"given a key that YAML reads as {_kind(_scalar(key))}; expected text: begin it with a "
                                "letter", key=True)
        mapping[key] = _value(value_node, inner, document, problems)
    return mapping


def _kind(value: Any) -> str:
    return "nothing" if value is None else "a truth value" if isinstance(value, bool) else "a number"


def _scalar(text: str) -> Any:
    """A plain scalar by the core schema of YAML 1.2."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text[0] in "tT"
    if _INT.match(text) and len(text) < 400:
        return int(text)
    if _OTHER_INT.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    if _NOT_FINITE.match(text):
        return float(text.replace(".", "", 1))
    return text


def _plain(value: Any, trail: Trail, problems: Problems) -> Any:
    """Check that Python values are what YAML could have held; tuples become lists."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, (*trail, index), problems) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                problems.add(trail, f"given the key {key!r} ({type(key).__name__}); expected text")
        return {key: _plain(item, (*trail, key), problems) for key, item in value.items() if isinstance(key, str)}
    problems.add(trail, f"given a {type(value).__name__}; expected text, a number, true, false, a list or a mapping")
    return None

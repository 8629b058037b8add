"""Pieces of Markdown that cannot be broken by what they show: names and data are escaped, tables keep their cells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from llmops.report.figures import show, told
from llmops.report.markup import UNSEEN
from llmops.report.reading import Row, figure

__all__ = ["clean", "code", "figures", "flat", "pairs", "safe", "section", "table"]

SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def section(title: str, *parts: str) -> str:
    """A heading and its paragraphs; nothing at all when the first of them is empty."""
    if not parts or not parts[0]:
        return ""
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def figures(row: Row, entries: Iterable[tuple[str, tuple[str, ...]]]) -> str:
    """A table of figures with provenance; empty when none is known."""
    found = [(label, figure(row, *path)) for label, path in entries]
    lines = [[label, show(each, with_interval=True), safe(told(each))]
                          for label, each in found if each.value is not None]
    return table(["", "value", "where it comes from"], lines) if lines else ""


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["-"] * len(head), *lines])


def flat(value: object) -> object:
    if isinstance(value, Mapping):
        return pairs({key: each for key, each in value.items() if not isinstance(each, Mapping | list)})
    plain = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return ", ".join(map(str, value)) if plain and isinstance(value, list) else value


def pairs(body: Mapping[str, object]) -> str:
    """`key value, key value`; of sentences `key: a sentence; key: another`."""
    if any(" " in str(each) for each in body.values()):
        return "; ".join(f"{key}: {each}" for key, each in body.items())
    return ", ".join(f"{key} {each}" for key, each in body.items())


def clean(value: object) -> str:
    """One line of text without what cannot be seen."""
    return " ".join(UNSEEN.sub("�", str(value)).split())


def safe(value: object) -> str:
    """As Markdown that shows exactly this text: no link, no tag, no cell or line broken."""
    line = clean(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?<![\w/])(https?|www)(?=[:.])", r"\1&#8203;", SPECIAL.sub(r"\\\1", line))


def code(value: object) -> str:
    """As a code span, fenced by more backticks than it holds."""
    line = clean(value)
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"

"""Tables as Markdown, which is what the pages in docs hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["head", "line", "table"]


def head(titles: Sequence[str], right: str = "") -> str:
    """The first two lines. right: a letter a column, `r` where figures stand at the right."""
    rule = "".join("-:|" if index < len(right) and right[index] == "r" else "-|" for index in range(len(titles)))
    return f"{line(titles)}\n|{rule}"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(titles: Sequence[str], rows: Iterable[Iterable[str]], right: str = "") -> str:
    return "\n".join([head(titles, right), *map(line, rows)])

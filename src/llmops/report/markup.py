"""HTML and SVG that cannot be broken by what it shows: `tag` escapes every child and every attribute that is not markup
already, so a variant named `<script>` is text wherever it stands. Nothing else of this room writes an angle bracket.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

__all__ = ["Child", "Markup", "join", "raw", "tag", "text"]

#: Control characters, direction overrides (they can make a name read as another) and halves of surrogate pairs.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
VOID = {"meta", "br", "hr", "input", "col"}


class Markup(str):
    """Text that is HTML already. Only `tag`, `text`, `join` and `raw` make it."""

    __slots__ = ()


Child = str | Markup | Iterable["Child"] | None


def text(content: object) -> Markup:
    """Anything as escaped text; markup stays as it is."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape(UNSEEN.sub("�", str(content)), quote=True))


def raw(content: str) -> Markup:
    """A trusted piece of our own, as it is: the packaged style and script."""
    return Markup(content)


def join(children: Child) -> Markup:
    """Children one after another; None is nothing."""
    if children is None:
        return Markup("")
    if isinstance(children, str):
        return text(children)
    return Markup("".join(join(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """`tag("td", "a < b", class_="num", data_v=3)` is `<td class="num" data-v="3">a &lt; b</td>`.

    `_` in an attribute's name stands for `-`, one at its end goes away. None and False leave the attribute out, True is
    bare.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        parts.append(label if value is True else f'{label}="{text(value)}"')
    opened = Markup(f"<{' '.join(parts)}>")
    return opened if name in VOID else Markup(f"{opened}{join(children)}</{name}>")

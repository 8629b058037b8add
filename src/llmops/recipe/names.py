"""Names that a recipe gives (variants, data, the run itself) and names that it refers to."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llmops.errors import nearest
from llmops.recipe.schema import BASE, NAME, RESERVED
from llmops.recipe.source import Problems, Trail, shown

__all__ = ["check_name", "refer"]

_NAME = re.compile(NAME)


def check_name(problems: Problems, trail: Trail, name: str, what: str, *, key: bool = True) -> bool:
    """Whether `name` can name a folder and be typed on a command line; otherwise a problem, and False."""
    if not _NAME.match(name) or name.endswith("."):
        fit = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:80]
        problems.add(trail, f"given {shown(name)} as the name of {what}; expected letters, digits, - _ . (it names a "
                            "folder), beginning with a letter or digit, at most 80"
                            f"{f'; for example {shown(fit)}' if fit else ''}", key=key)
        return False
    if name.lower() in RESERVED:
        problems.add(trail, f"given {shown(name)} as the name of {what}; expected a name that no YAML reader takes for "
                            f'a truth value and no system reserves; for example "{what.split()[-1]}-{name}"', key=key)
        return False
    if what == "a variant" and name == BASE:
        problems.add(trail, 'given "base" as the name of a variant; expected another name: base is the model itself, '
                            "and every variant without `from` starts there", key=key)
        return False
    return True


def refer(problems: Problems, trail: Trail, name: str, known: Iterable[str] | None, what: str,
          matrices: dict[str, list[str]] | None = None) -> bool:
    """Whether `name` is known; otherwise a problem that lists what is known and the nearest, and False.

    known: None lets every name pass, where the names could not be read.
    """
    if known is None:
        return True
    names = list(known)
    if name in names:
        return True
    if matrices and name in matrices:
        problems.add(trail, f"given {shown(name)}, a variant that its matrix expands; expected one of the variants it "
                            f"becomes: {', '.join(matrices[name])}")
        return False
    listed = ", ".join(names) if names else "nothing is defined"
    problems.add(trail, f"given {shown(name)}; expected the name of {what} ({listed}){nearest(name, names)}")
    return False

"""What looks like a secret, so that a recipe that carries one is refused and no message repeats it.

A recipe is committed, copied into every variant's folder and printed in reports. Tokens therefore come from the
environment (`HF_TOKEN` and the like) and from nowhere else. Two nets: keys that name a secret, and values of the
shapes that the common services hand out. The second one reads the raw text, comments included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["CURE", "redacted", "secret_keys", "secret_spans"]

CURE = "a recipe is committed and copied: remove it (and revoke it), and set an environment variable such as HF_TOKEN"

_SHAPES = re.compile(  # \w where a class of letters would be nearer: it compiles five times as fast
    r"\bhf_\w{8,}"
    r"|\bsk-(?:[\w-]{24,}|(?=[\w-]*\d)[\w-]{10,})"
    r"|\bgh[pousr]_\w{8,}|\bgithub_pat_\w{8,}|\bglpat-[\w-]{8,}"
    r"|\bAKIA\w{8,}|\bxox[abprs]-[\w-]{8,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [\w ]*PRIVATE KEY"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_NAMES = re.compile(
    r"(?:(?:hf|hub|api|auth|access|bearer|github|wandb|openai|aws|azure|secret)?(?:token|secret|password|passwd)"
    r"|(?:hf|hub|openai|wandb|aws|azure)?(?:api|access|secret|private|auth)(?:access)?key(?:id)?"
    r"|credentials?|passphrase|authorization)\Z")


def redacted(text: str) -> str:
    """`text` with every secret-looking part replaced."""
    return _SHAPES.sub("(hidden)", text)


def secret_spans(text: str) -> Iterator[tuple[int, int]]:
    """(line, column), from 1, of every secret-looking part of `text`."""
    for found in _SHAPES.finditer(text):
        start = found.start()
        yield text.count("\n", 0, start) + 1, start - (text.rfind("\n", 0, start) + 1) + 1


def secret_keys(value: Any, trail: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], bool]]:
    """(trail, by_name) of every entry that holds a secret: by the name of its key, or by the shape of its value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            bare = re.sub(r"[-_. ]", "", key).lower()
            if _NAMES.match(bare) and not isinstance(item, Mapping | list):
                yield (*trail, key), True
            else:
                yield from secret_keys(item, (*trail, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from secret_keys(item, (*trail, index))
    elif isinstance(value, str) and _SHAPES.search(value):
        yield trail, False

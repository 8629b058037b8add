"""Parts of a source: ``train``, ``train[:90%]``, ``[90%:]``, ``[100:200]``.

The syntax of the `datasets` library, for one range. A part is taken in the order of the file (or of the seeded
shuffle), and two ranges that meet at the same bound never share a row: both round it the same way. Left out: sums of
ranges (``a+b``) and steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Split", "parse_split"]

_SPLIT = re.compile(r"(?P<name>[A-Za-z0-9_.\-]*)(?P<slice>\[(?P<start>[^:\]]*):(?P<stop>[^:\]]*)\])?")
_BOUND = re.compile(r"(-?\d+)|(-?\d+(?:\.\d+)?)%")
_EXPECTED = 'expected a name, a range or both, as "test", "train[:90%]", "[90%:]" or "[100:200]"'


@dataclass(frozen=True)
class Split:
    """A split's name (None: not said) and the range of it that is used; bounds are (value, is a percentage)."""

    name: str | None = None
    start: tuple[float, bool] | None = None
    stop: tuple[float, bool] | None = None

    @property
    def sliced(self) -> bool:
        return self.start is not None or self.stop is not None

    def range(self, count: int) -> tuple[int, int]:
        """(first, one past the last) of `count` rows. ValueError when the range reaches beyond them or is empty."""
        first = _index(self.start, count) if self.start else 0
        last = _index(self.stop, count) if self.stop else count
        if not (0 <= first <= count and 0 <= last <= count):
            raise ValueError(f"the range [{first}:{last}] reaches beyond the {count} rows there are")
        if first >= last:
            raise ValueError(f"the range [{first}:{last}] of {count} rows is empty")
        return first, last


def parse_split(text: str | None) -> Split:
    """Read the value of `split:`. None is the whole of the default split. ValueError with what was expected."""
    if text is None:
        return Split()
    match = _SPLIT.fullmatch(text.strip())
    if match is None or not text.strip():
        raise ValueError(f'cannot read the split "{text}"; {_EXPECTED}')
    if match["slice"] and not (match["start"] or match["stop"]):
        raise ValueError(f'the split "{text}" has a range without bounds; {_EXPECTED}')
    return Split(match["name"] or None, _bound(match["start"], text), _bound(match["stop"], text))


def _bound(written: str | None, text: str) -> tuple[float, bool] | None:
    if not written:
        return None
    match = _BOUND.fullmatch(written.strip())
    if match is None:
        raise ValueError(f'cannot read the bound "{written}" of the split "{text}"; {_EXPECTED}')
    if match[1]:
        return float(match[1]), False
    if abs(float(match[2])) > 100:
        raise ValueError(f'the bound "{written}" of the split "{text}" is beyond 100%')
    return float(match[2]), True


def _index(bound: tuple[float, bool], count: int) -> int:
    value, percent = bound
    if percent:
        share = value if value >= 0 else 100 + value
        return int(count * share / 100 + 0.5)
    return int(value) if value >= 0 else count + int(value)

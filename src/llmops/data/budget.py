"""How much of the data may be lost before a run fails: rows that are dropped, rows that are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmops.data.options import Limits
from llmops.data.sources import Rows
from llmops.errors import DataError

__all__ = ["enforce"]


def enforce(rows: Rows, lost: Sequence[int], longer: Mapping[int, int], limits: Limits, max_length: int,
            why: str = "have nothing to train on") -> None:
    """Raise DataError when more rows are lost or cut than `limits` allows, or all of them are lost.

    lost: rows that left no example, `why` saying how that can be; longer: {row that is cut: its tokens}.
    """
    total = len(rows.rows)
    places = _first([rows.place(index) for index in lost])
    if len(lost) == total:
        raise DataError(f"{rows.name}: none of its {total} rows has a token to train on at max_length {max_length} "
                        f"(they {why}); expected an assistant's text in them ({places}); raise max_length, or look "
                        "with `llmops data show`")
    if len(lost) > limits.dropped * total:
        raise DataError(f"{rows.name}: {len(lost)} of {total} rows {why} within max_length {max_length} ({places}); at "
                        f"most {limits.dropped:.1%} may be dropped; raise max_length, mend the rows, or raise "
                        "`limits: {dropped: ...}`")
    if len(longer) > limits.truncated * total:
        raise DataError(f"{rows.name}: {len(longer)} of {total} rows are longer than max_length {max_length} and would "
                        f"be cut ({_first([rows.place(index) for index in longer])}; the longest has "
                        f"{max(longer.values())} tokens); at most {limits.truncated:.1%} may be; raise max_length, "
                        "shorten them, or raise `limits: {truncated: ...}`")


def _first(places: Sequence[str]) -> str:
    return ", ".join(places[:3]) + (" ..." if len(places) > 3 else "")

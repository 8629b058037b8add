"""Pairs of perplexities and divergences over draws and windows, with an interval that knows both. No torch.

Every contender of a draw (`_quantize_draws.py`) is scored on the same windows. What ours and a peer's differ by hangs
on the draw (where the errors of one rounding point) and on the windows (what text they are shown): the mean over all
has the variance

    s_w^2 / windows + s_d^2 / draws,    s_w^2 of the windows' means over draws, s_d^2 of the draws' means over windows

which counts what is left of both twice and so errs on the wide side; Student's t with the degrees of freedom of Welch
and Satterthwaite. With one draw only the windows are left, and the interval says nothing of the draw's chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["alike", "common", "difference", "gathered", "paired", "paired_divergences"]

Draws = Sequence[Sequence[float]]  # (draws, windows)
CELL = ("bits", "group")  # what a row is of beside its contender and draw, by name


def paired(ours: Draws, theirs: Draws) -> tuple[float, float]:
    """(ratio of the perplexities, half width of its 95 % interval) from the mean losses of the same windows.

    The ratio is exp of the mean difference; its interval is on the log scale.
    """
    mean, half = difference(ours, theirs)
    return math.exp(mean), math.exp(mean) * half


def paired_divergences(ours: Draws, theirs: Draws) -> tuple[float, float]:
    """(ratio of the mean divergences, half width of its 95 % interval), of the same pieces of text. The interval is
    that of the difference, over the peer's mean."""
    mean, half = difference(ours, theirs)
    base = statistics.fmean(map(statistics.fmean, theirs))
    return 1 + mean / base, half / base


def difference(ours: Draws, theirs: Draws) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of the pairs' differences."""
    from llmops.measure.intervals import t_quantile  # needs scipy, which no peer's Python must have

    counts = [[len(draw) for draw in draws] for draws in (ours, theirs)]
    if counts[0] != counts[1] or len(set(counts[0])) != 1 or not counts[0][0]:
        raise ValueError(f"{counts[0]} and {counts[1]} windows; expected the same ones in every draw, at least one")
    apart = [[a - b for a, b in zip(mine, its, strict=True)] for mine, its in zip(ours, theirs, strict=True)]
    windows, draws = [statistics.fmean(each) for each in zip(*apart, strict=True)], [statistics.fmean(x) for x in apart]
    mean = statistics.fmean(draws)
    parts = [(statistics.variance(some) / len(some), len(some) - 1) for some in (windows, draws) if len(some) > 1]
    square = sum(part for part, _ in parts)
    if not parts or len(windows) < 2:
        return mean, math.inf
    if square == 0:
        return mean, 0.0
    freedom = square**2 / sum(part**2 / free for part, free in parts)
    return mean, t_quantile(freedom) * math.sqrt(square)


def gathered(rows: Iterable[dict[str, Any]], cell: Sequence[str] = CELL) -> list[dict[str, Any]]:
    """One row for all draws of a contender's cell, in the place of the first: what draw 0 has (task score, times,
    failures), the perplexity that the mean loss of its draws gives, their mean divergence, and `draws`, by number."""
    cells: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["contender"], *(row[key] for key in cell)), {})[row.get("draw", 0)] = row
    return [over(draws) for draws in cells.values()]


def alike(rows: Iterable[dict[str, Any]], cell: Sequence[str] = CELL) -> list[dict[str, Any]]:
    """The rows gathered, those of a method in the same cell over the draws that all of them have."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in gathered(rows, cell):
        cells.setdefault((row["method"], *(row[key] for key in cell)), []).append(row)
    made = []
    for some in cells.values():
        cut = {row["contender"]: row for row in common(some)}
        made += [cut.get(row["contender"], row) for row in some]
    return made


def over(draws: Mapping[int, dict[str, Any]], some: Iterable[int] | None = None) -> dict[str, Any]:
    """The row of the draws `some`, all by default; those without a perplexity do not count. Its divergence is that of
    the draws in which it was measured."""
    scored = {draw: row for draw, row in sorted(draws.items()) if "perplexity" in row
              and (some is None or draw in some)}
    made = {**draws[min(draws)], "draws": scored}
    if scored:
        made["perplexity"] = math.exp(statistics.fmean(math.log(row["perplexity"]) for row in scored.values()))
    made.pop("divergence", None)
    if apart := [row["divergence"] for row in scored.values() if "divergence" in row]:
        made["divergence"] = statistics.fmean(apart)
    return made


def common(rows: Sequence[dict[str, Any]], key: str = "perplexity") -> list[dict[str, Any]]:
    """Those of some gathered rows that have a `key`, cut down to the draws in which all of them do; none where they
    share no draw."""
    having = [({draw for draw, each in row["draws"].items() if key in each}, row) for row in rows if key in row]
    shared = set.intersection(*(draws for draws, _ in having)) if having else set()
    return [over(row["draws"], shared) for _, row in having] if shared else []

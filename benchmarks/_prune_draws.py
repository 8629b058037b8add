"""Rows of bench_prune.py over several draws (`_quantize_draws.py`), and from earlier runs. No torch.

A row is of one contender, cell and draw. Perplexities of two are compared over the windows of the draws that both
have; their times over the turns that both ran, whatever the draw, which changes no shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from _quantize_pairs import common, paired
from _runner.turns import ratio

__all__ = ["CELL", "SOURCES", "TIMES", "apart", "every", "place", "quicker", "taken"]

CELL = ("sparsity", "pattern")
TIMES = ("times", "cpu_times")
#: What our answers hang on, in src/llmops: files and folders.
SOURCES = ("methods/prune", "methods/quantize/gptq.py", "build/masking.py", "build/block_ratios.py", "calibrate.py",
           "gathering.py", "block_stream.py", "ops/float32.py")

Row = dict[str, Any]


def place(row: Row) -> tuple[str, float, str, int]:
    """What a row is of: (contender, sparsity, pattern, draw)."""
    return row["contender"], row["sparsity"], row["pattern"], row.get("draw", 0)


def taken(results: Iterable[dict[str, Any]], like: dict[str, Any], wanted: Iterable[tuple[str, float, str, int]],
          code: str) -> list[Row]:
    """The scored rows of earlier runs that this one need not compute: same model, calibration and protocol; ours only
    where they say the same `code`. Times are left behind, for they are compared within one run alone.

    results: entries of the lists "results" of earlier files; like: this run's entry; wanted: places, as `place` says.
    """
    wanted, found = set(wanted), {}
    for result in results:
        if any(result[key] != like[key] for key in ("model", "calibration", "protocol")) or not math.isclose(
                result["base"]["perplexity"], like["base"]["perplexity"], rel_tol=1e-6):
            continue
        for row in result["rows"]:
            if place(row) in wanted and "perplexity" in row and row.get("code", "") in (
                    (code,) if row["tool"] == "llmops" else ("",)):
                found.setdefault(place(row), {**{key: value for key, value in row.items() if key not in (
                    *TIMES, "peak_bytes")}, "times": [], "cpu_times": [], "stored": True})
    return list(found.values())


def every(row: Row, key: str) -> list[Any]:
    """What a gathered row has under `key` (a list) in all of its draws, one after the other."""
    return [value for each in row["draws"].values() for value in each.get(key, [])]


def apart(mine: Row, its: Row) -> tuple[float, float] | None:
    """(ratio of the perplexities, half width of its interval) of two gathered rows; None where they share no draw."""
    both = common([mine, its])
    if len(both) < 2:
        return None
    return paired(*([each["losses"] for each in row["draws"].values()] for row in both))


def quicker(mine: Row, its: Row, key: str) -> dict[str, Any] | None:
    """The ratio of two gathered rows' times (`_runner.turns.ratio`); None where they share no turn."""
    pairs = [pair for draw, row in mine["draws"].items() for pair in zip(
        row[key], its["draws"].get(draw, {}).get(key, []), strict=False)]
    return ratio(*map(list, zip(*pairs, strict=True))) if pairs else None

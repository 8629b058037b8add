"""Whether a recipe's data hold items enough for the margins that its goals ask for: said by the plan, before any work.

How much a paired difference varies is taken from earlier runs where there are any (their paired standard error, in
which clusters count), else a tenth of the answers is assumed to flip. What is neither known nor assumed (perplexity
before its first run, rows of a hub data set) is said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmops.data.options import DataSource
from llmops.data.splits import parse_split
from llmops.data.world_size import ROWS, SIZES
from llmops.evaluate.options import Evaluation
from llmops.evaluate.power import ASSUMED, needed, smallest_margin
from llmops.recipe.schema import BASE, Goal, Recipe, score_ids

__all__ = ["WARNING", "advice", "count_rows"]

WARNING = "WARNING: "
LARGEST = 64_000_000  # bytes of a file whose rows are counted


def advice(recipe: Recipe, rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A line for every margin of a score's goal; one that begins with WARNING where the items are too few."""
    known = list(rows)
    lines = []
    for score, goal in recipe.goals.quality.items():
        entry = next(entry for entry in recipe.evaluate if score in score_ids(entry))
        lines += [_line(score, kind, margin, goal, entry, recipe, known)
                  for kind, margin in goal.bounds().items() if kind in ("noninferior", "max_drop") and margin > 0]
    return tuple(lines)


def _line(score: str, kind: str, margin: float, goal: Goal, entry: Evaluation, recipe: Recipe,
          rows: Sequence[Mapping[str, Any]]) -> str:
    against = goal.against or BASE
    told = f"{score} {kind} {margin:g} against {against}: "
    items, spread, seen = _earlier(rows, score, against, recipe.name)
    share = entry.metric not in ("perplexity", "harness")
    if spread is None and not share:
        return told + "how many items it takes cannot be told before a first run"
    sd = spread if spread is not None else math.sqrt(ASSUMED)
    basis = f"as items varied in {seen} earlier comparisons" if spread is not None else \
        f"{ASSUMED:.0%} of answers assumed to flip"
    count = _items(entry, recipe) or items
    wanted = needed(margin, sd, share=share)
    assert wanted is not None
    asked = f"about {wanted:,} items are needed to show it in 80% of tries ({basis})"
    if count is None:
        return f"{told}{asked}; how many there are is not known before the data are read"
    if count >= wanted:
        return f"{told}{asked}; there are {count:,}"
    return (f"{WARNING}{told}{asked}, and there are {count:,}, which show a margin of "
            f"{smallest_margin(count, sd, share=share):.2g}; give more items, or a wider margin")


def _earlier(rows: Sequence[Mapping[str, Any]], score: str, against: str, run: str,
             ) -> tuple[int | None, float | None, int]:
    """(items, standard deviation of an item's paired difference, comparisons behind it) of earlier rows."""
    found: list[tuple[bool, int, float]] = []
    for row in rows:
        body = (row.get("quality") or {}).get(score) or {}
        for label, pair in (body.get("versus") or {}).items():
            if against not in (label, pair.get("variant")) or not pair.get("delta_stderr") or not pair.get("n"):
                continue
            found.append((row["identity"].get("run") == run, int(pair["n"]),
                          float(pair["delta_stderr"]) * math.sqrt(pair["n"])))
    own = [each for each in found if each[0]] or found
    if not own:
        return None, None, 0
    spreads = sorted(each[2] for each in own)
    return own[-1][1], (spreads[(len(own) - 1) // 2] + spreads[len(own) // 2]) / 2, len(own)


def _items(entry: Evaluation, recipe: Recipe) -> int | None:
    if entry.metric in ("harness", "perplexity"):
        limit = getattr(entry.options, "limit", None)
        return int(limit) if limit is not None else None
    return count_rows(entry.options.data, recipe.data, recipe.base_dir)


def count_rows(name: str, sources: Mapping[str, DataSource], base_dir: Path) -> int | None:
    """Rows of a named source after splits and samples; None where they cannot be counted without reading all of it."""
    chain = [sources[name]]
    while chain[-1].from_ is not None:
        chain.append(sources[chain[-1].from_])
    count = _root(chain[-1], base_dir)
    for source in reversed(chain):
        if count is None:
            return None
        split = parse_split(source.split)
        try:
            first, last = split.range(count) if split.sliced else (0, count)
        except ValueError:  # the range does not fit, which reading the data will say
            return None
        count = min(last - first, source.samples if source.samples is not None else last - first)
    return count


def _root(source: DataSource, base_dir: Path) -> int | None:
    given = source.source or ""
    if given in ROWS:
        return ROWS[given]
    if given in ("builtin:facts", "builtin:choices", "builtin:preferences"):
        return SIZES.get(parse_split(source.split).name or "train")
    path = base_dir / Path(given).expanduser()
    if given.startswith("builtin:") or not path.is_file() or path.stat().st_size > LARGEST:
        return None
    if path.suffix.lower() == ".jsonl":
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    if path.suffix.lower() == ".csv":
        import csv

        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            return max(0, sum(1 for row in csv.reader(file) if row) - 1)
    return None

"""Columns that a score is sliced or clustered by, looked for before anything is read but the head of a file.

What cannot be seen so (hub data, parquet, a folder, a long jsonl file) is found missing when the data are read, still
before a weight is loaded. Imported only for a recipe that names such a column.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from llmops.data.options import DataSource
from llmops.errors import nearest
from llmops.evaluate.options import Evaluation
from llmops.recipe.source import Problems, Trail, shown

__all__ = ["check_slices"]

BUILTIN = {"builtin:facts": ("messages", "answer", "subject", "attribute"),
           "builtin:choices": ("question", "choices", "answer", "subject", "attribute"),
           "builtin:preferences": ("prompt", "chosen", "rejected", "subject", "attribute")}
LOOKED_AT = 200  # rows of a file


def check_slices(problems: Problems, trail: Trail, entry: Evaluation, data: Mapping[str, DataSource],
                 base_dir: Path) -> None:
    """A problem for every column that the data do not have, or that is named twice."""
    options = entry.options
    if len(set(options.slices)) < len(options.slices):
        problems.add((*trail, "slices"), f"given {shown(options.slices)}; expected each column once")
    if entry.metric == "harness":
        return
    known = _columns(options.data, data, base_dir)
    if known is None:
        return
    for key, names in (("slices", options.slices), ("cluster", [options.cluster] if options.cluster else [])):
        for name in names:
            if name not in known:
                problems.add((*trail, key), f"given {shown(name)}, a column that \"{options.data}\" does not have; "
                                            f"expected one of {', '.join(known)}{nearest(name, known)}")


def _columns(name: str, data: Mapping[str, DataSource], base_dir: Path) -> list[str] | None:
    """The columns of the first rows, None where they are not to be had cheaply."""
    source, hops = data.get(name), 0
    while source is not None and source.from_ is not None and hops < len(data):
        source, hops = data.get(source.from_), hops + 1
    if source is None or source.source is None:
        return None
    if source.source in BUILTIN:
        return list(BUILTIN[source.source])
    path = base_dir / Path(source.source).expanduser()
    if source.source.startswith("builtin:") or not path.is_file():
        return None
    found = _head(path)
    if found is None:
        return None
    renamed = {column: standard for standard, column in source.columns.items()}
    return list(dict.fromkeys(renamed.get(column, column) for column in found))


def _head(path: Path) -> list[str] | None:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            if path.suffix.lower() == ".csv":
                return next(csv.reader(file), None)
            if path.suffix.lower() != ".jsonl":
                return None
            rows = [json.loads(line) for line in islice(file, LOOKED_AT) if line.strip()]
            if file.readline():  # a column may begin further down: reading the data, before any weight, will tell
                return None
        return list(dict.fromkeys(key for row in rows for key in row))
    except (OSError, ValueError, TypeError, AttributeError):  # what is wrong with it, reading it will say
        return None

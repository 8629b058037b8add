"""A named source of a recipe, as checked rows.

    all rows -> standard columns -> empty rows dropped and counted -> shuffled -> the split's range -> the first
    `samples`

`from` starts from the finished rows of another source. The shuffle is drawn from the recipe's seed alone, so that two
sources over one file with ``[:90%]`` and ``[90%:]`` never share a row, shuffled or not. Everything is read before
anything is used: a bad line is an error even when `samples` would not have reached it. Left out: streaming; a source
has to fit into memory.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmops.data.columns import Kind, kind_of, standard_row
from llmops.data.fingerprint import fingerprint, unpinned
from llmops.data.locate import Located, locate, named
from llmops.data.options import DataSource
from llmops.data.readers import READERS, Table, read_file
from llmops.data.splits import Split, parse_split
from llmops.errors import DataError, unknown

__all__ = ["DataSource", "Kind", "Rows", "SourceError", "fingerprint", "load_rows", "rows_from", "unpinned"]


class SourceError(DataError):
    """What the recipe says of a source does not fit the file. `key` of the source `name` is where it says so."""

    def __init__(self, message: str, name: str, key: str) -> None:
        super().__init__(message)
        self.name, self.key = name, key


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, as `columns.py` describes them, with further columns kept.

    sha256: of kind and rows. notes: how many rows were read, empty and used. places: where each row stands
    ("data/train.jsonl:17"); `place` falls back to the row's number when they are not known.
    """

    name: str
    kind: Kind
    rows: list[dict[str, Any]]
    sha256: str = ""
    notes: dict[str, int] = field(default_factory=dict)
    places: Sequence[str] = ()

    def place(self, index: int) -> str:
        """Where row `index` (from 0) stands, for messages."""
        return self.places[index] if index < len(self.places) else f"{self.name}, row {index + 1}"


def load_rows(name: str, sources: Mapping[str, DataSource], base_dir: Path, seed: int) -> Rows:
    """Read the source called `name`; paths count from `base_dir`, `seed` draws the order when `shuffle` is asked for.

    Raises DataError, with file and line, when the source is not there, a row is not what its kind needs, no row is
    left, or more rows are empty than `limits.dropped` allows; SourceError when a split or a suffix does not fit.
    """
    *derived, root = named(name, sources)

    def says(key: str, source: DataSource, message: str) -> SourceError:
        return SourceError(message, next(each for each, known in sources.items() if known is source), key)

    where, split = locate(root, base_dir), parse_split(root.split)
    try:
        kind, kept, empty = _checked(_read(root, where, split, seed), root, where.label)
    except _Misfit as error:
        raise says(error.key, root, str(error)) from error
    read = len(kept.rows) + empty
    for source in (root, *reversed(derived)):
        try:
            kept = _used(kept, source, seed, where.label)
        except _Misfit as error:
            raise says(error.key, source, str(error)) from error
    return _rows(name, kind, kept, {"read": read, "empty": empty, "used": len(kept.rows)})


class _Misfit(DataError):
    """A SourceError that does not know yet what its source is called."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def rows_from(name: str, rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows that are in memory already, checked as those of a file. Raises DataError naming the row."""
    if not rows:
        raise DataError(f"{name}: no rows were given; expected at least one, as "
                        '{"prompt": "...", "completion": "..."}')
    table = Table([dict(row) for row in rows], [f"{name}:{number}" for number in range(1, len(rows) + 1)])
    kind, kept, _ = _checked(table, DataSource(source=name), name)
    return _rows(name, kind, kept, {"read": len(rows), "empty": 0, "used": len(rows)})


def _rows(name: str, kind: Kind, table: Table, notes: dict[str, int]) -> Rows:
    digest = hashlib.sha256(json.dumps([kind, table.rows], sort_keys=True, default=str).encode()).hexdigest()
    return Rows(name, kind, table.rows, digest, notes, tuple(table.places))


def _checked(table: Table, source: DataSource, label: str) -> tuple[Kind, Table, int]:
    """The kind of the rows, the rows with standard columns, and how many empty ones were left out."""
    kind = kind_of(table, source.columns, label)
    checked = [(standard_row(row, kind, source.columns, place), place)
               for row, place in zip(table.rows, table.places, strict=True)]
    kept = [(row, place) for row, place in checked if row is not None]
    empty = [place for row, place in checked if row is None]
    _refuse_empty(empty, len(checked), source, label)
    by_lines = table.by_lines and kind == "text"
    return kind, Table([row for row, _ in kept], [place for _, place in kept], by_lines), len(empty)


def _read(source: DataSource, where: Located, split: Split, seed: int) -> Table:
    if where.what == "builtin":
        return _builtin(source, where.label, split, seed)
    if where.what == "file" and where.path is not None:
        if split.name not in (None, "train"):
            raise _Misfit("split", f'{where.label}: a single file has no split named "{split.name}"; expected a range '
                                   'of it, as "[:90%]", or a folder with one file a split')
        if where.path.suffix.lower() not in READERS:
            raise _Misfit("source", f'{where.label}: cannot read a "{where.path.suffix or where.path.name}" file; '
                                    f"expected one of {', '.join(READERS)}; convert the file, or give it the suffix of "
                                    "what it holds")
        return read_file(where.path, where.label)
    if where.files:
        files = where.files
        default = "train" if "train" in files else next(iter(files)) if len(files) == 1 else None
        chosen = split.name or default
        if chosen is None:
            raise _Misfit("source", f"{where.label}: the folder holds the splits {', '.join(files)}; choose one with "
                                    "`split`")
        if chosen not in files:
            raise _Misfit("split", f"{where.label}: {unknown('split', chosen, files)} (the files of the folder)")
        return read_file(files[chosen], f"{where.label}/{files[chosen].name}")
    from llmops.data.hub import read_hub

    return read_hub(source, split.name, label=where.label, folder=where.path)


def _builtin(source: DataSource, label: str, split: Split, seed: int) -> Table:
    """The world's rows. `builtin:world` tells the world once, or as often as `samples` needs."""
    from llmops.data import world

    chosen = split.name or "train"
    if chosen not in world.SPLITS:
        raise DataError(f"{label}: {unknown('split', chosen, world.SPLITS)}")
    if label == "builtin:world":
        count = None if split.sliced else source.samples
        # a document begins with a space, as the built-in model was pretrained: its first word is then the usual token
        rows: list[dict[str, Any]] = [{"text": f" {text}"} for text in world.documents(chosen, count, seed)]
    elif label in ("builtin:study", "builtin:prompts"):
        if chosen != "train":
            raise DataError(f"{label}: {unknown('split', chosen, ['train'])}")
        rows = world.study() if label == "builtin:study" else world.prompts()
    else:
        tell = {"builtin:facts": world.facts, "builtin:choices": world.choices,
                "builtin:preferences": world.preferences}[label]
        rows = tell(chosen)
    return Table(rows, [f"{label}[{chosen}]:{number}" for number in range(1, len(rows) + 1)])


def _refuse_empty(empty: list[str], read: int, source: DataSource, label: str) -> None:
    if len(empty) == read:
        raise DataError(f"{empty[0]}: all {read} rows of {label} are empty; expected text in the columns that are "
                        f"used; "
                        "check `columns`")
    if len(empty) > source.limits.dropped * read:
        raise DataError(f"{empty[0]}: the row is empty, and so are {len(empty)} of {read} rows of {label} "
                        f"({_few(empty)}); at most {source.limits.dropped:.1%} may be; take them out or raise "
                        "`limits: {dropped: ...}`")


def _few(places: Sequence[str]) -> str:
    named_places = ", ".join(place.rsplit(":", 1)[-1] for place in places[:3])
    return f"lines {named_places}" + (" ..." if len(places) > 3 else "")


def _used(table: Table, source: DataSource, seed: int, label: str) -> Table:
    """Shuffle, range, samples: in this order. A txt file is one row, and its range is one of lines."""
    rows, places = table.rows, table.places
    end = places[-1]
    if source.shuffle:
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        rows, places = [rows[i] for i in order], [places[i] for i in order]
    split = parse_split(source.split)
    by_lines = table.by_lines and len(rows) == 1
    try:
        if by_lines and split.sliced:
            lines = re.findall(r"[^\n]*\n|[^\n]+", rows[0]["text"])
            end = f"{label}:{int(places[0].rsplit(':', 1)[1]) + len(lines) - 1}"
            first, last = split.range(len(lines))
            rows = [{**rows[0], "text": "".join(lines[first:last])}]
            places = [f"{label}:{int(places[0].rsplit(':', 1)[1]) + first}"]
        elif split.sliced:
            first, last = split.range(len(rows))
            rows, places = rows[first:last], places[first:last]
    except ValueError as error:
        unit = "lines of the text" if by_lines else "rows"
        raise _Misfit("split", f'{end}: the split "{source.split}" of its {unit}: {error}; choose a range within '
                               "them") from error
    if not rows[0].get("text", "x").strip():
        raise _Misfit("split", f'{places[0]}: the split "{source.split}" holds only blank lines; choose a wider range')
    return Table(rows[:source.samples], places[:source.samples], by_lines)

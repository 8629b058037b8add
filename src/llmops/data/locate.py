"""What the `source:` of a recipe points to: something built in, a file, a folder, or a data set of the hub.

A folder whose files are called ``train.jsonl``, ``test.csv`` ... has the splits `train` and `test`. Any other folder,
and every name that is no path, is left to the `datasets` library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmops.data.options import BUILTIN, DataSource
from llmops.data.readers import READERS
from llmops.errors import DataError, nearest, unknown

__all__ = ["Located", "locate", "named"]

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class Located:
    """`label` stands for the source in messages; `files` are the splits of a folder that we read ourselves."""

    what: Literal["builtin", "file", "folder", "hub"]
    label: str
    path: Path | None = None
    files: dict[str, Path] = field(default_factory=dict)


def named(name: str, sources: Mapping[str, DataSource]) -> list[DataSource]:
    """The source called `name`, then those it is `from`, up to the one that names a file.

    Raises DataError for a name that is not there, and for sources that are from each other.
    """
    chain: list[DataSource] = []
    seen: list[str] = []
    while True:
        if name not in sources:
            raise DataError(unknown("data source", name, sources) + (f'; it is what "{seen[-1]}" is '
                                                                     f'from' if seen else ""))
        if name in seen:
            raise DataError(f"data sources that are from each other: {' from '.join([*seen, name])}; expected one of "
                            f"them "
                            "to name a file with `source`")
        seen.append(name)
        chain.append(sources[name])
        if chain[-1].from_ is None:
            return chain
        name = chain[-1].from_


def locate(source: DataSource, base_dir: Path) -> Located:
    """Find what `source.source` names; paths count from `base_dir`. DataError when it cannot be anything."""
    if source.synthesize is not None:
        raise DataError(f'rows that "{source.synthesize.teacher}" writes are there once a step that trains on them has '
                        "run; expected them under runs/written: run the recipe first")
    given = source.source or ""
    if given.startswith("builtin:"):
        if given not in BUILTIN:
            raise DataError(unknown("built-in data", given, BUILTIN))
        return Located("builtin", given)
    path = base_dir / Path(given).expanduser()
    if path.is_file():
        return Located("file", given, path)
    if path.is_dir():
        return Located("folder", given.rstrip("/"), path, _splits(path, given))
    if path.suffix.lower() in READERS or given.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(given):
        raise DataError(f"{given}: there is no such file or folder in {base_dir}{_beside(path)}; expected a file "
                        f"({', '.join(READERS)}), a folder, a hub data set id or one of {', '.join(BUILTIN)}; "
                        "paths count from the recipe's folder")
    return Located("hub", given)


def _beside(path: Path) -> str:
    """The nearest name in the folder where the path should be."""
    if not path.parent.is_dir():
        return f" (the folder {path.parent} is not there either)"
    return nearest(path.name, (entry.name for entry in path.parent.iterdir())).replace("; ", ", ").rstrip("?")


def _splits(folder: Path, given: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in READERS or not path.is_file() or path.name.startswith("."):
            continue
        if _SHARD.search(path.stem):
            return {}
        if path.name in ("dataset_info.json", "state.json", "dataset_dict.json"):  # what `save_to_disk` leaves
            return {}
        if path.stem in files:
            raise DataError(f"{given}: the folder holds {files[path.stem].name} and {path.name}, both the split "
                            f'"{path.stem}"; expected one file a split; move one of them away')
        files[path.stem] = path
    return files

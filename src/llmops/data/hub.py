"""Data sets of the hub, and folders in a layout of the `datasets` library: its only home here.

Only builders that read plain data are let through (json, csv, parquet, arrow, text): a data set cannot run code,
unpickle, or load tensors from an archive. Recent versions of the library no longer run a data set's own script.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmops.data.options import DataSource
from llmops.data.readers import Table
from llmops.errors import DataError, unknown

__all__ = ["read_hub"]

_PLAIN = ("json", "csv", "parquet", "arrow", "text")


def read_hub(source: DataSource, split: str | None, *, label: str, folder: Path | None) -> Table:
    """All rows of one split of a hub data set (or of `folder`, when it is given).

    Raises DataError when it cannot be found or reached, needs a `subset`, or holds something else than plain data.
    """
    with _quiet():
        found = _saved(folder) if folder is not None and _is_saved(folder) else None
        try:
            data = found if found is not None else _built(source, label, folder)
        except DataError:
            raise
        except Exception as error:  # the library raises a dozen classes, several of them private
            raise DataError(_explained(error, source, label, folder)) from error
        name = _chosen(list(data), split, label)
        rows = data[name].to_list()
    if not rows:
        raise DataError(f'{label}[{name}]:1: the split has no rows; expected at least one; choose another `split`')
    return Table(rows, [f"{label}[{name}]:{number}" for number in range(1, len(rows) + 1)])


def _built(source: DataSource, label: str, folder: Path | None) -> Any:
    import datasets

    if folder is None and label in getattr(datasets.packaged_modules, "_PACKAGED_DATASETS_MODULES", _PLAIN):
        raise DataError(f'{label}: is the name of a file format, with which the datasets library would read whatever '
                        f'lies in '
                        "the current folder; expected a hub data set as owner/name, or a path")
    path = str(folder) if folder is not None else label
    builder = datasets.load_dataset_builder(path, name=source.subset, revision=source.revision)
    kind = builder.__class__.__module__.split(".")[-1]
    if kind not in _PLAIN:
        raise DataError(f'{label}: the data set is read by the builder "{kind}"; expected plain data, one of '
                        f"{', '.join(_PLAIN)}; convert it to parquet or jsonl, and name the file")
    return datasets.load_dataset(path, name=source.subset, revision=source.revision)


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved(folder: Path) -> Any:
    """What `Dataset.save_to_disk` wrote: arrow files, one folder a split when there are several."""
    import datasets

    data = datasets.load_from_disk(str(folder))
    return data if isinstance(data, datasets.DatasetDict) else {"train": data}


def _chosen(splits: list[str], split: str | None, label: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None and "train" in splits:
        return "train"
    if split not in splits:
        raise DataError(f"{label}: " + (unknown("split", split, splits) if split else
                                        f"the data has several splits; choose one with `split`: {', '.join(splits)}"))
    return split


def _explained(error: Exception, source: DataSource, label: str, folder: Path | None) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
        return f"{label}: {' '.join(str(error).split())}; choose one of them with `subset`"
    if folder is not None:
        return (f"{label}: the folder cannot be read as a data set ({reason}); expected files named after their "
                f"splits, as "
                "train.jsonl and test.jsonl")
    at = f" at revision {source.revision}" if source.revision else ""
    return (f"{label}: no such file or folder, and the hub data set{at} cannot be fetched ({reason}); check the name "
            f"and the "
            "network (HF_HUB_OFFLINE, HF_TOKEN for private data), or fetch it elsewhere and name the folder")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own progress bars."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()

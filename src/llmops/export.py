"""`llmops export`: a variant in another format, read back by a foreign reader before it is kept.

The folder appears whole or not at all. What the reader computed, held against the variant, lies in its `llmops.json`,
and for a variant of a run in a line of `runs/RUN/exports.json` as well, which the run's report shows: the ledger's rows
are about the variant itself, and are left as they are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmops import __version__
from llmops.errors import LlmopsError, StepError, unknown
from llmops.formats.options import check_format
from llmops.models.builtin import local_folder
from llmops.store import Store, replace_file

__all__ = ["RECORD", "export", "exported", "lines"]

RECORD = "exports.json"


@dataclass(frozen=True)
class _Found:
    """What is exported. name: for people and for the folder; run: where it is noted; facts: where it came from."""

    folder: Path
    name: str
    run: Path | None
    facts: Mapping[str, Any]


def export(variant: str, to: str, *, out: str | Path | None = None, run: str | None = None, runs: str | None = None,
           force: bool = False) -> dict[str, Any]:
    """Write `variant` in the format `to` into the folder `out` (default: VARIANT-FORMAT here); returns its record.

    variant: of a run (default: the latest), or a model folder. force: replace an export that is there. Raises
    LlmopsError when there is no such variant or format, the format cannot hold it, or `out` is taken; StepError when
    the export does not read back.
    """
    check_format(to)
    found = _found(variant, run, runs)
    place = Path(out or f"{found.name}-{to}").expanduser().absolute()
    _check_place(place, force)
    from llmops.formats.check import held_against
    from llmops.formats.source import Source
    from llmops.formats.table import FORMATS
    from llmops.models.load import hush
    from llmops.models.save import staged, write_manifest

    hush()
    with _standing_alone(found.folder) as (folder, said), staged(place) as scratch:
        source = Source.of(folder)
        try:
            written = FORMATS[to].write(source, scratch)
            held = held_against(source, scratch, to, written)
            record = {**held, "notes": [*said, *held["notes"]], **found.facts, "llmops": __version__,
                      "utc": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        except (LlmopsError, OSError):
            raise
        except Exception as error:  # other people's converters and readers raise what they like
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            raise StepError(f"{to}: could not be written or read back ({type(error).__name__}: {reason}); nothing was "
                            "kept. Another format may hold the model: dense does") from error
        write_manifest(scratch, {"schema": 1, "export": record})
        if place.exists():
            shutil.rmtree(place) if any(place.iterdir()) else place.rmdir()
    record["folder"] = str(place)
    if found.run is not None:
        _note(found.run / RECORD, record)
        from llmops.publish import publish

        store = Store(runs)
        publish(found.facts["run"], store, store.ledger(), list(_rows(store, found.facts["run"])))
    return record


def exported(folder: Path) -> list[dict[str, Any]]:
    """What was exported of a run, oldest first, for its report; a damaged file is passed over."""
    try:
        return [dict(record) for record in json.loads((folder / RECORD).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def lines(record: Mapping[str, Any]) -> list[str]:
    """A record for people."""
    difference, mean, size = (record[key]["value"] for key in ("max_logit_difference", "kl_mean", "bytes"))
    return [record["folder"],
            f"  {record['format']}, {size / 1e6:.2f} MB, read back by {record['reader']}: largest logit difference "
            f"{difference:.2e}, mean KL {mean:.2e} nats a token",
            *(f"  {note}" for note in record["notes"])]


# ------------------------------------------------------------------------------------------------ what is exported


def _found(variant: str, run: str | None, runs: str | None) -> _Found:
    """A variant of a run where there is one of that name, else a folder or a built-in model."""
    store = Store(runs)
    rows = _rows(store, run) if "/" not in variant and not variant.startswith(("builtin:", ".")) else {}
    if variant in rows:
        return _of_run(rows[variant], store)
    given = Path(variant).expanduser()
    if run is None and (variant.startswith("builtin:") or given.is_dir()):
        folder = local_folder(variant) if variant.startswith("builtin:") else given.resolve()
        assert folder is not None
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            raise LlmopsError(f"{folder}: holds neither config.json nor adapter_config.json; expected the folder of a "
                              "variant or a model")
        return _Found(folder, folder.name, None, {"source": variant})
    if not rows:
        raise LlmopsError(f'no model folder "{variant}", and no run in {store.runs}; expected a variant of a run, or a '
                          "folder: run `llmops tune RECIPE` first, or name the folder of runs with --runs")
    raise LlmopsError(unknown("variant", variant, rows))


def _rows(store: Store, run: str | None) -> dict[str, dict[str, Any]]:
    """The rows of a run by variant; none where there is no ledger and no run was named."""
    if run is None and not (store.runs / "ledger.db").exists():
        return {}
    from llmops.compare import rows_of

    return {row["identity"]["variant"]: row for row in rows_of(str(store.runs), run)}


def _of_run(row: Mapping[str, Any], store: Store) -> _Found:
    identity, state = row["identity"], row["status"]
    name, place = identity["variant"], store.folder(identity["run"])
    facts = {"run": identity["run"], "variant": name, "key": identity["key"], "chain": row["transform"]["chain"]}
    if state["state"] != "ok":
        raise LlmopsError(f'"{name}" is {state["state"]} ({state["reason"]}); expected a variant that was built: run '
                          "`llmops tune` again")
    if identity["folder"] is not None:
        folder = store.build(identity["key"])
        if not folder.is_dir():
            raise LlmopsError(f"{folder}: is not there; run `llmops tune` again, it will be rebuilt")
        return _Found(folder, name, place, facts)
    base = identity["base_model"]
    if not base.startswith("builtin:") and not Path(base).is_absolute():
        raise LlmopsError(f'"{name}" is {base}, as the recipe names it; give its folder instead: '
                          f"llmops export FOLDER --to ...")
    found = local_folder(base)
    assert found is not None  # a built-in one, or an absolute path that local_folder would have refused
    return _Found(found, name, place, facts)


@contextmanager
def _standing_alone(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """(a folder with all the weights, what was done for it): an adapter apart is merged into a folder for the while."""
    if not (folder / "adapter_config.json").exists():
        yield folder, []
        return
    from llmops.models.load import load, merged
    from llmops.models.save import save_dense

    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = load(folder, dtype="stored", device="cpu")
        model = merged(model)
        save_dense(model, tokenizer, Path(scratch), model.dtype)
        yield Path(scratch), ["the adapter apart was merged into its base first"]


# ---------------------------------------------------------------------------------------------------- where it goes


def _check_place(place: Path, force: bool) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmopsError(f"{place}: cannot be made ({error}); expected a folder that can be written to: name another "
                          "with --out") from error
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    try:
        ours = "export" in json.loads((place / "llmops.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise LlmopsError(f"{place}: is there, and is no export; expected a new folder: name another with --out")
    if not force:
        raise LlmopsError(f"{place}: an export is there; expected a new folder: name another with --out, or write over "
                          "it with --force")


def _note(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to what was exported of a run; the newest is the last."""
    before: Sequence[Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    replace_file(path, json.dumps([*before, record], indent=1, ensure_ascii=False))

"""The matrix: every model at every batch size and context, each cell beside the reference, each cell a file.

A cell's file is named by a hash of everything its figures depend on: both models' contents and runtimes with their
versions, the workload, the sensor, the machine. So a killed matrix goes on at the cell where it was, a model that
changed is measured again, and figures of two machines cannot meet in one table unnoticed. A cell that failed is written
down in the results with its reason, and tried again next time.

Two models are in memory at a time: the reference and one more.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmops.bench_models.arms import Arm, zeros
from llmops.bench_models.pair import measure_pair, refusal
from llmops.bench_models.runtimes import Opened, Wanted, opened, version_of
from llmops.errors import LlmopsError, unknown
from llmops.measure.beside import beside
from llmops.measure.environment import environment
from llmops.measure.meter import Meter
from llmops.measure.options import MeasureOptions
from llmops.measure.sensors import probe
from llmops.store import replace_file

__all__ = ["Matrix", "run_matrix"]

WORKLOAD = ("batch_sizes", "prompt_tokens", "new_tokens", "repeats", "window_s", "sensor", "watts")
MACHINE = ("device", "cpu", "cores", "gpu", "driver", "threads")


@dataclass
class Matrix:
    """What is to be measured. options: of one cell; its batch size and prompt length are replaced by the matrix's."""

    arms: Sequence[Arm]
    reference: str
    batches: Sequence[int]
    contexts: Sequence[int]
    options: MeasureOptions
    device: str = "cpu"
    threads: int = 1
    kernel: str = "auto"
    seed: int = 0
    say: Callable[[str], None] = lambda _: None
    machine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if self.reference not in names:
            raise LlmopsError(unknown("model to compare with", self.reference, names))
        ordered = sorted(self.arms, key=lambda arm: arm.name != self.reference)
        self.arms = ordered

    @property
    def room(self) -> int:
        return max(self.contexts) + self.options.new_tokens

    def cells(self, arm: Arm) -> Iterable[MeasureOptions]:
        return [self.options.model_copy(update={"batch_sizes": [batch], "prompt_tokens": context})
                for context in self.contexts for batch in self.batches]

    def key(self, arm: Arm, cell: MeasureOptions) -> str:
        """What the figures of a cell depend on, hashed."""
        sides = [{"runtime": one.runtime, "version": version_of(one.runtime), "sha256": one.sha256,
                  "model": one.model if one.sha256 is None else None} for one in (arm, self.arms[0])]
        workload = cell.model_dump(mode="json", include=set(WORKLOAD))
        body = {"arm": sides[0], "reference": sides[1], "itself": arm.name == self.reference, "workload": workload,
                "seed": self.seed, "kernel": self.kernel, "room": self.room,
                "machine": {name: self.machine.get(name) for name in MACHINE}}
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:24]


def run_matrix(matrix: Matrix, out: Path) -> list[dict[str, Any]]:
    """Measure what is missing; returns every cell in the order of the matrix, and leaves `out`/cells/KEY.json of each.

    Raises LlmopsError when the reference itself cannot be opened or `out` cannot be written.
    """
    folder = out / "cells"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmopsError(f"{out}: cannot be written to ({error}); name another folder with --out") from error
    sensor = probe(matrix.options, matrix.device)
    matrix.machine = environment(matrix.device, sensor) | {"threads": matrix.threads}
    meter = Meter(sensor, matrix.device)
    sensor.start()
    found: dict[str, dict[str, Any]] = {}
    reference: Opened | None = None
    try:
        for arm in matrix.arms:
            wanted = {matrix.key(arm, cell): cell for cell in matrix.cells(arm)}
            kept = {key: body for key in wanted if (body := _kept(folder / f"{key}.json"))}
            found |= {key: {**body, "arm": arm.as_dict(), "zeros": zeros(arm)} for key, body in kept.items()}
            matrix.say(f"{arm.name}: {len(kept)} of {len(wanted)} cells are there already") if kept else None
            missing = {key: cell for key, cell in wanted.items() if key not in kept}
            if not missing:
                continue
            reference = reference or _open(matrix.arms[0], matrix)
            found |= _arm_cells(matrix, arm, missing, reference, meter, folder)
    finally:
        sensor.stop()
    return [found[matrix.key(arm, cell)] for arm in matrix.arms for cell in matrix.cells(arm)]


def _open(arm: Arm, matrix: Matrix) -> Opened:
    matrix.say(f"{arm.name}: opening {arm.model} with {arm.runtime}")
    return opened(arm.runtime, Wanted(arm.model, matrix.device, matrix.threads, matrix.room, matrix.kernel))


def _arm_cells(matrix: Matrix, arm: Arm, missing: dict[str, MeasureOptions], reference: Opened, meter: Meter,
               folder: Path) -> dict[str, dict[str, Any]]:
    try:
        mine = reference if arm.name == matrix.reference else _open(arm, matrix)
    except LlmopsError as error:
        return {key: _body(matrix, arm, cell, {"state": "failed", "reason": str(error)})
                for key, cell in missing.items()}
    found = {}
    for key, cell in missing.items():
        found[key] = _cell(matrix, arm, cell, mine, reference, meter)
        if found[key]["state"] != "failed":
            replace_file(folder / f"{key}.json", json.dumps(found[key], ensure_ascii=False))
    del mine
    gc.collect()
    return found


def _cell(matrix: Matrix, arm: Arm, cell: MeasureOptions, mine: Opened, reference: Opened,
          meter: Meter) -> dict[str, Any]:
    batch, context = cell.batch_sizes[0], cell.prompt_tokens
    for who, one in ((arm.name, mine), (matrix.reference, reference)):
        if why := refusal(one, batch, context, cell.new_tokens):
            return _body(matrix, arm, cell, {"state": "skipped", "reason": f"{who}: {why}"})
    matrix.say(f"{arm.name}: batch {batch}, context {context}")
    try:
        with beside() as others:
            measured = measure_pair(mine, reference, cell, meter, matrix.seed)
    except (LlmopsError, RuntimeError, ValueError, MemoryError) as error:
        return _body(matrix, arm, cell, {"state": "failed", "reason": f"{type(error).__name__}: {error}"})
    return _body(matrix, arm, cell, {"state": "ok", "reason": None, **measured, "weights_bytes": mine.weights_bytes,
                                     "notes": [*mine.notes, *(f"not alone on this machine: {line}" for line in
                                                              others.found)]})


def _body(matrix: Matrix, arm: Arm, cell: MeasureOptions, what: dict[str, Any]) -> dict[str, Any]:
    return {"arm": arm.as_dict(), "runtime_version": version_of(arm.runtime),
            "reference": matrix.arms[0].as_dict(), "batch": cell.batch_sizes[0], "context": cell.prompt_tokens,
            "new_tokens": cell.new_tokens, "repeats": cell.repeats, "window_s": cell.window_s, "seed": matrix.seed,
            "zeros": zeros(arm), "environment": matrix.machine,
            "utc": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", **what}


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or damaged: it is measured again
        return None
    return body if isinstance(body, dict) and body.get("state") in ("ok", "skipped") else None

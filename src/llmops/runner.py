"""Walk the plan: build what is missing, score what is not scored, write a row for each variant, show the result.

Everything found done is left alone: a row with the same score key is kept (or copied from the run that made it), a
build with the same key is used. torch is imported when there is work for it, so a run that finds all done is over in a
second. A step that fails writes why into its row; its children are skipped, its siblings go on.

Several runs may share a store: a stage is built and scored under a lock of its key (`locks.py`). One that another
process is at work on is put aside, the others go on, and when nothing else is left this process waits and then takes
what the other has made.
"""

from __future__ import annotations

import json
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import __version__
from llmops.charges import Charges
from llmops.errors import BudgetReached, LlmopsError, StoreError
from llmops.explain import origin
from llmops.ledger import SCHEMA, Ledger
from llmops.measure.summary import noise_floor
from llmops.pairing import completed, references
from llmops.planner import as_recipe, budgeted, plan
from llmops.processes import join, terminable
from llmops.progress import Watcher, log, log_file
from llmops.publish import Result, publish
from llmops.quantity import Quantity
from llmops.recipe import Recipe
from llmops.recipe.plan import Plan, Stage, make_plan
from llmops.store import Store, replace_file
from llmops.stored import storage

if TYPE_CHECKING:
    from llmops.green import Green, Start
    from llmops.score import Scorer
    from llmops.train import Progress

__all__ = ["Result", "plan", "publish", "run"]

POLL_S = 0.5  # between two looks at a lock that another process has
#: what a manifest says of how a training went, for the report
TRAINED = ("looks", "attempts", "merge", "trace", "allocation", "search", "teaching", "shared")


def run(recipe: Recipe | Mapping[str, Any] | str | Path, *, sets: Sequence[str] = (), runs: str | Path | None = None,
        watcher: Watcher | None = None, green: Green | None = None) -> Result:
    """Do everything the recipe asks for that is not done yet, and return the rows.

    recipe: a path, a mapping as the file would hold it, or a Recipe. runs: where runs lie (default `$LLMOPS_RUNS`, or
    `runs/`). green: wait for the cleanest window of a forecast. Raises LlmopsError when the recipe is wrong, and
    BudgetReached when its budget is used up; a step that fails raises nothing, its row says why. Under torchrun rank 0
    returns; the others take part in the training and exit when rank 0 is done.
    """
    parsed, store = as_recipe(recipe, sets), Store(runs)
    with terminable(), join(parsed, store):
        return _run(parsed, store, watcher or Watcher(quiet=True), green)


def _run(parsed: Recipe, store: Store, watcher: Watcher, green: Green | None = None) -> Result:
    ledger = store.ledger()
    walk = _Walk(make_plan(parsed, store.builds, ledger.rows()), store, ledger, watcher)
    folder = store.folder(parsed.name)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "recipe.yaml", parsed.text)
    replace_file(folder / "origin.json", json.dumps(origin(parsed), indent=1))
    with log_file(folder / "log.txt"):
        try:
            with walk.open:
                if not all(stage.done for stage in walk.plan.stages):
                    walk.begin(green)
                walk.all()
        except BudgetReached:
            if walk.rows:
                publish(parsed.name, store, ledger, [stage.variant for stage in walk.plan.stages])
            raise
    return publish(parsed.name, store, ledger, [stage.variant for stage in walk.plan.stages])


# --------------------------------------------------------------------------------------------------------- the walk


@dataclass
class _Walk:
    """One walk over one plan. `rows` holds what is finished, by variant."""

    plan: Plan
    store: Store
    ledger: Ledger
    watcher: Watcher
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    run_id: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}")
    _tools: tuple[Any, Scorer] | None = None
    _told: set[tuple[str, str]] = field(default_factory=set)
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)
    open: ExitStack = field(default_factory=ExitStack)  # what lasts as long as the walk: the meter of a budget
    start: Start | None = None  # what a green start has chosen

    def __post_init__(self) -> None:
        self.progress: Progress = self.watcher.progress
        self.locks = self.store.locks()
        self.charges = Charges(self.plan, self.store)

    def begin(self, green: Green | None) -> None:
        """Refuse what can be refused before any work, wait for a clean window where one was asked for, and meter the
        whole where there is a budget."""
        recipe = self.plan.recipe
        with ExitStack() as seen:  # nobody is kept out while it waits
            self._reserve(self.open if green is None else seen)
        self._checked()
        if green is not None:
            from llmops.green import choose, wait

            self.start = choose(green, self.plan, self.ledger.rows())
            replace_file(self.store.folder(recipe.name) / "start.json", json.dumps(self.start.as_dict(), indent=1))
            self.watcher.note(self.start.told())
            wait(self.start)
            self._reserve(self.open)
        if recipe.budget is not None:
            from llmops.grids import grid_of
            from llmops.spending import Spending

            grid = grid_of(recipe) if recipe.budget.carbon_g is not None else None
            meter = self._workbench()[0]
            spending = self.open.enter_context(Spending(self.plan, self.store, meter, recipe.budget, grid))
            self.progress = spending.watching(self.watcher.progress)

    def _reserve(self, stack: ExitStack) -> None:
        from llmops.measure.reserve import reserved

        recipe = self.plan.recipe
        alone = recipe.measure is not None and recipe.measure.exclusive
        stack.enter_context(reserved(alone, f"run {recipe.name}"))

    def _checked(self) -> None:
        from llmops.grids import answers
        from llmops.preflight import preflight
        from llmops.trackers import check_trackers

        check_trackers(self.plan.recipe)
        if not all(stage.done for stage in self.plan.stages):  # a second run does no work, and needs no network
            answers(self.plan.recipe)
        for line in (*self.plan.advice, *budgeted(self.plan, self.store, self.ledger.rows()), *preflight(self.plan)):
            self.watcher.note(line) if line.startswith("WARNING") else log.info("%s", line)

    def all(self) -> None:
        """Every stage, until each has its row. What another process is at work on is put aside and waited for."""
        left = list(enumerate(self.plan.stages, 1))
        while left:
            moved, busy, rest = False, [], []
            self._look()
            for number, stage in left:
                state = self._advance(stage, number)
                moved |= state in ("done", "built")
                busy += [stage] if state == "busy" else []
                rest += [(number, stage)] if state != "done" else []
            left = rest
            if left and not moved:
                self._wait(busy)
        self.locks.sweep(stage.key for stage in self.plan.stages)

    def _advance(self, stage: Stage, number: int) -> str:
        """Take a stage as far as it goes: "done" with its row written, "built", "busy" elsewhere, or "early"."""
        if self._kept(stage):
            if self.store.work(stage.key).exists() or self.store.scoring(stage.score_key).exists():
                self._tidied(stage)
            return "done"
        if not (self._can_build(stage) or self._can_end(stage)):
            return "early"
        lock = self.locks.take(stage.key)
        if lock is None:
            return "busy"
        with lock:
            self._look()
            if self._kept(stage) or self._copied(stage):  # by another process, while this one waited
                return "done"
            self.store.tidy(stage.key)
            return self._visit(stage, number)

    def _visit(self, stage: Stage, number: int) -> str:
        from llmops.trackers import sinks

        lost = [name for name in stage.parents if name in self.rows and self.rows[name]["status"]["state"] != "ok"]
        if lost:
            self._fail(stage, "skipped", f'"{lost[0]}" is {self.rows[lost[0]]["status"]["state"]}')
            return "done"
        built = False
        try:
            with sinks(self.plan.recipe, stage, self.watcher, self.store.folder(self.plan.recipe.name)) as told:
                if not self._present(stage):
                    self._build(stage, number, told.log)
                    built = True
                if not self._can_end(stage):
                    return "built" if built else "early"
                told.summary(self._score(stage, number))
        except BudgetReached:
            raise
        except Exception as error:  # a step may raise anything; the row says what, and the siblings go on
            log.error("%s", traceback.format_exc())
            try:
                self._fail(stage, "failed", str(error) if isinstance(error, LlmopsError) else _named(error))
            except StoreError:  # a full disk takes no row either; the first error is the one to mend
                raise error from None
        return "done"

    def _wait(self, busy: Sequence[Stage]) -> None:
        """A moment, with a line for every process that is waited for."""
        assert busy, "nothing moves and nothing is busy: a stage needs one that the plan does not hold"
        for stage in busy:
            holder = self.locks.holder(stage.key)
            if holder is not None and (stage.key, holder.token) not in self._told:
                self._told.add((stage.key, holder.token))
                what = "scoring" if self._present(stage) else "building"
                self.watcher.note(f"  waiting for {holder.pid} on {holder.host}: {what} {stage.variant} since "
                                  f"{holder.since} ({holder.command})")
        time.sleep(POLL_S)

    def _look(self) -> None:
        """See what stands in the ledger now: other processes write into it."""
        self._known = {row["identity"]["variant"]: row for row in self.ledger.rows(self.plan.recipe.name)}

    def _kept(self, stage: Stage) -> bool:
        """Whether a row of this run, from an earlier time or from another process, is what this stage would write."""
        kept = self._known.get(stage.variant)
        if kept is None or not _done(kept, stage, self.plan.recipe) or not self._present(stage):
            return False
        self.rows[stage.variant] = kept
        return True

    def _copied(self, stage: Stage) -> bool:
        """Whether another run has the same scores of the same build; its row becomes one of this run."""
        found = self.ledger.find(stage.score_key)
        if found is None or found["status"]["state"] != "ok" or not self._present(stage):
            return False
        quality = completed(found.get("quality") or {}, self.ledger, found["row_id"],
                            references(stage.variant, stage.parents, self.plan.recipe), self.rows,
                            self.plan.recipe.seed)
        self._append(stage, {**found, "quality": quality,
                             "verdict": {"warnings": found["verdict"].get("warnings", [])}},
                     {score: self.ledger.items(found["row_id"], score) for score in found.get("quality") or {}})
        return True

    def _tidied(self, stage: Stage) -> None:
        lock = self.locks.take(stage.key)
        if lock is not None:
            with lock:
                self.store.tidy(stage.key)
                self.store.scored(stage.score_key)

    def _present(self, stage: Stage) -> bool:
        return stage.variant == "base" or (self.store.build(stage.key) / "llmops.json").exists()

    def _can_build(self, stage: Stage) -> bool:
        """Whether the stage is still to be built, and all that it is built from is there and sound."""
        return not self._present(stage) and all(self._sound(self.plan.stage(name)) for name in stage.parents)

    def _sound(self, stage: Stage) -> bool:
        if stage.variant in self.rows:
            return self.rows[stage.variant]["status"]["state"] == "ok"  # type: ignore[no-any-return]
        if stage.variant == "base":
            return True
        return self._present(stage) and bool(self.store.manifest(stage.key)["parity"]["ok"])

    def _can_end(self, stage: Stage) -> bool:
        """Whether the rows are there that its own row is held against, of stages before it in the plan."""
        names = [each.variant for each in self.plan.stages]
        against = [goal.against for goal in self.plan.recipe.goals.quality.values() if goal.against]
        needed = {"base", *stage.parents, *against}
        return all(name in self.rows for name in names[:names.index(stage.variant)] if name in needed)

    def _build(self, stage: Stage, number: int, tell: Callable[[int, Mapping[str, float]], None]) -> None:
        from llmops.build import build

        meter, _ = self._workbench()
        with self.watcher.stage(f"[{number}/{len(self.plan.stages)}] build {stage.variant}: {stage.describe()}"):
            manifest = build(stage, self.plan.recipe, self.store, meter, self.progress, tell)
        for event in manifest["events"]:
            log.info("%s: %s", stage.variant, event)

    def _score(self, stage: Stage, number: int) -> dict[str, Any]:
        _, scorer = self._workbench()
        row = self._row(stage)
        items: dict[str, list[Any]] = {}
        if stage.scored_here:
            with self.watcher.stage(f"[{number}/{len(self.plan.stages)}] score {stage.variant}"):
                items = scorer.score(stage, row, self.rows)
                if self.start is not None:
                    built = Quantity.from_dict(row["building"]["chain_energy_j"])
                    row["carbon"] |= self.start.row(built)
                teacher = self.rows.get(stage.taught_by or "")
                if teacher is not None and self.plan.recipe.measure is not None:
                    row["building"]["break_even_to_teacher_tokens"] = self.charges.beside_teacher(
                        stage, row, teacher).as_dict()
        for line in noise_floor(row):
            self.watcher.note(f"  {line}")
        self._append(stage, row, {score: [item.as_dict() for item in each] for score, each in items.items()})
        self.store.scored(stage.score_key)
        return row

    def _told_progress(self, done: int, total: int, text: str = "") -> None:
        self.progress(done, total, text)

    def _workbench(self) -> tuple[Any, Scorer]:
        """Meter and scorer, made when the first stage needs them."""
        if self._tools is None:
            import torch

            from llmops.measure.meter import Meter
            from llmops.measure.options import MeasureOptions
            from llmops.measure.sensors import probe
            from llmops.models.load import hush, pick_device
            from llmops.score import Scorer

            hush()
            recipe = self.plan.recipe
            if recipe.runtime.threads:
                torch.set_num_threads(recipe.runtime.threads)
            device = pick_device(recipe.runtime.device)
            meter = Meter(probe(recipe.measure or MeasureOptions(), device), device)
            self._tools = meter, Scorer(self.plan, self.store, self.ledger, meter, self._told_progress)
        return self._tools

    def _row(self, stage: Stage) -> dict[str, Any]:
        from llmops.measure.environment import environment

        meter, _ = self._workbench()
        row = self._skeleton(stage)
        manifest = self.store.manifest(stage.key) if stage.variant != "base" else {}
        row["environment"] = environment(meter.device, meter.sensor)
        row["transform"] |= storage(manifest, self.store.build(stage.key))
        row["parity"] = manifest.get("parity")
        if manifest and not manifest["parity"]["ok"]:
            wrong = "; ".join(f"{check['name']}: {check['detail']}" for check in manifest["parity"]["checks"]
                              if not check["ok"])
            row["status"] = {"state": "broken", "reason": f"not what was built, read back from disk: {wrong}"}
        row["building"] = {**manifest.get("cost", {}), "attempts": manifest.get("attempts") or [],
                           "data": manifest.get("data_report") or {},
                           "loss": manifest.get("loss") or [], "data_sha256": manifest.get("data") or {},
                           **{key: manifest[key] for key in TRAINED if manifest.get(key)},
                           **self.charges.charged(manifest),
                           "chain_energy_j": self.charges.chain_energy(stage).as_dict()}
        row["log"] = {"events": manifest.get("events", [])}
        return row

    def _skeleton(self, stage: Stage) -> dict[str, Any]:
        recipe = self.plan.recipe
        variant = recipe.variants.get(stage.variant)
        options = variant.options.model_dump(mode="json") if variant is not None else {}
        return {
            "schema": SCHEMA, "goals": recipe.goals.as_dict(), "card": recipe.card.model_dump(exclude_defaults=True),
            "identity": {"base_model": recipe.model.id, "revision": recipe.model.revision, "seed": recipe.seed,
                         "llmops": __version__},
            "status": {"state": "ok", "reason": None},
            "transform": {"kind": stage.kind, "method": stage.method, "options": options,
                          "chain": [*self._chain(stage), *([f"{stage.kind}:{stage.method}"] if stage.kind else [])],
                          "simulated": False},
            "size": {}, "building": {}, "quality": {}, "latency": {}, "energy": {}, "workload": {}, "carbon": {},
            "tokens": {}, "verdict": {"warnings": []}}

    def _chain(self, stage: Stage) -> list[str]:
        return list(self.rows[stage.parents[0]]["transform"]["chain"]) if stage.parents else []

    def _fail(self, stage: Stage, state: str, reason: str) -> None:
        row = self._skeleton(stage)
        row["status"] = {"state": state, "reason": reason}
        self.watcher.note(f"  {stage.variant}: {state}: {reason}")
        self._append(stage, row, {})

    def _append(self, stage: Stage, row: dict[str, Any], items: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        recipe = self.plan.recipe
        teacher = stage.teacher
        said = {"goals": recipe.goals.as_dict(), "card": recipe.card.model_dump(exclude_defaults=True)}
        row = {**row, **said, "identity": {
            **row["identity"], "run": recipe.name, "run_id": self.run_id, "variant": stage.variant,
            "parent": stage.parents[0] if stage.parents else None, "teacher": teacher, "key": stage.key,
            "parent_key": stage.parent_keys[0] if stage.parent_keys else None, "score_key": stage.score_key,
            "recipe_sha256": recipe.sha256, "utc": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "folder": None if stage.variant == "base" else str(Path("store") / stage.key)}}
        row.pop("row_id", None)
        self.rows[stage.variant] = {**row, "row_id": self.ledger.append(row, items)}


def _done(row: Mapping[str, Any], stage: Stage, recipe: Recipe) -> bool:
    same = row["identity"].get("score_key") == stage.score_key and row["goals"] == recipe.goals.as_dict()
    same = same and (row.get("card") or {}) == recipe.card.model_dump(exclude_defaults=True)
    return same and row["status"]["state"] in ("ok", "broken")


def _named(error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"{type(error).__name__}: {first} (the log has the whole story)"

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
import logging
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops import __version__
from llmops.errors import LlmopsError, StoreError
from llmops.explain import explained, origin
from llmops.ledger import SCHEMA, Ledger
from llmops.pairing import completed, references
from llmops.planner import as_recipe, plan
from llmops.processes import join, terminable
from llmops.progress import Watcher, log
from llmops.quantity import Quantity, weakest
from llmops.recipe import Recipe
from llmops.recipe.plan import Plan, Stage, make_plan
from llmops.report.verdict import judge
from llmops.store import Store, replace_file

if TYPE_CHECKING:
    from llmops.score import Scorer

__all__ = ["Result", "plan", "publish", "run"]

POLL_S = 0.5  # between two looks at a lock that another process has
#: what a manifest says of how a training went, for the report
TRAINED = ("looks", "attempts", "merge", "trace", "allocation", "search", "teaching", "shared")


@dataclass
class Result:
    """What a run came to. `rows`: one a variant, in the order of the plan, verdicts included."""

    name: str
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Variants that failed, were skipped, or are broken."""
        return [row["identity"]["variant"] for row in self.rows if row["status"]["state"] != "ok"]

    @property
    def winner(self) -> str | None:
        return next((row["identity"]["variant"] for row in self.rows if row["verdict"].get("winner")), None)

    @property
    def exit_code(self) -> int:
        """0 done, 1 no variant meets the goals, 3 a step failed."""
        if self.failed:
            return 3
        return 1 if any(row["goals"] for row in self.rows) and self.winner is None else 0


def run(recipe: Recipe | Mapping[str, Any] | str | Path, *, sets: Sequence[str] = (), runs: str | Path | None = None,
        watcher: Watcher | None = None) -> Result:
    """Do everything the recipe asks for that is not done yet, and return the rows.

    recipe: a path, a mapping as the file would hold it, or a Recipe. runs: where runs lie (default `$LLMOPS_RUNS`, or
    `runs/`). Raises LlmopsError when the recipe is wrong; a step that fails raises nothing, its row says why. Under
    torchrun rank 0 returns; the others take part in the training and exit when rank 0 is done.
    """
    parsed, store = as_recipe(recipe, sets), Store(runs)
    with terminable(), join(parsed, store):
        return _run(parsed, store, watcher or Watcher(quiet=True))


def _run(parsed: Recipe, store: Store, watcher: Watcher) -> Result:
    ledger = store.ledger()
    walk = _Walk(make_plan(parsed, store.builds, ledger.rows()), store, ledger, watcher)
    folder = store.folder(parsed.name)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "recipe.yaml", parsed.text)
    replace_file(folder / "origin.json", json.dumps(origin(parsed), indent=1))
    with _log_file(folder / "log.txt"):
        if not all(stage.done for stage in walk.plan.stages):
            from llmops.preflight import preflight
            from llmops.trackers import check_trackers

            check_trackers(parsed)
            for line in (*walk.plan.advice, *preflight(walk.plan)):
                watcher.note(line) if line.startswith("WARNING") else log.info("%s", line)
        walk.all()
    return publish(parsed.name, store, ledger, [stage.variant for stage in walk.plan.stages])


def publish(name: str, store: Store, ledger: Ledger, variants: Sequence[str] | None = None) -> Result:
    """Judge a run's rows and write its page, its `result.json`, and a card into every variant's folder."""
    from llmops.report import card, html

    rows = {row["identity"]["variant"]: row for row in ledger.rows(name)}
    ordered = judge([rows[variant] for variant in variants or rows if variant in rows])
    folder = store.folder(name)
    html.write_html(ordered, folder / "report.html", title=name, explained=explained(folder))
    replace_file(folder / "result.json", json.dumps(ordered, indent=1, sort_keys=True, ensure_ascii=False))
    for row in ordered:
        build = store.build(row["identity"]["key"])
        if build.is_dir():
            store.link(name, row["identity"]["variant"], row["identity"]["key"])
            replace_file(build / "README.md", card.card(row, ordered))
        for entry in row["building"].get("shared") or []:
            if entry["what"].startswith("data "):
                store.link_written(name, entry["what"].removeprefix("data "), entry["key"])
    return Result(name, folder, ordered)


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

    def __post_init__(self) -> None:
        self.locks = self.store.locks()

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
            manifest = build(stage, self.plan.recipe, self.store, meter, self.watcher.progress, tell)
        for event in manifest["events"]:
            log.info("%s: %s", stage.variant, event)

    def _score(self, stage: Stage, number: int) -> dict[str, Any]:
        _, scorer = self._workbench()
        row = self._row(stage)
        items: dict[str, list[Any]] = {}
        if stage.scored_here:
            with self.watcher.stage(f"[{number}/{len(self.plan.stages)}] score {stage.variant}"):
                items = scorer.score(stage, row, self.rows)
                self._beside_teacher(stage, row)
        self._append(stage, row, {score: [item.as_dict() for item in each] for score, each in items.items()})
        self.store.scored(stage.score_key)
        return row

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
            self._tools = meter, Scorer(self.plan, self.store, self.ledger, meter, self.watcher.progress)
        return self._tools

    def _row(self, stage: Stage) -> dict[str, Any]:
        from llmops.measure.environment import environment

        meter, _ = self._workbench()
        row = self._skeleton(stage)
        manifest = self.store.manifest(stage.key) if stage.variant != "base" else {}
        row["environment"] = environment(meter.device, meter.sensor)
        row["transform"] |= _storage(manifest, self.store.build(stage.key))
        row["parity"] = manifest.get("parity")
        if manifest and not manifest["parity"]["ok"]:
            wrong = "; ".join(f"{check['name']}: {check['detail']}" for check in manifest["parity"]["checks"]
                              if not check["ok"])
            row["status"] = {"state": "broken", "reason": f"not what was built, read back from disk: {wrong}"}
        row["building"] = {**manifest.get("cost", {}), "attempts": manifest.get("attempts") or [],
                           "data": manifest.get("data_report") or {},
                           "loss": manifest.get("loss") or [], "data_sha256": manifest.get("data") or {},
                           **{key: manifest[key] for key in TRAINED if manifest.get(key)},
                           **self._charged(manifest), "chain_energy_j": self._chain_energy(stage).as_dict()}
        row["log"] = {"events": manifest.get("events", [])}
        return row

    def _beside_teacher(self, stage: Stage, row: dict[str, Any]) -> None:
        """After how many tokens a student has paid for itself, its teacher standing there anyway."""
        teacher = self.rows.get(stage.teacher or "")
        if teacher is None or not stage.scored_here or self.plan.recipe.measure is None:
            return
        from llmops.measure.cost import break_even_beside

        assert stage.teacher is not None
        built = self._chain_energy(stage, without=self._line(self.plan.stage(stage.teacher)))
        batch = str(min(self.plan.recipe.measure.batch_sizes))
        row["building"]["break_even_to_teacher_tokens"] = break_even_beside(
            built, row["energy"].get(batch) or {}, (teacher.get("energy") or {}).get(batch) or {},
            teacher_is_base=stage.teacher == "base").as_dict()

    def _line(self, stage: Stage) -> list[str]:
        """Keys of a variant's build and of all that it stands on."""
        keys = [stage.key]
        for name in stage.parents:
            keys += self._line(self.plan.stage(name))
        return keys

    def _charged(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Its energy with its part of what it shares, and what of that is the teacher's."""
        if not manifest:
            return {}
        from llmops.measure.sharing import charged, teacher_cost

        found = {"energy_j": charged(manifest, self._users).as_dict()}
        taught = teacher_cost(manifest, self._users)
        if taught is not None:
            found["teacher_energy_j"] = taught.as_dict()
        return found

    def _users(self, key: str) -> int:
        """How many builds share what lies under that key: those of the plan, and others that have used it."""
        users = {stage.key for stage in self.plan.stages if key in stage.shares}
        for folder in (self.store.signals(key), self.store.written(key)):
            users |= {path.name for path in (folder / "users").glob("*")}
        return len(users)

    def _chain_energy(self, stage: Stage, without: Sequence[str] = ()) -> Quantity:
        """Energy of building this variant and everything it stands on, each build once, the teacher's included.

        without: keys of builds that are not counted, nor what only they stand on.
        """
        from llmops.measure.sharing import charged

        parts, seen, open_keys = [], set(without), [stage.key] if stage.variant != "base" else []
        while open_keys:
            key = open_keys.pop()
            if key in seen or not (self.store.build(key) / "llmops.json").exists():
                continue
            seen.add(key)
            manifest = self.store.manifest(key)
            parts.append(charged(manifest, self._users))
            open_keys += manifest["parent_keys"]
        if not parts:
            return Quantity(0.0, "J", "constant", "nothing is built: this is the model as it came")
        missing = next((part for part in parts if part.value is None), None)
        if missing is not None:
            return Quantity.null("J", missing.method)
        return Quantity(sum(part.value or 0.0 for part in parts), "J", weakest(part.provenance for part in parts),
                        f"sum over {len(parts)} builds; {parts[0].method}", n=len(parts))

    def _skeleton(self, stage: Stage) -> dict[str, Any]:
        recipe = self.plan.recipe
        variant = recipe.variants.get(stage.variant)
        options = variant.options.model_dump(mode="json") if variant is not None else {}
        return {
            "schema": SCHEMA, "goals": goals_body(recipe),
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
        row = {**row, "goals": goals_body(recipe), "identity": {
            **row["identity"], "run": recipe.name, "run_id": self.run_id, "variant": stage.variant,
            "parent": stage.parents[0] if stage.parents else None, "teacher": teacher, "key": stage.key,
            "parent_key": stage.parent_keys[0] if stage.parent_keys else None, "score_key": stage.score_key,
            "recipe_sha256": recipe.sha256, "utc": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "folder": None if stage.variant == "base" else str(Path("store") / stage.key)}}
        row.pop("row_id", None)
        self.rows[stage.variant] = {**row, "row_id": self.ledger.append(row, items)}


def goals_body(recipe: Recipe) -> dict[str, Any]:
    """The goals as a row holds them, so that a verdict needs nothing but rows."""
    def bodies(goals: Mapping[str, Any]) -> dict[str, Any]:
        return {name: goal.model_dump(mode="json", exclude_none=True) for name, goal in goals.items()}

    goals = recipe.goals
    if not (goals.quality or goals.costs or goals.prefer):
        return {}
    return {"quality": bodies(goals.quality), "costs": bodies(goals.costs), "prefer": goals.prefer}


def _done(row: Mapping[str, Any], stage: Stage, recipe: Recipe) -> bool:
    same = row["identity"].get("score_key") == stage.score_key and row["goals"] == goals_body(recipe)
    return same and row["status"]["state"] in ("ok", "broken")


def _bitsandbytes(block: Mapping[str, Any]) -> str | None:
    """For people, what a `quantization_config` of bitsandbytes says."""
    if block.get("quant_method") != "bitsandbytes":
        return None
    if block.get("load_in_8bit"):
        return f"int8 row, LLM.int8 with threshold {block.get('llm_int8_threshold', 6.0):g}"
    double = ", double quantization" if block.get("bnb_4bit_use_double_quant") else ""
    return f"{block.get('bnb_4bit_quant_type', 'fp4')} g64{double}"


def _storage(manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """How the weights lie on disk, and what their zeros are worth."""
    found: dict[str, Any] = {"sparsity_saves": _zeros_save(manifest, folder)}
    config = folder / "config.json"
    if config.exists():
        from llmops.models.embeddings import without_group
        from llmops.models.schemes import stored_as

        body = json.loads(config.read_text(encoding="utf-8"))
        block, embedding = without_group(body.get("quantization_config") or {})
        found["storage_dtype"] = stored_as(block) or _bitsandbytes(block) or body.get("dtype")
        if embedding:
            found["storage_dtype"] += ", embeddings int8" + (" with the head" if len(embedding) > 1 else "")
    record = folder / "base.json"
    if record.exists():
        base = json.loads(record.read_text(encoding="utf-8"))
        found["storage_dtype"] = f"adapter on {base['quant']} g{base['blocksize']}"
    if (folder / "adapter_config.json").exists() and not record.exists():
        below = str(_storage({}, folder.parent / str(manifest.get("parent_key"))).get("storage_dtype"))
        if below.startswith("int"):
            found["storage_dtype"] = f"adapter on {below}"
    return found


def _zeros_save(manifest: Mapping[str, Any], folder: Path) -> str | None:
    """What the single zeros of a variant are worth, those of its ancestors among them; None where there are none."""
    from llmops.methods.prune.options import MASKING

    while manifest:
        if manifest.get("kind") == "prune" and manifest.get("method") in MASKING:
            pattern = manifest.get("options", {}).get("pattern", "unstructured")
            return ("bytes only when compressed on disk, no time" if pattern == "unstructured" else
                    f"bytes only when compressed on disk, time only where a kernel for {pattern} runs it")
        record = folder.parent / str(manifest.get("parent_key")) / "llmops.json"
        manifest = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    return None


def _named(error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"{type(error).__name__}: {first} (the log has the whole story)"


class _log_file:  # noqa: N801 - reads as what it is: `with _log_file(path):`
    """Everything llmops logs, and every Python warning, goes to a file while the block lasts."""

    def __init__(self, path: Path) -> None:
        self.handler = logging.FileHandler(path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def __enter__(self) -> None:
        log.addHandler(self.handler)
        log.setLevel(logging.INFO)
        log.propagate = False

    def __exit__(self, *_: object) -> None:
        log.removeHandler(self.handler)
        self.handler.close()

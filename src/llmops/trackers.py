"""`report_to`: a training told step by step to TensorBoard, Weights & Biases, MLflow or trackio.

A tracker is a function `(Run) -> Told`: it opens the run and gives three functions back. Each imports its package only
when the recipe names it. One that raises is switched off with a note; a training never stops because nobody could be
told. What is told is what the ledger knows too, so nothing is kept here alone.

Names: train/loss, train/grad_norm, train/learning_rate, train/tokens_per_second, train/tokens, energy/joules,
energy/joules_per_token and eval/loss at every optimizer step; after scoring score/ID and cost/NAME once.

No network is needed. TensorBoard writes files; Weights & Biases goes online only with WANDB_API_KEY or WANDB_MODE;
MLflow writes an SQLite file unless MLFLOW_TRACKING_URI names a server; trackio writes its own database (TRACKIO_DIR).
Secrets come from the environment and nowhere else. A build that goes on after it was killed goes on in the same run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError
from llmops.progress import Watcher, log
from llmops.recipe.plan import Stage
from llmops.recipe.schema import Recipe

__all__ = ["METRICS", "PACKAGES", "TRACKERS", "Run", "Sinks", "Told", "check_trackers", "sinks", "summary_of"]

#: what the loop calls a figure -> what trackers call it
METRICS = {"loss": "train/loss", "grad_norm": "train/grad_norm", "learning_rate": "train/learning_rate",
           "tokens_per_s": "train/tokens_per_second", "tokens": "train/tokens", "energy_j": "energy/joules",
           "joules_per_token": "energy/joules_per_token", "held_out_loss": "eval/loss"}
COSTS = {"building_joules": ("building", "energy_j"), "building_seconds": ("building", "wall_s"),
         "building_tokens": ("building", "tokens"), "disk_bytes": ("size", "disk_bytes"),
         "weights_bytes": ("size", "weights_bytes"), "peak_memory_bytes": ("size", "peak_memory_bytes")}
OF_BATCH = {"joules_per_token": "energy", "decode_tokens_per_s": "latency", "first_token_ms_p50": "latency"}


@dataclass(frozen=True)
class Run:
    """A training as a tracker sees it. name: RECIPE/VARIANT; key: that of the build, the same when it goes on."""

    name: str
    key: str
    project: str
    folder: Path
    config: dict[str, Any]


@dataclass(frozen=True)
class Told:
    """An open run: step figures, the figures at the end, and the end itself (whether it went well)."""

    log: Callable[[int, Mapping[str, float]], None]
    summary: Callable[[Mapping[str, float]], None]
    close: Callable[[bool], None]


# ------------------------------------------------------------------------------------------------------- the trackers


def tensorboard(run: Run) -> Told:
    """Event files in FOLDER/tensorboard/VARIANT; steps that a killed attempt wrote after its checkpoint are purged."""
    import json

    from torch.utils.tensorboard import SummaryWriter

    place = str(run.folder / "tensorboard" / run.name.rpartition("/")[2])
    opened: list[Any] = []  # at the first figure: only then is known from which step on to purge
    last = [0]

    def writer(first_step: int | None) -> Any:
        if not opened:
            opened.append(SummaryWriter(place, purge_step=first_step))  # type: ignore[no-untyped-call]
            opened[0].add_text("config", f"```json\n{json.dumps(run.config, indent=1)}\n```", first_step or 0)
        return opened[0]

    def tell(step: int, figures: Mapping[str, float]) -> None:
        last[0] = step
        for name, value in figures.items():
            writer(step).add_scalar(name, value, step)

    def summary(figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            writer(None).add_scalar(name, value, last[0])

    def close(ok: bool) -> None:
        for each in opened:
            each.close()

    return Told(tell, summary, close)


def wandb(run: Run) -> Told:
    """One run with the build's key as its id; offline in FOLDER/wandb unless the environment gives a key or a mode."""
    import wandb as package

    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    run.folder.mkdir(parents=True, exist_ok=True)
    opened = package.init(project=run.project, name=run.name, id=run.key[:32], resume="allow", mode=mode,
                          dir=str(run.folder), config=run.config,
                          settings=package.Settings(silent=True, console="off", x_disable_stats=True))

    def summary(figures: Mapping[str, float]) -> None:
        opened.summary.update(dict(figures))

    return Told(lambda step, figures: opened.log(dict(figures), step=step), summary,
                lambda ok: opened.finish(exit_code=0 if ok else 1))


def mlflow(run: Run) -> Told:
    """One run in the experiment PROJECT, found again by its tag `llmops.key`; steps are sent every few seconds."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
    run.folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(run.project)
    where = experiment.experiment_id if experiment is not None else client.create_experiment(
        run.project, artifact_location=(run.folder / "mlflow-artifacts").as_uri()
        if not os.environ.get("MLFLOW_TRACKING_URI") else None)
    known = client.search_runs([where], f"tags.`llmops.key` = '{run.key}'", max_results=1)
    opened = known[0].info.run_id if known else client.create_run(
        where, run_name=run.name, tags={"llmops.key": run.key}).info.run_id
    if not known:
        client.log_batch(opened, params=[Param(key, str(value)[:500]) for key, value in run.config.items()])
    waiting: list[Any] = []
    sent, last = [time.monotonic()], [0]

    def send() -> None:
        while waiting:
            client.log_batch(opened, metrics=waiting[:900])  # the protocol takes a thousand
            del waiting[:900]
        sent[0] = time.monotonic()

    def tell(step: int, figures: Mapping[str, float]) -> None:
        last[0] = step
        waiting.extend(Metric(name, value, int(time.time() * 1000), step) for name, value in figures.items())
        if time.monotonic() - sent[0] > 5:
            send()

    def close(ok: bool) -> None:
        send()
        client.set_terminated(opened, "FINISHED" if ok else "FAILED")

    return Told(tell, lambda figures: tell(last[0], figures), close)


def trackio(run: Run) -> Told:
    """One run in the project, in trackio's own local database; what it prints goes into the log."""
    with _printed():
        import trackio as package

        opened = package.init(project=run.project, name=run.name, config=run.config, resume="allow", embed=False,
                              auto_log_gpu=False, auto_log_cpu=False)
    last = [0]

    def tell(step: int, figures: Mapping[str, float]) -> None:
        last[0] = step
        opened.log(dict(figures), step=step)

    def close(ok: bool) -> None:
        with _printed():
            package.finish()  # the run's own finish() would be called once more when Python ends

    return Told(tell, lambda figures: tell(last[0], figures), close)


TRACKERS: dict[str, Callable[[Run], Told]] = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow,
                                              "trackio": trackio}
#: packages that each of them needs
PACKAGES = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy"),
            "trackio": ("trackio",)}


@contextmanager
def _printed() -> Iterator[None]:
    """What a package prints goes into the log, line by line: standard output is not its place."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in filter(str.strip, said.getvalue().splitlines()):
            log.info("%s", line.strip())


# ------------------------------------------------------------------------------------------------------ all at once


def check_trackers(recipe: Recipe) -> None:
    """Raises LlmopsError when a package that `report_to` needs is not installed. Nothing is imported."""
    for name in recipe.report_to:
        lost = [package for package in PACKAGES[name] if find_spec(package) is None]
        if lost:
            raise LlmopsError(f"report_to names {name}, and the package {lost[0]} is not installed; expected it: "
                              f'pip install "llmops[{name}]", or take {name} out of report_to')


@dataclass
class Sinks:
    """Everybody who hears of one training. `log` is what the loop calls; `summary` what the runner calls at the end.

    One that raises is let go, with a note to the reader.
    """

    watcher: Watcher
    told: dict[str, Told] = field(default_factory=dict)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of an optimizer step, as `train.Hooks.log` gives them."""
        self.watcher.log(step, figures)
        if self.told:
            named = {METRICS.get(name, name): value for name, value in figures.items()}
            self._each(lambda told: told.log(step, named))

    def summary(self, row: Mapping[str, Any]) -> None:
        """Scores and costs of the finished row."""
        self._each(lambda told: told.summary(summary_of(row)))

    def open(self, name: str, run: Run) -> None:
        self._try(name, lambda: self.told.update({name: TRACKERS[name](run)}))

    def close(self, ok: bool) -> None:
        self._each(lambda told: told.close(ok))
        self.told.clear()

    def _each(self, tell: Callable[[Told], None]) -> None:
        for name, told in list(self.told.items()):
            self._try(name, lambda told=told: tell(told))  # type: ignore[misc]

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a foreign package may raise anything, and the training matters more
            self.told.pop(name, None)
            first = (str(error).strip().splitlines() or ["no message"])[0]
            self.watcher.note(f"  {name} is told nothing more: {type(error).__name__}: {first}")


@contextmanager
def sinks(recipe: Recipe, stage: Stage, watcher: Watcher, folder: Path) -> Iterator[Sinks]:
    """Whoever hears of `stage`: the watcher, and for a stage that trains every tracker that the recipe names.

    folder: runs/NAME; trackers write below it, unless `tracking.folder` names another place.
    """
    found = Sinks(watcher)
    variant = recipe.variants.get(stage.variant)
    if variant is not None and stage.kind in ("finetune", "distill"):
        place = recipe.base_dir / recipe.tracking.folder if recipe.tracking.folder else folder / "tracking"
        run = Run(f"{recipe.name}/{stage.variant}", str(stage.key), recipe.tracking.project or recipe.name, place,
                  _config(recipe, stage))
        for name in recipe.report_to:
            found.open(name, run)
    ok = False
    try:
        yield found
        ok = True
    finally:
        found.close(ok)


def _config(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The step's options, and what it stands on, flat: `stop.patience` and the like."""
    variant = recipe.variants[stage.variant]
    found: dict[str, Any] = {"model": recipe.model.id, "parent": variant.parent, "seed": recipe.seed,
                             "recipe": recipe.name, "kind": variant.kind, "key": str(stage.key)}
    for name, value in variant.options.model_dump(mode="json").items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            found[name] = value
    return found


def summary_of(row: Mapping[str, Any]) -> dict[str, float]:
    """`score/exact_match/test` and the like, and `cost/...`, of what a row knows."""
    scores = row.get("quality") or {}
    found = {f"score/{score.replace(':', '/')}": body.get("value") for score, body in scores.items()}
    found |= {f"cost/{name}": (row.get(group) or {}).get(key) for name, (group, key) in COSTS.items()}
    for name, group in OF_BATCH.items():
        for batch, body in (row.get(group) or {}).items():
            if batch.isdigit():
                found[f"cost/{name}/batch_{batch}"] = body.get(name)
    plain = {name: (body or {}).get("value") for name, body in found.items()}
    return {name: float(value) for name, value in plain.items() if value is not None}

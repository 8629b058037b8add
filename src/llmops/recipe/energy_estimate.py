"""What the rest of a plan will take in joules, as far as it can be known before it runs.

    work W of a stage, FLOPs    training        k P T; k = 6 (all weights: forward 2, both gradients 4) or 4 (adapters:
                                                no gradient of the weights); + 2 P_teacher T taught; + 2 P T for dpo's
                                                reference
                                calibration     2 P T
                                anything else   2 P: every weight is read and rounded
    scoring, measuring          `scoring_estimate.py`
    energy                      W x r, r = median over earlier rows of joules / W of the same method's builds, of
                                scoring, or of measuring; for want of it of any training, else none

T are likely tokens: rows x epochs x tokens a row, a row of a local file taken as its bytes / 4. A plan's own tokens
(`estimate.py`) are an upper bound, right for memory, and would refuse plans that fit.

Without earlier rows no rate is known. What stays is what no machine of today does better: BEST FLOP a joule, an
accelerator's peak; the figure is then a floor, and a plan that is over its budget even so is refused for sure.

Left out: loading, the teacher's writing of data, harness tasks that lm-eval brings, idle power between windows. They
are metered and count when they happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from llmops.data.locate import locate, named
from llmops.errors import DataError, LlmopsError
from llmops.measure.budget import limits, noted, spent_in_words
from llmops.quantity import Quantity
from llmops.recipe.estimate import row_count
from llmops.recipe.plan import Plan, Stage
from llmops.recipe.schema import BASE, Recipe
from llmops.recipe.scoring_estimate import measuring_flops, scoring_tokens, window_j

__all__ = ["Rest", "check_budget", "energy", "likely_tokens", "rest", "work_of_scoring"]

BEST_FLOP_PER_J = 2.5e12  # dense bf16 at peak over board power; the best accelerators of 2025 reach 2.3e12
BYTES_A_TOKEN = 4.0
BUILTIN_TOKENS_A_ROW = 16.0  # with the chat template; a test holds it against the tokenizer
_TRAINING = ("finetune", "distill")


@dataclass(frozen=True)
class Rest:
    """J of what is left to do, by part ("building", "scoring", "measuring"), and how they came about. floors: what was
    taken at the rate that no machine exceeds; left_out: what is in no part; unknown: why there is no sum."""

    parts: dict[str, float]
    floors: list[str]
    left_out: list[str]
    unknown: str | None = None

    def total(self) -> Quantity:
        if self.unknown is not None:
            return Quantity.null("J", self.unknown)
        if not any(self.parts.values()):
            return Quantity(0.0, "J", "constant", "nothing is left to do")
        told = ", ".join(f"{part} {joules:.3g} J" for part, joules in self.parts.items())
        method = f"{told}: FLOPs x joules a FLOP of earlier rows"
        if self.floors:
            which = ", ".join(self.floors[:3]) + (" ..." if len(self.floors) > 3 else "")
            method = (f"at least: {told}; {which} at the {BEST_FLOP_PER_J:.2g} FLOP/J that no machine exceeds, since "
                      "no earlier row tells the rate")
        if self.left_out:
            method += f"; without {', '.join(dict.fromkeys(self.left_out))}"
        return Quantity(sum(self.parts.values()), "J", "estimated", method)


def energy(plan: Plan, rows: Iterable[Mapping[str, Any]] = ()) -> Quantity:
    """Joules of what is left, estimated; null where a stage's work is not known. rows: of a ledger."""
    return rest(plan, rows).total()


def rest(plan: Plan, rows: Iterable[Mapping[str, Any]] = ()) -> Rest:
    """The same by part."""
    known = list(rows)
    found = Rest({"building": 0.0, "scoring": 0.0, "measuring": 0.0}, [], [])
    for stage in plan.stages:
        if not stage.built:
            work = _work(plan, stage)
            if work.value is None:
                return replace(found, unknown=f"{stage.variant}: {work.method}")
            found.parts["building"] += _joules(work.value, _rate(stage, known), stage.variant, found)
        if stage.scored_here and not stage.scored:
            if stage.estimate.parameters.value is None:
                return replace(found, unknown=f"{stage.variant}: {stage.estimate.parameters.method}")
            scoring, measuring = work_of_scoring(plan, stage, found.left_out)
            found.parts["scoring"] += _joules(scoring, _rate_of("evaluate", known), "scoring", found)
            joules = _joules(measuring, _rate_of("measure", known), "measuring", found)
            options = plan.recipe.measure
            found.parts["measuring"] += max(joules, (window_j(options) or 0.0) if options is not None else 0.0)
    return found


def work_of_scoring(plan: Plan, stage: Stage, left_out: list[str] | None = None) -> tuple[float, float]:
    """FLOPs of scoring and of measuring a stage whose parameters are known. left_out: takes what cannot be told."""
    recipe, parameters = plan.recipe, stage.estimate.parameters.value or 0.0
    tokens, without = scoring_tokens(recipe, stage.variant, likely_tokens)
    if left_out is not None:
        left_out += without
    base = plan.stage(BASE).estimate.parameters.value or parameters
    return (2 * parameters * tokens,
            measuring_flops(recipe.measure, parameters, base) if recipe.measure is not None else 0.0)


def _joules(work: float, rate: float | None, what: str, found: Rest) -> float:
    if work and rate is None and what not in found.floors:
        found.floors.append(what)
    return work * (rate if rate is not None else 1 / BEST_FLOP_PER_J)


def check_budget(plan: Plan, rows: Iterable[Mapping[str, Any]], folder: Path, grid: Quantity | None) -> list[str]:
    """Lines that say how plan and budget compare; [] without a budget. folder: of the run, where tries are noted.

    Raises LlmopsError when what was spent and the estimate of the rest are more than the budget.
    """
    budget = plan.recipe.budget
    if budget is None or all(stage.done for stage in plan.stages):
        return []
    most, said = limits(budget, grid)
    spent, left = noted(folder / "spent"), energy(plan, rows)
    so_far = f"{spent_in_words(spent)} spent by earlier tries" if spent else "nothing spent yet"
    if spent >= most:
        raise LlmopsError(f"{said} is used up: {so_far}; expected a larger budget to go on")
    if left.value is None:
        return [f"WARNING: {said}; {so_far}; what is left to do cannot be estimated ({left.method}): the run stops "
                "when the budget is reached"]
    if spent + left.value > most:
        raise LlmopsError(f"{said} is not enough: {so_far}, and the rest needs {spent_in_words(left.value)} "
                          f"({left.method}); expected a larger budget, fewer variants, or less training, scoring or "
                          "measuring")
    return [f"budget: {said}; {so_far}; the rest needs {spent_in_words(left.value)} ({left.method})"]


def likely_tokens(recipe: Recipe, names: Sequence[str]) -> float | None:
    """Tokens of one pass over these data sources; None where nobody knows before they are read."""
    total = 0.0
    for name in names:
        rows, _ = row_count(name, recipe.data, recipe.base_dir)
        per_row = _tokens_a_row(recipe, name)
        found = rows * per_row if rows is not None and per_row is not None else _whole_file(recipe, name)
        if found is None:
            return None
        total += found
    return total


def _whole_file(recipe: Recipe, name: str) -> float | None:
    """Tokens of a local file that is read whole, whatever its rows."""
    try:
        *derived, root = named(name, recipe.data)
        where = locate(root, recipe.base_dir)
    except (DataError, OSError):
        return None
    cut = any(source.samples is not None or source.split for source in (root, *derived))
    if root.synthesize is not None or cut or where.what != "file" or where.path is None:
        return None
    return where.path.stat().st_size / BYTES_A_TOKEN


def _tokens_a_row(recipe: Recipe, name: str) -> float | None:
    try:
        *_, root = named(name, recipe.data)
        if root.synthesize is not None:
            return None
        where = locate(root, recipe.base_dir)
    except (DataError, OSError):
        return None
    if where.what == "builtin":
        return BUILTIN_TOKENS_A_ROW
    if where.what != "file" or where.path is None:
        return None
    whole, _ = row_count(name, {name: root.model_copy(update={"samples": None, "split": None})}, recipe.base_dir)
    return where.path.stat().st_size / BYTES_A_TOKEN / whole if whole else None


def _work(plan: Plan, stage: Stage) -> Quantity:
    """FLOPs of a stage."""
    recipe, parameters = plan.recipe, stage.estimate.parameters
    variant = recipe.variants[stage.variant]
    if parameters.value is None:
        return Quantity.null("FLOP", parameters.method)
    if stage.kind not in _TRAINING:
        read = stage.estimate.tokens.value or 1.0
        return Quantity(2 * parameters.value * read, "FLOP", "estimated", "2 P T")
    options: Any = variant.options
    tokens = likely_tokens(recipe, options.mixed)
    if tokens is None:
        return Quantity.null("FLOP", "how long its rows are is not known before they are read")
    if options.max_steps is None:
        tokens *= options.epochs
    else:  # whatever the epochs
        rows = sum(row_count(name, recipe.data, recipe.base_dir)[0] or 0 for name in options.mixed)
        batch = options.batch_tokens or options.batch_size * tokens / max(1, rows)
        tokens = options.max_steps * options.accumulate * batch
    per_token = (6.0 if variant.method in ("full", "logits") and getattr(options, "rank", None) is None else 4.0
                 ) * parameters.value
    if variant.method == "dpo":
        per_token += 2 * parameters.value
    if stage.teacher is not None:
        per_token += 2 * (plan.stage(stage.teacher).estimate.parameters.value or 0.0)
    return Quantity(per_token * tokens, "FLOP", "estimated", "k P T")


def _rate(stage: Stage, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Joules a FLOP of earlier builds: of the same method, else for a training of any training."""
    same = _rates(rows, lambda transform: (transform.get("kind"), transform.get("method")) == (stage.kind,
                                                                                              stage.method))
    found = same or (_trained(rows) if stage.kind in _TRAINING else [])
    return median(found) if found else None


def _rate_of(part: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Joules a FLOP of earlier scoring ("evaluate") or measuring ("measure"), else of any training."""
    found = []
    for row in rows:
        building = row.get("building") or {}
        joules, work = ((building.get(f"{part}_{name}") or {}).get("value") for name in ("energy_j", "flops"))
        if joules and work:
            found.append(joules / work)
    found = found or _trained(rows)
    return median(found) if found else None


def _trained(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return _rates(rows, lambda transform: transform.get("kind") in _TRAINING)


def _rates(rows: Sequence[Mapping[str, Any]], fits: Callable[[Mapping[str, Any]], bool]) -> list[float]:
    """Joules a FLOP of the builds whose step fits."""
    found = []
    for row in rows:
        joules = ((row.get("building") or {}).get("energy_j") or {}).get("value")
        if joules and fits(row.get("transform") or {}) and (work := _done(row)):
            found.append(joules / work)
    return found


def _done(row: Mapping[str, Any]) -> float | None:
    """FLOPs of what a row tells of, by the formulas above."""
    building = row["building"]
    flops = (building.get("flops") or {}).get("value")
    if flops:
        return float(flops)
    parameters = ((row.get("size") or {}).get("parameters") or {}).get("value")
    tokens = (building.get("tokens") or {}).get("value")
    return 2.0 * parameters * max(1.0, tokens or 0.0) if parameters else None

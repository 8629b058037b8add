"""What the rest of a plan will take in joules, as far as it can be known before it runs.

    work W of a stage, FLOPs    training        k P T; k = 6 (all weights: forward 2, both gradients 4) or 4 (adapters:
                                                no gradient of the weights); + 2 P_teacher T taught; + 2 P T for dpo's
                                                reference
                                calibration     2 P T
                                anything else   2 P: every weight is read and rounded
    energy                      W x r, r = median over earlier rows of (joules of building) / W of the same method, else
                                of any training, else none

T are likely tokens: rows x epochs x tokens a row, a row of a local file taken as its bytes / 4. A plan's own tokens
(`estimate.py`) are an upper bound, right for memory, and would refuse plans that fit.

Without earlier rows no rate is known. What stays is what no machine of today does better: BEST FLOP a joule, an
accelerator's peak; the figure is then a floor, and a plan that is over its budget even so is refused for sure.

Left out: scoring and measuring, loading, the teacher's writing of data. They are metered and count when they happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from llmops.data.locate import locate, named
from llmops.errors import DataError, LlmopsError
from llmops.measure.budget import limits, noted, spent_in_words
from llmops.quantity import Quantity
from llmops.recipe.estimate import row_count
from llmops.recipe.plan import Plan, Stage
from llmops.recipe.schema import Recipe

__all__ = ["check_budget", "energy", "likely_tokens"]

BEST_FLOP_PER_J = 2.5e12  # dense bf16 at peak over board power; the best accelerators of 2025 reach 2.3e12
BYTES_A_TOKEN = 4.0
BUILTIN_TOKENS_A_ROW = 16.0  # with the chat template; a test holds it against the tokenizer
_TRAINING = ("finetune", "distill")


def energy(plan: Plan, rows: Iterable[Mapping[str, Any]] = ()) -> Quantity:
    """Joules of the builds that are left, estimated; null where a stage's work is not known. rows: of a ledger."""
    left = [stage for stage in plan.stages if not stage.built]
    if not left:
        return Quantity(0.0, "J", "constant", "nothing is left to build")
    known = list(rows)
    total, floors = 0.0, []
    for stage in left:
        work = _work(plan, stage)
        if work.value is None:
            return Quantity.null("J", f"{stage.variant}: {work.method}")
        rate = _rate(stage, known)
        if rate is None:
            floors.append(stage.variant)
        total += work.value * (rate if rate is not None else 1 / BEST_FLOP_PER_J)
    method = f"FLOPs of {len(left)} builds x joules a FLOP of earlier ones; without scoring and measuring"
    if floors:
        which = ", ".join(floors[:3]) + (" ..." if len(floors) > 3 else "")
        method = (f"at least: FLOPs of {len(left)} builds, {which} at the "
                  f"{BEST_FLOP_PER_J:.2g} FLOP/J that no machine exceeds, since no earlier build tells the rate")
    return Quantity(total, "J", "estimated", method)


def check_budget(plan: Plan, rows: Iterable[Mapping[str, Any]], folder: Path, grid: Quantity | None) -> list[str]:
    """Lines that say how plan and budget compare; [] without a budget. folder: of the run, where tries are noted.

    Raises LlmopsError when what was spent and the estimate of the rest are more than the budget.
    """
    budget = plan.recipe.budget
    if budget is None or all(stage.done for stage in plan.stages):
        return []
    most, said = limits(budget, grid)
    spent, rest = noted(folder / "spent"), energy(plan, rows)
    so_far = f"{spent_in_words(spent)} spent by earlier tries" if spent else "nothing spent yet"
    if spent >= most:
        raise LlmopsError(f"{said} is used up: {so_far}; expected a larger budget to go on")
    if rest.value is None:
        return [f"WARNING: {said}; {so_far}; what is left to do cannot be estimated ({rest.method}): the run stops "
                "when the budget is reached"]
    if spent + rest.value > most:
        raise LlmopsError(f"{said} is not enough: {so_far}, and the rest needs {spent_in_words(rest.value)} "
                          f"({rest.method}); expected a larger budget, fewer variants, or less training")
    return [f"budget: {said}; {so_far}; the rest needs {spent_in_words(rest.value)} ({rest.method})"]


def likely_tokens(recipe: Recipe, names: Sequence[str]) -> float | None:
    """Tokens of one pass over these data sources; None where nobody knows before they are read."""
    total = 0.0
    for name in names:
        rows, _ = row_count(name, recipe.data, recipe.base_dir)
        per_row = _tokens_a_row(recipe, name)
        if rows is None or per_row is None:
            return None
        total += rows * per_row
    return total


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
    same, trained = [], []
    for row in rows:
        building, transform = row.get("building") or {}, row.get("transform") or {}
        joules = (building.get("energy_j") or {}).get("value")
        work = _done(row)
        if not joules or not work:
            continue
        if (transform.get("kind"), transform.get("method")) == (stage.kind, stage.method):
            same.append(joules / work)
        if transform.get("kind") in _TRAINING:
            trained.append(joules / work)
    found = same or (trained if stage.kind in _TRAINING else [])
    return median(found) if found else None


def _done(row: Mapping[str, Any]) -> float | None:
    """FLOPs of what a row tells of, by the formulas above."""
    building = row["building"]
    flops = (building.get("flops") or {}).get("value")
    if flops:
        return float(flops)
    parameters = ((row.get("size") or {}).get("parameters") or {}).get("value")
    tokens = (building.get("tokens") or {}).get("value")
    return 2.0 * parameters * max(1.0, tokens or 0.0) if parameters else None

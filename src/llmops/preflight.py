"""Everything that can be refused before a weight is loaded, once a run has work to do.

The recipe has been validated by then; this reads the data itself: rows that cannot be read, training rows that stand in
a scored split, a template that drops the terminator, rows with nothing to train on. Found here they cost a second
(exit 2, nothing done); found by the step they would cost the steps before it.
"""

from __future__ import annotations

from llmops.data.sources import Rows, load_rows
from llmops.errors import DataError
from llmops.methods.finetune.options import Training
from llmops.models.builtin import locate
from llmops.recipe.plan import Plan

__all__ = ["KINDS", "preflight"]

#: the kinds of rows each score can read
KINDS = {"exact_match": ("messages", "prompt_completion"), "multiple_choice": ("choices",)}


def preflight(plan: Plan) -> list[str]:
    """Check the data of every stage that is not done; returns a line for each training set, for the log.

    Raises DataError, ModelError when the tokenizer cannot be loaded.
    """
    recipe, loaded = plan.recipe, dict[str, Rows]()

    def rows(name: str) -> Rows:
        if name not in loaded:
            loaded[name] = load_rows(name, recipe.data, recipe.base_dir, recipe.seed)
        return loaded[name]

    scored = []
    for entry in recipe.evaluate:
        name = getattr(entry.options, "data", None)
        if name is None:
            continue
        scored.append(rows(name))
        kinds = KINDS.get(entry.metric)
        if kinds is not None and rows(name).kind not in kinds:
            raise DataError(f'{entry.id}: data "{name}" holds rows of kind {rows(name).kind}; {entry.metric} needs '
                            f"{' or '.join(kinds)}; rename its columns with `columns:`, or name other data")
    trained = {variant.options.data: variant.options for stage in plan.stages if not stage.built
               for variant in [recipe.variants[stage.variant]] if isinstance(variant.options, Training)}
    return [_check_training(plan, rows(name), scored, options) for name, options in trained.items()]


def _check_training(plan: Plan, rows: Rows, scored: list[Rows], options: Training) -> str:
    from llmops.data.leak import check_leak
    from llmops.data.render import encode
    from llmops.models.load import load_tokenizer

    recipe = plan.recipe
    for test in scored:
        check_leak(rows, test)
    tokenizer = load_tokenizer(locate(recipe.model.id, recipe.base_dir), revision=recipe.model.revision,
                               trust_remote_code=recipe.model.trust_remote_code)
    report = encode(rows, tokenizer, max_length=options.max_length, limits=recipe.data[rows.name].limits).report
    return f"data {rows.name}: " + ", ".join(f"{count:,} {what}" for what, count in report.items() if count)

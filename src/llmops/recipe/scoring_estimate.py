"""The work of scoring and measuring a variant, in FLOPs, before it runs. For the plan's energy, not for a figure.

    scoring     2 P T       T: likely tokens of what is evaluated, and of the comparison of distributions
    measuring   2 arms x repeats x sum over batch sizes of B (prefills alone: prompt, then requests: prompt + new)
                x 2 P of the arm, once each; blocks that repeat to last `window_s` take longer (`window_j`)

Likely tokens of a score over its data's D (`energy_estimate.likely_tokens`): exact_match D (prompt and answer once);
multiple_choice CHOICES x D at most (a row holds all its choices, each is run with the whole question); preference
PREFERENCE x D (the prompt twice); perplexity D, or max_tokens, times context / stride where windows overlap. Harness
tasks of one's own over local files by `harness_estimate.py`; those that lm-eval brings have data whose length nobody
knows before: they are left out, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmops.evaluate.options import Evaluation
from llmops.measure.options import MeasureOptions
from llmops.recipe.harness_estimate import harness_tokens
from llmops.recipe.schema import BASE, Recipe

__all__ = ["measuring_flops", "scoring_tokens", "window_j"]

CHOICES, PREFERENCE = 4.0, 1.5
COMPARED_TOKENS = 8192.0  # of two variants' distributions (`llmops.score`)
Likely = Callable[[Recipe, Sequence[str]], float | None]


def scoring_tokens(recipe: Recipe, variant: str, likely: Likely) -> tuple[float, list[str]]:
    """(tokens that go through the model, what is left out and why)."""
    total, left_out, text = 0.0, [], False
    for entry in recipe.evaluate:
        if entry.metric == "harness":
            tasks = harness_tokens(entry.options, recipe.base_dir)
            total += sum(tokens or 0.0 for tokens in tasks.values())
            left_out += [f"harness:{task} (lm-eval brings its data)" for task in tasks if tasks[task] is None]
            continue
        found = likely(recipe, [entry.options.data])
        if found is None:
            left_out.append(f"{entry.id} (how long its rows are is not known before they are read)")
            continue
        total += _tokens(entry, found)
        text = text or entry.metric != "multiple_choice"
    if text and variant != BASE:  # beside its parent and the base, which run as well
        total += COMPARED_TOKENS * (3 if recipe.variants[variant].parent == BASE else 4)
    return total, left_out


def _tokens(entry: Evaluation, data: float) -> float:
    options = entry.options
    if entry.metric == "perplexity":
        seen = min(data, options.max_tokens) if options.max_tokens else data
        return seen * (options.context / options.stride if options.stride else 1.0)
    return data * {"multiple_choice": CHOICES, "preference_accuracy": PREFERENCE}.get(entry.metric, 1.0)


def measuring_flops(options: MeasureOptions, parameters: float, base: float) -> float:
    """FLOPs of every block of both arms, once; parameters, base: of the variant and of what it is measured beside."""
    once = sum(options.batch_sizes) * (2 * options.prompt_tokens + options.new_tokens)
    return 2.0 * (parameters + base) * options.repeats * once


def window_j(options: MeasureOptions) -> float | None:
    """Joules that the windows take at least, where watts are declared and windows have a length; else None."""
    if options.watts is None:
        return None
    windows = 2 * 2 * options.repeats * len(options.batch_sizes)
    idle = 2 * (options.idle_s if options.idle_s is not None else 0.0)
    return options.watts * (windows * options.window_s + idle)

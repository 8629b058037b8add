"""What a variant is worth: accuracy, perplexity, harness tasks, and paired comparison of two variants' items.

    score.py            Item and Score, what every evaluator returns
    exact_match.py      greedy answers against reference answers
    multiple_choice.py  log-likelihood of every choice
    preference_accuracy.py  which of two answers is the likelier
    perplexity.py       the windows of the GPTQ and Wanda papers, and sliding ones
    harness.py          tasks of lm-evaluation-harness
    statistics.py       intervals, paired bootstrap, exact McNemar, flips
    tokens.py           KL, same-top-token rate and RMS delta p of two live models
    live.py             facts about a loaded model and tokenizer that the others share

An evaluator is `f(model, tokenizer, rows, options, *, id, seed, progress) -> list[Score]`. It never changes the model,
its config or the tokenizer. Every score keeps its items, each with the hash of exactly what the model was shown, so
that two variants can be compared question by question; and scores of different questions never are.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["EVALUATORS", "Evaluator"]

Evaluator = Callable[..., list[Any]]


def _evaluator(module: str) -> Evaluator:
    """`evaluate` of a module of this room, imported (with torch behind it) at the first call."""

    def evaluate(model: Any, tokenizer: Any, rows: Any, options: Any, *, id: str, seed: int = 0,
                 progress: Callable[[int, int], None] | None = None) -> list[Any]:
        run: Evaluator = import_module(f"llmops.evaluate.{module}").evaluate
        return run(model, tokenizer, rows, options, id=id, seed=seed, progress=progress)

    return evaluate


EVALUATORS: dict[str, Evaluator] = {
    "exact_match": _evaluator("exact_match"),
    "multiple_choice": _evaluator("multiple_choice"),
    "preference_accuracy": _evaluator("preference_accuracy"),
    "perplexity": _evaluator("perplexity"),
    "harness": _evaluator("harness"),
}

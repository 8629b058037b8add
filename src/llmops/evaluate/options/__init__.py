"""Options of the scores, a module each, imported when one is first asked for.

A recipe is read without the models of the scores that it does not name: another score costs it no start-up time.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmops.options import Models

if TYPE_CHECKING:
    from llmops.evaluate.options.exact_match import ExactMatch
    from llmops.evaluate.options.harness import Harness
    from llmops.evaluate.options.multiple_choice import MultipleChoice
    from llmops.evaluate.options.perplexity import Perplexity
    from llmops.evaluate.options.preference_accuracy import PreferenceAccuracy

__all__ = ["EVALUATIONS", "Evaluation", "ExactMatch", "Harness", "MultipleChoice", "Perplexity", "PreferenceAccuracy"]

_HOMES = {"ExactMatch": "exact_match", "MultipleChoice": "multiple_choice", "PreferenceAccuracy": "preference_accuracy",
          "Perplexity": "perplexity", "Harness": "harness"}

EVALUATIONS = Models(__name__, {
    "exact_match": "ExactMatch", "multiple_choice": "MultipleChoice", "preference_accuracy": "PreferenceAccuracy",
    "perplexity": "Perplexity", "harness": "Harness"})


@dataclass(frozen=True)
class Evaluation:
    """One entry of the `evaluate` list: the metric, one of EVALUATIONS, and its options."""

    metric: str
    options: Any

    @property
    def id(self) -> str:
        """`exact_match:test`, or `harness:arc_easy+hellaswag`: the score's name in rows and goals."""
        return f"{self.metric}:{'+'.join(self.options.tasks) if self.metric == 'harness' else self.options.data}"



def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

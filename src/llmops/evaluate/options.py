"""Options of the scores."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from llmops.options import Options

__all__ = ["EVALUATIONS", "Evaluation", "ExactMatch", "Harness", "MultipleChoice", "Perplexity",
           "PreferenceAccuracy"]


class ExactMatch(Options):
    """Greedy answer, normalised, equal to the reference."""

    data: str = Field(description="name of the data with prompts and answers")
    max_new_tokens: int = Field(32, ge=1, description="tokens an answer may have")
    normalize: bool = Field(True, description="compare without case, punctuation, articles and surplus spaces")
    extract: str | None = Field(None, description="regular expression; its first group is the answer, on both sides")
    batch_size: int = Field(64, ge=1)

    @field_validator("extract")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression ({error}); expected one whose first group is the "
                             "answer, as '#### (.+)'") from error
        return value


class MultipleChoice(Options):
    """The choice with the highest log-likelihood is the right one."""

    data: str = Field(description="name of the data with question, choices, answer")
    length_normalized: bool = Field(False, description="divide a choice's log-likelihood by its bytes (acc_norm)")
    batch_size: int = Field(64, ge=1)


class PreferenceAccuracy(Options):
    """The better of two answers is the likelier one."""

    data: str = Field(description="name of the data with prompt, chosen, rejected")
    length_normalized: bool = Field(False, description="divide an answer's log-probability by its tokens; summed ones "
                                                       "favour short answers")
    batch_size: int = Field(64, ge=1)


class Perplexity(Options):
    """exp of the mean next-token loss. Without a stride: the windows of the GPTQ and Wanda papers."""

    data: str = Field(description="name of the data with text")
    context: int = Field(2048, ge=8, description="tokens a window holds (at most the model's context)")
    stride: int | None = Field(None, ge=1, description="sliding windows that start this many tokens apart; "
                                                       "default: windows do not overlap")
    separator: Literal["blank_line", "eos"] = Field("blank_line", description="what stands between documents: an empty "
                                                    "line, as in the papers, or the tokenizer's end token")
    max_tokens: int | None = Field(None, ge=16, description="score at most this many tokens")
    batch_size: int = Field(8, ge=1)


class Harness(Options):
    """Tasks of lm-evaluation-harness (the `harness` extra)."""

    tasks: list[str] = Field(min_length=1, description="task names, known to lm-eval or defined under `include`")
    include: str | None = Field(None, description="folder with task YAML files, beside the recipe")
    shots: int | None = Field(None, ge=0, description="examples in the prompt; default: what the task says, else 0")
    metric: str | None = Field(None, description="the metric kept, as acc_norm; default: the first the task names")
    chat: bool = Field(False, description="put the prompts through the model's chat template")
    limit: int | None = Field(None, ge=1, description="items a task")
    batch_size: int = Field(16, ge=1)


EVALUATIONS: dict[str, type[Options]] = {
    "exact_match": ExactMatch, "multiple_choice": MultipleChoice, "preference_accuracy": PreferenceAccuracy,
    "perplexity": Perplexity, "harness": Harness}


class Evaluation(Options):
    """One entry of the `evaluate` list: a mapping with a single key, the metric."""

    exact_match: ExactMatch | None = None
    multiple_choice: MultipleChoice | None = None
    preference_accuracy: PreferenceAccuracy | None = None
    perplexity: Perplexity | None = None
    harness: Harness | None = None

    @property
    def metric(self) -> str:
        return next(name for name in EVALUATIONS if getattr(self, name) is not None)

    @property
    def options(self) -> ExactMatch | MultipleChoice | PreferenceAccuracy | Perplexity | Harness:
        options: ExactMatch | MultipleChoice | PreferenceAccuracy | Perplexity | Harness = getattr(self, self.metric)
        return options

    @property
    def id(self) -> str:
        """`exact_match:test`, or `harness:arc_easy+hellaswag`: the score's name in rows and goals."""
        options = self.options
        return f"{self.metric}:{'+'.join(options.tasks) if isinstance(options, Harness) else options.data}"

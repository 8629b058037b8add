"""Answers that the student draws itself, for its teacher to judge (Agarwal et al. 2024, GKD, algorithm 1).

A student that only ever reads the answers of others never meets the states that its own mistakes lead to. So for a
share of the rows the answer is drawn from the student as it is now, the teacher says what it would have said at each of
its tokens, and the divergence is taken there. No gradient goes through the drawing. Each row decides for itself
(lambda, the fraction), where the paper decides for a whole batch: the same in expectation, and less noisy.

Which rows draw, and what, follows from the random numbers of the step, which the loop seeds: a killed run that goes on
draws the same. Drawn answers have another number of tokens than those of the data; the sum of the loss is scaled by the
one over the other, so that a pass counts as the data said and its loss is the mean over the tokens that are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmops.data.render import collate
from llmops.errors import StepError
from llmops.evaluate.exact_match import greedy
from llmops.evaluate.live import context_limit, stop_ids
from llmops.methods.distill.options import OnPolicy
from llmops.models.packed_rows import evaluating, pack, with_attention
from llmops.train.rows import IGNORED, to_device

__all__ = ["Drawn", "drawer", "examples_of"]

MOST_EMPTY = 32  # drawn answers in a row that may hold nothing but their end


@dataclass
class Drawn:
    """Puts drawn answers into batches; counts what it drew. attention: the student's own, which knows a cache."""

    options: OnPolicy
    stops: set[int]
    pad: int
    vocabulary: int
    attention: str
    drawn: int = 0
    tokens: int = 0
    empty: int = 0
    _empty_now: int = field(default=0, repr=False)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch with new answers in a share of its rows. Raises StepError when the student says nothing at all."""
        examples = examples_of(batch)
        chosen = (torch.rand(len(examples)) < self.options.fraction).nonzero()[:, 0].tolist()
        if not chosen:
            return batch
        prompts = [examples[row]["input_ids"][:_answer_begins(examples[row]["labels"])] for row in chosen]
        for row, prompt, answer in zip(chosen, prompts, self._draw(model, prompts), strict=True):
            self._count(answer)
            examples[row] = {"input_ids": [*prompt, *answer], "labels": [*[IGNORED] * len(prompt), *answer]}
        made: dict[str, Any] = pack(examples) if "cu_seq_lens_q" in batch else collate(examples, self.pad)
        if "cu_seq_lens_q" not in batch:
            made["labels"][:, 0] = IGNORED
        return to_device(made, batch["input_ids"].device)

    def event(self) -> str:
        """For the row."""
        return (f"{self.drawn:,} answers of {self.tokens:,} tokens were drawn from the student"
                + (f", {self.empty:,} of them empty" if self.empty else ""))

    def _draw(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        room = self.options.max_new_tokens
        limit = context_limit(model)
        if limit is not None:
            room = min(room, limit - max(map(len, prompts)))
        if room < 1:
            raise StepError(f"on_policy: a prompt of {max(map(len, prompts)):,} tokens fills the student's context of "
                            f"{limit:,}, so that it can say nothing; expected room for an answer: leave such rows out "
                            "of the data")

        def choose(logits: Tensor) -> Tensor:
            p = (logits[:, :self.vocabulary].float() / self.options.temperature).softmax(-1)
            return torch.multinomial(p, 1)[:, 0]

        with torch.no_grad(), evaluating(model), with_attention(model, self.attention):
            return greedy(model, prompts, stops=self.stops, pad=self.pad, max_new_tokens=room, choose=choose)

    def _count(self, answer: Sequence[int]) -> None:
        self.drawn += 1
        self.tokens += len(answer)
        nothing = not answer or answer[0] in self.stops
        self.empty += nothing
        self._empty_now = self._empty_now + 1 if nothing else 0
        if self._empty_now >= MOST_EMPTY:
            raise StepError(f"on_policy: the last {MOST_EMPTY} answers drawn from the student were empty, it ends them "
                            "with their first token; expected a student that answers: train it on answers first (a "
                            "distill step without on_policy as its parent), or lower `fraction` or the learning rate")


def drawer(student: nn.Module, tokenizer: Any, options: OnPolicy, vocabulary: int, attention: str) -> Drawn:
    """What draws for this student. vocabulary: ids that the tokenizer knows."""
    return Drawn(options, stop_ids(student, tokenizer), tokenizer.pad_token_id or 0, vocabulary, attention)


def examples_of(batch: Mapping[str, Tensor]) -> list[dict[str, list[int]]]:
    """The rows of a packed or a right-padded batch again, padding apart."""
    starts = batch.get("cu_seq_lens_q")
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if starts is not None:
        ends = starts.tolist()
        return [{"input_ids": ids[0][first:last], "labels": labels[0][first:last]}
                for first, last in zip(ends, ends[1:], strict=False)]
    lengths = batch["attention_mask"].sum(-1).tolist()
    return [{"input_ids": ids[row][:length], "labels": labels[row][:length]} for row, length in enumerate(lengths)]


def _answer_begins(labels: Sequence[int]) -> int:
    """Where the last stretch of trained tokens begins: the answer to all that stands before it."""
    end = max(place for place, label in enumerate(labels) if label != IGNORED)
    while end > 0 and labels[end - 1] != IGNORED:
        end -= 1
    return end

"""The questions of a score again, as token ids: what an item stood for, found by its hash.

A ledger keeps what was answered and the hash of what was shown, not the text. `questions` makes the text and the ids
anew from the data, by the very functions that scored them; an item whose hash is not among them was of other data, and
the caller says so. Harness tasks have lm-eval make their prompts again (`harness_replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmops.data.options import Limits
from llmops.data.pairs import encode_pairs
from llmops.data.render import prompts_and_answers
from llmops.data.sources import Rows
from llmops.data.stream import owned_stream
from llmops.evaluate import multiple_choice, preference_accuracy
from llmops.evaluate.exact_match import greedy
from llmops.evaluate.live import context_limit, item_id, scoring, stop_ids
from llmops.evaluate.perplexity import parts_of, windows

__all__ = ["REPLAYED", "Question", "answered", "questions"]

WHOLE = 1 << 40  # a length that nothing is cut to


@dataclass(frozen=True)
class Question:
    """What was shown. answers: the ids of every answer that could be given, by its text; empty where the model writes
    it itself (`answered` does so again). prompts: of answers that each have another one before them. until, most: texts
    that end a written answer, and its most tokens; None: those of the score's options."""

    id: str
    text: str
    prompt: list[int]
    answers: Mapping[str, list[int]]
    prompts: Mapping[str, list[int]] = field(default_factory=dict)
    until: Sequence[str] = ()
    most: int | None = None

    def side(self, answer: str) -> tuple[list[int], list[int]]:
        """(ids before the answer, ids of the answer)."""
        return self.prompts.get(answer, self.prompt), self.answers[answer]


def _exact_match(model: Any, tokenizer: Any, rows: Rows, options: Any) -> list[Question]:
    return [Question(item_id(each.input_ids), each.text, each.input_ids, {})
            for each in prompts_and_answers(rows, tokenizer)]


def _multiple_choice(model: Any, tokenizer: Any, rows: Rows, options: Any) -> list[Question]:
    return [Question(item_id(*(prompt + choice for prompt, choice in each.sequences)), str(each.row["question"]),
                     each.sequences[0][0], {str(text): choice for text, (_, choice)
                                            in zip(each.row["choices"], each.sequences, strict=True)})
            for each in multiple_choice.questions_of(rows, tokenizer)]


def _preference_accuracy(model: Any, tokenizer: Any, rows: Rows, options: Any) -> list[Question]:
    encoded = encode_pairs(rows, tokenizer, max_length=WHOLE, limits=Limits(dropped=1.0))
    found = []
    for chosen, rejected, origin in zip(encoded.chosen, encoded.rejected, encoded.origin, strict=True):
        sides = {name: preference_accuracy.side_of(side) for name, side in (("chosen", chosen), ("rejected", rejected))}
        prompt = rows.rows[origin]["prompt"]
        text = prompt if isinstance(prompt, str) else " | ".join(str(turn.get("content")) for turn in prompt)
        found.append(Question(item_id(*(side.ids for side in sides.values())), text, sides["chosen"].runs[0][0],
                              {name: side.runs[0][1] for name, side in sides.items()}))
    return found


def _perplexity(model: Any, tokenizer: Any, rows: Rows, options: Any) -> list[Question]:
    ids, owners = owned_stream(rows, tokenizer, options.separator)
    ids = ids[:options.max_tokens]
    limit = context_limit(model)
    context = min(options.context, limit) if limit is not None else options.context
    apart = bool(options.slices or options.cluster)
    found = []
    for cut in windows(len(ids), context, options.stride) if len(ids) >= context else []:
        for part in parts_of(cut, owners, apart):
            window, told = ids[cut[0]:cut[1]], ids[part.start if part.whole else part.first:part.end]
            found.append(Question(part.id(window), tokenizer.decode(told), ids[part.start:part.first],
                                  {"": ids[part.first:part.end]}))
    return found


REPLAYED: dict[str, Callable[[Any, Any, Rows, Any], list[Question]]] = {
    "exact_match": _exact_match, "multiple_choice": _multiple_choice, "preference_accuracy": _preference_accuracy,
    "perplexity": _perplexity}


def questions(metric: str, model: Any, tokenizer: Any, rows: Rows, options: Any) -> dict[str, Question]:
    """Every question of a score by its item's id. metric: one of REPLAYED."""
    return {each.id: each for each in REPLAYED[metric](model, tokenizer, rows, options)}


def answered(model: Any, tokenizer: Any, asked: Sequence[Question], options: Any,
             given: Sequence[str] = ()) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) in ids of what `model` answers: its greedy continuation, stop token included; for choices the
    one it is known to have given (`given`, one a question), else the likeliest."""
    if not asked:
        return []
    if all(not question.answers for question in asked):
        most = [question.most or options.max_new_tokens for question in asked]
        with scoring(model):
            written = greedy(model, [question.prompt for question in asked], stops=stop_ids(model, tokenizer),
                             pad=tokenizer.pad_token_id or 0, max_new_tokens=max(most))
        return [(question.prompt, _ended(reply[:length], question.until, tokenizer))
                for question, reply, length in zip(asked, written, most, strict=True)]
    return [question.side(answer if answer in question.answers else _likeliest(model, question))
            for question, answer in zip(asked, given or [""] * len(asked), strict=True)]


def _ended(ids: list[int], until: Sequence[str], tokenizer: Any) -> list[int]:
    """The ids up to the one with which a text of `until` was whole."""
    if not until:
        return ids
    return next((ids[:length] for length in range(1, len(ids) + 1)
                 if any(text in tokenizer.decode(ids[:length]) for text in until)), ids)


def _likeliest(model: Any, question: Question) -> str:
    texts = list(question.answers)
    if len(texts) == 1:
        return texts[0]
    values = multiple_choice.loglikelihoods(model, [question.side(text) for text in texts], batch_size=16)
    return texts[int(torch.tensor(values).nan_to_num(-torch.inf).argmax())]

"""The questions of a score again, as token ids: what an item stood for, found by its hash.

A ledger keeps what was answered and the hash of what was shown, not the text. `questions` makes the text and the ids
anew from the data, by the very functions that scored them; an item whose hash is not among them was of other data, and
the caller says so. Harness tasks are left out: lm-eval makes their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    it itself (exact_match: `answered` fills it in)."""

    id: str
    text: str
    prompt: list[int]
    answers: Mapping[str, list[int]]


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


def answered(model: Any, tokenizer: Any, asked: list[Question], options: Any) -> list[list[int]]:
    """What `model` answers: its greedy continuation in ids, stop token included; for choices those of the likeliest."""
    if not asked:
        return []
    if all(not question.answers for question in asked):
        with scoring(model):
            return greedy(model, [question.prompt for question in asked], stops=stop_ids(model, tokenizer),
                          pad=tokenizer.pad_token_id or 0, max_new_tokens=options.max_new_tokens)
    found = []
    for question in asked:
        texts = list(question.answers)
        pairs = [(question.prompt, question.answers[text]) for text in texts]
        values = torch.tensor(multiple_choice.loglikelihoods(model, pairs, batch_size=16)) if len(texts) > 1 else None
        best = 0 if values is None else int(values.nan_to_num(-torch.inf).argmax())
        found.append(list(question.answers[texts[best]]))
    return found

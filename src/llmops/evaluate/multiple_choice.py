"""Multiple choice: the choice with the highest log-likelihood, given the question, is the model's answer.

    log p(choice | question) = sum_i log p(c_i | q, c_<i)

With a chat template the choice is the assistant's reply to the question, in exactly the tokens a reply is trained in
(templates write spaces and line breaks around content, and tokenizers merge them into words); without one the text is
"question choice". What stands before the choice's first token is the prompt. (lm-eval tokenizes the whole and cuts it
where the prompt alone would have ended; its figures come from the `harness` score.)

`length_normalized` divides by the choice's UTF-8 bytes (lm-eval's acc_norm), which takes the advantage from short
choices. Ties go to the first choice. The reply's end is not scored: a choice that begins another one is not favoured
for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmops.data.chat import has_template
from llmops.data.render import IGNORED, choice_examples
from llmops.data.sources import Rows
from llmops.errors import DataError
from llmops.evaluate.live import (
    accepts,
    batch_rows,
    context_limit,
    device_of,
    dtype_name,
    item_id,
    scoring,
    token_losses,
    tokenizer_sha256,
    vocabulary_size,
)
from llmops.evaluate.options import MultipleChoice
from llmops.evaluate.score import Item, Score
from llmops.evaluate.slices import labels
from llmops.evaluate.statistics import summarize

__all__ = ["Question", "evaluate", "loglikelihoods", "questions_of"]


@dataclass(frozen=True)
class Question:
    """(prompt ids, choice ids) of every choice; `row` is what they were made from."""

    sequences: list[tuple[list[int], list[int]]]
    row: dict[str, Any]


def evaluate(model: Any, tokenizer: Any, rows: Rows, options: MultipleChoice, *, id: str, seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> list[Score]:
    """rows: of kind `choices` (question, choices, answer as an index). The seed is not used: nothing is drawn.

    Raises DataError for rows of another kind, no rows, fewer than two choices, an answer that is no index, a choice
    without tokens, and a question that does not fit the model's context.
    """
    if rows.kind != "choices":
        raise DataError(f'{rows.name}: multiple_choice needs question, choices and answer, not "{rows.kind}"; name '
                        "other data, or give columns that map to them")
    if not rows.rows:
        raise DataError(f"{rows.name}: there is no question to answer; expected at least one row; look at its split")
    questions = questions_of(rows, tokenizer)
    _check_room(model, questions, rows)
    notes = labels([question.row for question in questions], options.slices, options.cluster, rows.name)
    sequences = [sequence for question in questions for sequence in question.sequences]
    found = loglikelihoods(model, sequences, batch_size=options.batch_size, progress=progress)
    items, start = [], 0
    for question, note in zip(questions, notes, strict=True):
        items.append(_item(question, found[start:start + len(question.sequences)], options.length_normalized, note))
        start += len(question.sequences)
    protocol = {"id": "multiple_choice/loglikelihood", "aggregation": "mean",
                "normalization": "bytes" if options.length_normalized else "none",
                "template": "chat" if has_template(tokenizer) else "question, space, choice",
                "dtype": dtype_name(model), "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    how = "most likely choice, by bytes" if options.length_normalized else "most likely choice"
    value, stderr = summarize(items, "mean", "fraction", how)
    return [Score(id, "multiple_choice", True, value, stderr, protocol, items)]


def loglikelihoods(model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int,
                   progress: Callable[[int, int], None] | None = None) -> list[float]:
    """log p(continuation | prompt) in nats of every (prompt ids, continuation ids), in their order.

    Both must hold at least one token. Batches are padded on the right, longest first.
    """
    order = sorted(range(len(sequences)), key=lambda place: -sum(map(len, sequences[place])))
    found = [0.0] * len(sequences)
    vocabulary, done = vocabulary_size(model), 0
    with scoring(model):
        while done < len(order):
            longest = sum(map(len, sequences[order[done]]))
            places = order[done:done + batch_rows(batch_size, longest, vocabulary)]
            for place, value in zip(places, _batch(model, [sequences[place] for place in places]), strict=True):
                found[place] = value
            done += len(places)
            if progress is not None:
                progress(done, len(order))
    return found


def _batch(model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    inputs = [[*prompt, *continuation][:-1] for prompt, continuation in sequences]
    longest = max(map(len, inputs))
    device = device_of(model)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in inputs], device=device)  # (B, T)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in inputs], device=device)
    first = min(len(prompt) for prompt, _ in sequences) - 1  # the earliest position whose logits are needed
    if accepts(model, "logits_to_keep"):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=longest - first).logits
    else:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, first:]
    return [_continuation(logits[row], len(prompt) - 1 - first, continuation)
            for row, (prompt, continuation) in enumerate(sequences)]


def _continuation(logits: Tensor, start: int, continuation: Sequence[int]) -> float:
    """logits: (T, vocabulary), of which the one at `start` predicts the continuation's first token."""
    targets = torch.tensor(list(continuation), device=logits.device)
    return -float(token_losses(logits[start:start + len(continuation)], targets).double().sum())


def questions_of(rows: Rows, tokenizer: Any) -> list[Question]:
    """Every row as prompt and choices in ids. Raises DataError for a row that cannot be asked."""
    for index, row in enumerate(rows.rows):
        choices, answer = row["choices"], row["answer"]
        if len(choices) < 2 or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise DataError(f"{rows.place(index)}: {len(choices)} choices and answer {answer!r}; expected at least "
                            "two, and an index that counts from 0")
        if not row["question"].strip() or not all(str(choice).strip() for choice in choices):
            raise DataError(f"{rows.place(index)}: the question or a choice is empty; expected text in each")
    return [Question([_cut(example) for example in examples], row)
            for row, examples in zip(rows.rows, choice_examples(rows, tokenizer), strict=True)]


def _cut(example: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """The ids before the first labelled token, and the labelled ones."""
    labels = example["labels"]
    first = next(place for place, label in enumerate(labels) if label != IGNORED)
    return example["input_ids"][:first], [label for label in labels[first:] if label != IGNORED]


def _check_room(model: Any, questions: Sequence[Question], rows: Rows) -> None:
    limit = context_limit(model)
    for index, question in enumerate(questions):
        length = max(len(prompt) + len(choice) for prompt, choice in question.sequences)
        if limit is not None and length > limit:
            raise DataError(f"{rows.place(index)}: question and longest choice have {length} tokens, more than the "
                            f"model's {limit} positions; leave such rows out of the data")


def _item(question: Question, found: list[float], by_bytes: bool, note: Mapping[str, Any]) -> Item:
    texts = [str(choice) for choice in question.row["choices"]]
    values = [value / max(1, len(text.encode())) if by_bytes else value
              for value, text in zip(found, texts, strict=True)]
    finite = [place for place, value in enumerate(values) if math.isfinite(value)]
    chosen = max(finite, key=lambda place: values[place]) if finite else None  # a ruined model answers nothing
    answer = question.row["answer"]
    detail = {"expected": texts[answer], "correct": chosen == answer, "choice": chosen,
              "loglikelihoods": [value if math.isfinite(value) else None for value in found], **note}
    return Item(item_id(*(prompt + choice for prompt, choice in question.sequences)), float(chosen == answer),
                texts[chosen] if chosen is not None else "", detail)

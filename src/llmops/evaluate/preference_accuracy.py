"""Preferences: how often the model holds the better of two answers for the likelier one.

    log p(answer | prompt) = sum_i log p(a_i | prompt, a_<i)        chosen wins where its own is strictly higher

The tokens are those that `finetune: {method: dpo}` compares: the answer as the template writes it, with its terminator,
so that an answer which begins the other is not favoured for it. Of an answer of several turns the assistant's are
counted, and what stands between them (a tool's result) is given.

Summed log-probabilities favour short answers: on pairs whose lengths differ a model may score far from a half before it
has learned any preference. `length_normalized` divides by the answer's tokens. What a training moved shows in the
paired comparison with its parent. A tie is not a win. Left out: rewards relative to a reference; this is the model
alone, so every variant of a tree, quantized ones too, is on one scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from llmops.data.chat import has_template
from llmops.data.options import Limits
from llmops.data.pairs import encode_pairs
from llmops.data.render import IGNORED
from llmops.data.sources import Rows
from llmops.errors import DataError
from llmops.evaluate.live import context_limit, dtype_name, item_id, tokenizer_sha256
from llmops.evaluate.multiple_choice import loglikelihoods
from llmops.evaluate.options import PreferenceAccuracy
from llmops.evaluate.score import Item, Score
from llmops.evaluate.slices import labels
from llmops.evaluate.statistics import summarize

__all__ = ["evaluate", "side_of"]

_WHOLE = 1 << 40  # a length that nothing is cut to


@dataclass(frozen=True)
class _Side:
    """One answer. runs: (what stands before, tokens) of every stretch of it, in order."""

    ids: list[int]
    runs: list[tuple[list[int], list[int]]]

    @property
    def tokens(self) -> int:
        return sum(len(run) for _, run in self.runs)


def evaluate(model: Any, tokenizer: Any, rows: Rows, options: PreferenceAccuracy, *, id: str, seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> list[Score]:
    """rows: of kind `preference` (prompt, chosen, rejected). The seed is not used: nothing is drawn.

    Raises DataError for rows of another kind, no rows, a pair whose sides are equal, and one that does not fit the
    model's context.
    """
    if rows.kind != "preference":
        raise DataError(f'{rows.name}: preference_accuracy needs prompt, chosen and rejected, not "{rows.kind}"; name '
                        "other data, or give columns that map to them")
    if not rows.rows:
        raise DataError(f"{rows.name}: there is no pair to compare; expected at least one row; look at its split")
    encoded = encode_pairs(rows, tokenizer, max_length=_WHOLE, limits=Limits(dropped=1.0))
    lost = sorted(set(range(len(rows.rows))) - set(encoded.origin))
    if lost:
        raise DataError(f"{rows.place(lost[0])}: both answers are the same text, or nothing ({len(lost)} such pairs of "
                        f"{len(rows.rows)}); expected two answers that differ; leave such rows out of the data")
    pairs = [(side_of(chosen), side_of(rejected))
             for chosen, rejected in zip(encoded.chosen, encoded.rejected, strict=True)]
    _check_room(model, pairs, rows)
    notes = labels([rows.rows[place] for place in encoded.origin], options.slices, options.cluster, rows.name)
    runs = [run for pair in pairs for side in pair for run in side.runs]
    found = iter(loglikelihoods(model, runs, batch_size=options.batch_size, progress=progress))
    items = [_item(pair, [sum(next(found) for _ in side.runs) for side in pair], options.length_normalized, note)
             for pair, note in zip(pairs, notes, strict=True)]
    protocol = {"id": "preference_accuracy/loglikelihood", "aggregation": "mean",
                "normalization": "tokens" if options.length_normalized else "none", "ties": "wrong",
                "template": "chat" if has_template(tokenizer) else "prompt, answer, end token",
                "dtype": dtype_name(model), "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    how = "chosen answer likelier a token" if options.length_normalized else "chosen answer likelier"
    value, stderr = summarize(items, "mean", "fraction", how)
    return [Score(id, "preference_accuracy", True, value, stderr, protocol, items)]


def side_of(example: Mapping[str, Sequence[int]]) -> _Side:
    """The stretches of an answer that are trained, each with everything before it."""
    ids, labels = list(example["input_ids"]), example["labels"]
    runs = []
    for trained, places in groupby(range(len(ids)), key=lambda place: labels[place] != IGNORED):
        stretch = list(places)
        if trained:
            runs.append((ids[:stretch[0]], ids[stretch[0]:stretch[-1] + 1]))
    return _Side(ids, runs)


def _check_room(model: Any, pairs: Sequence[tuple[_Side, _Side]], rows: Rows) -> None:
    limit = context_limit(model)
    for index, pair in enumerate(pairs):
        length = max(len(side.ids) for side in pair)
        if limit is not None and length > limit:
            raise DataError(f"{rows.place(index)}: prompt and longer answer have {length} tokens, more than the "
                            f"model's {limit} positions; leave such rows out of the data")


def _item(pair: tuple[_Side, _Side], found: list[float], by_tokens: bool, note: Mapping[str, Any]) -> Item:
    """score 1 where the chosen answer is likelier; a ruined model, without finite figures, is right about nothing."""
    values = [value / side.tokens if by_tokens else value for value, side in zip(found, pair, strict=True)]
    finite = all(map(math.isfinite, values))
    right = finite and values[0] > values[1]
    said = ("chosen" if right else "rejected" if values[1] > values[0] else "tie") if finite else ""
    detail = {"expected": "chosen", "correct": right, "margin": values[0] - values[1] if finite else None,
              "loglikelihoods": [value if math.isfinite(value) else None for value in found], **note}
    return Item(item_id(*(side.ids for side in pair)), float(right), said, detail)

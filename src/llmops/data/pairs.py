"""Preferences to pairs of training examples: one prompt, the answer that is preferred, the answer that is not.

Both sides of a pair are tokenized whole, as in `render.py`, and labelled on the answer with its terminator; the prompt
is -100, earlier assistant turns in it too. A comparison of two answers is only sound when nothing but the answers
differs, so

    the prompt gives way   a pair too long for `max_length` loses the left of its prompt (BOS stays), the same on both
                           sides, down to half of `max_length`; both answers stay whole and keep their terminators
    then the answer        one that is longer still is cut at its end. Both are `truncated`, the latter counted apart
                           as `answers_cut`
    nothing left to compare   a pair of equal sides, and one whose sides are equal before the cut, is dropped

Counted, and refused above `limits`, as everything that is lost. Left out: answers of several assistant turns under a
template that rewrites earlier turns (each would need a prompt of its own); such a row is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmops.data.budget import enforce
from llmops.data.chat import Rendered, begins_with_bos, has_template, prompt_text, render_chat, terminators
from llmops.data.masks import IGNORED, chat_labels, framed, plain_labels, refuse_double_bos, tokenize
from llmops.data.options import Limits
from llmops.data.render import no_template
from llmops.data.sources import Rows
from llmops.errors import DataError

__all__ = ["EncodedPairs", "encode_pairs"]

Example = dict[str, list[int]]
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs of examples and what became of the rows.

    chosen, rejected: {"input_ids": [...], "labels": [...]}, the two sides of pair i at index i. report: rows, pairs,
    dropped (rows that left no pair), truncated (pairs of which anything was cut), answers_cut (those of which an
    answer was), identical (sides equal from the start, dropped), same_after_cut (dropped), tokens, trainable_tokens
    (of both sides), system_folded, longest (tokens of the longest side, before any cut). origin: the row of each pair.
    """

    chosen: list[Example]
    rejected: list[Example]
    report: dict[str, int]
    origin: list[int] = field(default_factory=list)


def encode_pairs(rows: Rows, tokenizer: Any, *, max_length: int, limits: Limits,
                 progress: Callable[[int, int, str], None] | None = None) -> EncodedPairs:
    """Tokenize preferences for training on pairs (see above).

    max_length: tokens a side may have, at least 8. progress: called with rows done, rows in all and a word. Raises
    DataError for rows of another kind, as `encode` for templates that lose a terminator or a text, and when more rows
    are dropped or cut than `limits` allows.
    """
    if rows.kind != "preference":
        raise DataError(f"{rows.name}: its rows are {rows.kind}, of one answer each; expected preferences, with "
                        "prompt+chosen+rejected; name other data, or map its columns, as `columns: {chosen: better, "
                        "rejected: worse}`")
    found: list[tuple[Example, Example]] = []
    origin: list[int] = []
    longer: dict[int, int] = {}
    counts = dict.fromkeys(("truncated", "answers_cut", "identical", "same_after_cut", "system_folded", "longest"), 0)
    for index, pair, folded in _sides(rows, tokenizer, progress):
        size = max(len(side["input_ids"]) for side in pair)
        counts["system_folded"] += folded
        counts["longest"] = max(counts["longest"], size)
        if pair[0] == pair[1]:
            counts["identical"] += 1
            continue
        cut = pair
        if size > max_length:
            cut = _cut(pair, max_length, tokenizer.bos_token_id)
            longer[index] = size
            counts["truncated"] += 1
            counts["answers_cut"] += any(_trained(a) < _trained(b) for a, b in zip(cut, pair, strict=True))
        if cut[0] == cut[1]:
            counts["same_after_cut"] += 1
        elif all(_trained(side) for side in cut):
            found.append(cut)
            origin.append(index)
    lost = sorted(set(range(len(rows.rows))) - set(origin))
    sides = [side for pair in found for side in pair]
    report = {"rows": len(rows.rows), "pairs": len(found), "dropped": len(lost), **counts,
              "tokens": sum(len(side["input_ids"]) for side in sides),
              "trainable_tokens": sum(_trained(side) for side in sides)}
    enforce(rows, lost, longer, limits, max_length, "are equal on both sides or have nothing to train on")
    return EncodedPairs([pair[0] for pair in found], [pair[1] for pair in found], report, origin)


def _trained(side: Example) -> int:
    return sum(label != IGNORED for label in side["labels"])


def _sides(rows: Rows, tokenizer: Any, progress: Callable[[int, int, str], None] | None,
           chunk: int = 256) -> Iterator[tuple[int, tuple[Example, Example], bool]]:
    """(row, (chosen, rejected), whether a system turn was folded), tokenized `chunk` rows at a time."""
    stops, bos, plain = terminators(tokenizer), begins_with_bos(tokenizer), not has_template(tokenizer)
    for start in range(0, len(rows.rows), chunk):
        stop = min(start + chunk, len(rows.rows))
        drafts = [_rendered(rows, index, side, tokenizer) for index in range(start, stop) for side in SIDES]
        done: list[Example] = []
        for number, (ids, offsets) in enumerate(tokenize([draft.text for draft in drafts], tokenizer)):
            draft, place = drafts[number], rows.place(start + number // 2)
            if plain:
                ids, labels = framed(ids, plain_labels(draft.spans, ids, offsets), bos, tokenizer, rows.name)
            else:
                labels = chat_labels(draft, ids, offsets, stops, tokenizer, place)
            refuse_double_bos(ids, tokenizer, place)
            done.append({"input_ids": ids, "labels": [IGNORED, *labels[1:]]})
        for number in range(start, stop):
            at = 2 * (number - start)
            yield number, (done[at], done[at + 1]), drafts[at].folded
        if progress is not None:
            progress(stop, len(rows.rows), "tokenized")


def _rendered(rows: Rows, index: int, side: str, tokenizer: Any) -> Rendered:
    """One side as text; its spans are those of the answer alone."""
    row, place = rows.rows[index], f"{rows.place(index)}: {side}"
    texts = isinstance(row["prompt"], str)
    if not has_template(tokenizer):
        if not texts:
            raise no_template(rows)
        whole = row["prompt"] + row[side]
        return Rendered(whole, ((len(row["prompt"]), len(whole)),))
    prompt = [{"role": "user", "content": row["prompt"]}] if texts else row["prompt"]
    answer = [{"role": "assistant", "content": row[side]}] if texts else row[side]
    tools = None if texts else row.get("tools")
    pieces = render_chat([*prompt, *answer], tokenizer, place, tools)
    if len(pieces) > 1 and sum(turn["role"] == "assistant" for turn in answer) > 1:
        raise DataError(f"{place}: the answer has several assistant turns, and the chat template rewrites earlier "
                        "ones, so no one text holds them as the model would say them; expected one assistant turn; "
                        "move the turns before the last into the prompt")
    begin = prompt_text(prompt, tokenizer, place, tools)
    if not pieces[-1].text.startswith(begin):
        raise DataError(f"{place}: the chat template renders the prompt as ...{begin[-40:]!r}, and not so before an "
                        "answer; expected the one to begin the other; use the model's own template")
    return replace(pieces[-1], spans=tuple(span for span in pieces[-1].spans if span[0] >= len(begin)))


def _cut(pair: tuple[Example, Example], max_length: int, bos: int | None) -> tuple[Example, Example]:
    """Both sides within `max_length`: the prompt from the left, down to half of it, then the answers at their end."""
    prompt = min(_first(side) for side in pair)
    head = 1 if bos is not None and pair[0]["input_ids"][0] == bos else 0
    over = max(len(side["input_ids"]) for side in pair) - max_length
    gone = min(over, max(prompt - max(max_length // 2, head + 1), 0))

    def shorter(values: Sequence[int]) -> list[int]:
        return [*values[:head], *values[head + gone:]][:max_length]

    def side(example: Mapping[str, Sequence[int]]) -> Example:
        return {key: shorter(values) for key, values in example.items()}

    return side(pair[0]), side(pair[1])


def _first(side: Example) -> int:
    """Tokens before the first that is trained."""
    return next((index for index, label in enumerate(side["labels"]) if label != IGNORED), len(side["labels"]))

"""From rendered text to tokens and labels: the one place where a character range becomes a range of tokens.

A token is trained when one of its characters is. An assistant turn is trained up to its terminator, which has to be
there; where the template marks the turns itself and leaves the terminator out, the one right behind is taken in.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llmops.data.chat import Rendered
from llmops.errors import DataError

__all__ = ["IGNORED", "Offsets", "chat_labels", "framed", "plain_labels", "refuse_double_bos", "tokenize"]

IGNORED = -100  # the label that cross entropy leaves out
Offsets = list[tuple[int, int]]


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], Offsets]]:
    """Ids, and for each the range of characters it stands for, without special tokens of the tokenizer's own."""
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"the tokenizer ({type(tokenizer).__name__}) does not tell which characters a token stands "
                        "for, so no loss mask can be proved; expected a fast one (a tokenizer.json beside the model); "
                        "convert it")
    out = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False,
                    verbose=False)
    return list(zip(out["input_ids"], out["offset_mapping"], strict=True))


def refuse_double_bos(ids: Sequence[int], tokenizer: Any, place: str) -> None:
    """Raise DataError, naming `place`, when the ids begin with two BOS."""
    bos = tokenizer.bos_token_id
    if bos is not None and bos != tokenizer.eos_token_id and list(ids[:2]) == [bos, bos]:
        raise DataError(f"{place}: the text begins with two {tokenizer.bos_token}; expected one; the template or the "
                        "tokenizer writes it already, so take it out of the data (or out of one of them)")


def _covered(offsets: Offsets, span: tuple[int, int]) -> tuple[int, int]:
    """(first, one past the last) token with a character in `span`; one of no width counts with what is before it."""
    first = bisect_right(offsets, span[0], key=lambda offset: offset[1])
    last = bisect_left(offsets, span[1], lo=first, key=lambda offset: offset[0])
    while last < len(offsets) and offsets[last] == (span[1], span[1]):
        last += 1
    return first, last


def plain_labels(spans: Iterable[tuple[int, int]], ids: list[int], offsets: Offsets) -> list[int]:
    """Labels on the tokens of the spans, IGNORED elsewhere."""
    labels = [IGNORED] * len(ids)
    for span in spans:
        first, last = _covered(offsets, span)
        labels[first:last] = ids[first:last]
    return labels


def framed(ids: list[int], labels: list[int], bos: list[int], tokenizer: Any,
           name: str) -> tuple[list[int], list[int]]:
    """BOS before (if the tokenizer has that habit), EOS behind. EOS is trained; the first token never is.

    Raises DataError, naming `name`, when the tokenizer has no end token.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError(f"{name}: the tokenizer has no end-of-sequence token, so a model could not learn to stop; "
                        "expected `eos_token` in its tokenizer_config.json")
    ids, labels = [*bos, *ids, eos], [*[IGNORED] * len(bos), *labels, eos]
    return ids, [IGNORED, *labels[1:]]  # nothing predicts the first token


def chat_labels(rendered: Rendered, ids: list[int], offsets: Offsets, stops: frozenset[int], tokenizer: Any,
                place: str) -> list[int]:
    """Labels on each assistant turn up to its terminator. Raises DataError, naming `place`, when there is none."""
    labels = [IGNORED] * len(ids)

    def blank(token: int) -> bool:
        return not rendered.text[slice(*offsets[token])].strip() and ids[token] not in stops

    for span in rendered.spans:
        first, last = _covered(offsets, span)
        if first == last:
            continue
        end = _after_terminator(ids, blank, stops, first, last, beyond=rendered.marked)
        if end is None:
            raise DataError(
                f"{place}: the chat template ends an assistant turn with "
                f"{rendered.text[max(span[0], span[1] - 24):span[1]]!r} and no end-of-turn token, so a model tuned on "
                f"it would never stop; expected {tokenizer.eos_token or 'an eos token'} or another special token "
                "right after the turn; add it to the template")
        labels[first:end] = ids[first:end]
    return labels


def _after_terminator(ids: list[int], blank: Callable[[int], bool], stops: frozenset[int], first: int, last: int,
                      *, beyond: bool) -> int | None:
    """Where the trained part [first, last) ends once it holds its terminator: the index after it, or None without one.

    Blanks behind the terminator (a line break) are not trained. beyond: a terminator right after the part (templates
    whose ``{% generation %}`` leaves it out) is taken in, with blanks before it; without marks what follows the part
    is the next turn's.
    """
    end = last
    while end > first and blank(end - 1):
        end -= 1
    if end > first and ids[end - 1] in stops:
        return end
    if not beyond:
        return None
    end = last
    while end < len(ids) and blank(end):
        end += 1
    return end + 1 if end < len(ids) and ids[end] in stops else None

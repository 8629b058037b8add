"""Training rows that stand in the test data.

Two rows are the same when they ask the same, whatever they answer: a test question that was trained on with another
answer is no test either. Compared without case and surplus white space, and without system turns (they are the same
everywhere and hide what is). Of a training conversation every assistant turn counts, of a test conversation the last,
which is the one that is scored; of a preference the question that both answers are to. Texts are compared as whole
documents. Left out: paraphrases, and texts that only
overlap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmops.errors import DataError

if TYPE_CHECKING:
    from llmops.data.sources import Rows

__all__ = ["check_leak"]


def check_leak(train: Rows, test: Rows) -> None:
    """Raise DataError when training rows stand in the test rows, with their number and the first three pairs."""
    known: dict[str, tuple[int, str]] = {}  # what is asked -> (training row, its answer)
    for index, row in enumerate(train.rows):
        for asked, answer in _questions(train.kind, row):
            known.setdefault(asked, (index, answer))
    leaks: list[str] = []
    for index, row in enumerate(test.rows):
        *_, (asked, answer) = _questions(test.kind, row)
        if asked in known:
            other, its_answer = known[asked]
            same = "" if its_answer == answer else " with another answer"
            leaks.append(f"{test.place(index)} (row {index + 1}) = {train.place(other)} (row {other + 1}){same}")
    if leaks:
        raise DataError(f"{len(leaks)} of {len(test.rows)} rows of {test.name} stand in the training data "
                        f"{train.name}: {'; '.join(leaks[:3])}{' ...' if len(leaks) > 3 else ''}; expected none, or "
                        "the score says nothing; take them out of one side, or use two ranges of one source, as "
                        "`split: \"[:90%]\"` and `split: \"[90%:]\"`")


def _questions(kind: str, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what is asked, what is answered), normalized: one a row, or one for every assistant turn of a conversation.

    Of a preference the turns of both answers: it trains on either.
    """
    if kind == "messages":
        yield from _turns(row["messages"], 0)
    elif kind == "preference" and not isinstance(row["prompt"], str):
        for side in ("rejected", "chosen"):
            yield from _turns([*row["prompt"], *row[side]], len(row["prompt"]))
    elif kind == "preference":
        yield _plain(row["prompt"]), _plain(row["chosen"])
    elif kind == "prompt_completion":
        yield _plain(row["prompt"]), _plain(row["completion"])
    elif kind == "prompts":
        turns = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        yield from _turns([*turns, {"role": "assistant", "content": ""}], len(turns))
    elif kind == "choices":
        yield _plain(row["question"]), _plain(row["choices"][row["answer"]])
    else:
        yield _plain(row["text"]), ""


def _turns(turns: Sequence[Mapping[str, Any]], first: int) -> Iterator[tuple[str, str]]:
    """(what stands before, the answer) of every assistant turn from the one with index `first` on."""
    before: list[str] = []
    for index, turn in enumerate(turns):
        said = _plain(" ".join([turn["content"], *(json.dumps(call["function"], sort_keys=True)
                                                   for call in turn.get("tool_calls") or ())]))
        if turn["role"] == "assistant" and index >= first:
            yield "\n".join(before), said
        if turn["role"] not in ("system", "developer"):
            before.append(said)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()

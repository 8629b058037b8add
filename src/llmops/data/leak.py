"""Training rows that stand in the test data.

Two rows are the same when they ask the same, whatever they answer: a test question that was trained on with another
answer is no test either. Compared without case and surplus white space, and without system turns (they are the same
everywhere and hide what is). Of a training conversation every assistant turn counts, of a test conversation the last,
which is the one that is scored. Texts are compared as whole documents. Left out: paraphrases, and texts that only
overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
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
                        f"{train.name}: "
                        f"{'; '.join(leaks[:3])}{' ...' if len(leaks) > 3 else ''}; expected none, or the score says "
                        f"nothing; "
                        "take them out of one side, or use two ranges of one source, as `split: \"[:90%]\"` and "
                        "`split: \"[90%:]\"`")


def _questions(kind: str, row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what is asked, what is answered), normalized: one a row, or one for every assistant turn of a conversation."""
    if kind == "messages":
        before: list[str] = []
        for turn in row["messages"]:
            if turn["role"] == "assistant":
                yield "\n".join(before), _plain(turn["content"])
            if turn["role"] not in ("system", "developer"):
                before.append(_plain(turn["content"]))
    elif kind == "prompt_completion":
        yield _plain(row["prompt"]), _plain(row["completion"])
    elif kind == "choices":
        yield _plain(row["question"]), _plain(row["choices"][row["answer"]])
    else:
        yield _plain(row["text"]), ""


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()

"""Training rows in the test data are found, and rows that only look alike are not."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tests.data.makers import chat, choice_rows, message_rows, pair_rows, text_rows

from llmops.data.leak import check_leak
from llmops.data.sources import Rows
from llmops.errors import DataError


def test_rows_that_are_the_same_but_for_case_and_space() -> None:
    train = pair_rows(("One?", "1"), ("Two  AND three?\n", "Five."), ("Four?", "4"))
    test = replace(pair_rows(("Six?", "6"), ("two and three?", "five."), ("four?", "5")), name="test",
                   places=("t.csv:2", "t.csv:3", "t.csv:9"))
    with pytest.raises(DataError) as caught:
        check_leak(train, test)
    assert str(caught.value).startswith(
        "2 of 3 rows of test stand in the training data train: t.csv:3 (row 2) = train, row 2 (row 2); "
        "t.csv:9 (row 3) = train, row 3 (row 3) with another answer; expected none")
    assert "take them out" in str(caught.value)


def test_only_three_pairs_are_named() -> None:
    rows = pair_rows(*[(f"question {i}?", "x") for i in range(9)])
    with pytest.raises(DataError, match="9 of 9 rows") as caught:
        check_leak(rows, rows)
    assert str(caught.value).count(" = ") == 3 and " ...;" in str(caught.value)


def test_kinds_are_compared_with_each_other() -> None:
    chats = message_rows(chat("Two?", "Five.", system="Be brief."))
    for test in (chats, message_rows(chat("two?", "Five.")), pair_rows(("Two?", "Five.")),
                 choice_rows(("Two?", ["Four.", "Five."], 1))):
        with pytest.raises(DataError, match="1 of 1 rows"):
            check_leak(chats, test)


def test_every_turn_of_a_training_conversation_counts_and_the_last_of_a_tested_one() -> None:
    long = message_rows(chat("Two?", "Five.", "Sure?", "Yes."))
    with pytest.raises(DataError, match="1 of 1 rows"):
        check_leak(long, message_rows(chat("Two?", "Six.")))
    check_leak(message_rows(chat("Two?", "Five.")), long)  # what is asked last was never trained
    check_leak(message_rows(chat("Sure?", "Yes.")), long)  # nor was it in this conversation


def test_texts_are_compared_as_documents() -> None:
    check_leak(text_rows("one two three"), text_rows("one two", "two three"))
    with pytest.raises(DataError, match="row 2.*= train, row 1"):
        check_leak(text_rows("one two three"), text_rows("one two", "One\ttwo  three "))


def test_against_comparing_every_pair() -> None:
    draw = random.Random(0)
    words = ["a", "A", "b", "a b", "a  B", "ab"]

    def rows(count: int) -> Rows:
        return pair_rows(*[(draw.choice(words) + draw.choice(words), draw.choice("xy")) for _ in range(count)])

    for _ in range(200):
        train, test = rows(draw.randint(1, 4)), rows(draw.randint(1, 4))
        plain = [[" ".join(row["prompt"].split()).lower() for row in side.rows] for side in (train, test)]
        leaks = sum(any(mine == other for other in plain[0]) for mine in plain[1])
        if leaks:
            with pytest.raises(DataError, match=f"^{leaks} of {len(test.rows)} rows"):
                check_leak(train, test)
        else:
            check_leak(train, test)

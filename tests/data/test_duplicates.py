import random
from itertools import combinations

import pytest

from llmops.data.duplicates import first_of_their_kind, repetition, resemblance, shingles


def texts(count: int) -> list[str]:
    """Texts of twenty words; every third is an earlier one with some words changed."""
    draw, words = random.Random(0), [f"w{number}" for number in range(400)]
    made: list[str] = []
    for number in range(count):
        found = draw.choice(made).split() if number % 3 == 2 else draw.choices(words, k=20)
        if number % 3 == 2:
            for _ in range(draw.choice([0, 1, 3])):
                found[draw.randrange(20)] = draw.choice(words)
        made.append(" ".join(found))
    return made


@pytest.mark.parametrize("most", [0.4, 0.7])
def test_what_is_left_out_is_what_comparing_all_pairs_leaves_out(most):
    every = texts(150)
    kept: list[int] = []
    equal = near = 0
    for index, text in enumerate(every):
        if text in every[:index]:
            equal += 1
        elif any(resemblance(shingles(text), shingles(every[other])) > most for other in kept):
            near += 1
        else:
            kept.append(index)
    assert first_of_their_kind(every, most) == (kept, equal, near)
    assert equal > 3 and near > 3 and all(resemblance(shingles(every[a]), shingles(every[b])) <= most
                                          for a, b in combinations(kept, 2))


def test_at_one_only_equal_texts_go():
    assert first_of_their_kind(["a b c d", "A b c d", "a b c d"], 1.0) == ([0, 1], 1, 0)
    assert first_of_their_kind(["a b c d", "A b, c d!", "a b c d"], 0.99) == ([0], 1, 1)


def test_short_texts_and_signs_are_texts_too():
    assert first_of_their_kind(["", "!", "?", "one", "one two", "one"], 0.8) == ([0, 1, 2, 3, 4], 1, 0)


@pytest.mark.parametrize(("text", "expected"), [
    ("the lake the lake", 0), ("a b c d a b c d", 0.2), ("so so so so so so so", 0.75), ("", 0)])
def test_repetition_is_the_share_of_runs_that_were_said_before(text, expected):
    assert repetition(text) == pytest.approx(expected)

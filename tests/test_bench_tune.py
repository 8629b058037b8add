"""The rows of benchmarks/bench_tune.py: every contender gets the same ones, and they are what the docstring says."""

import random

from benchmarks import _tune_case as tune


def test_best_fit_holds_every_row_once_and_no_pack_too_much():
    draw = random.Random(0)
    lengths = [draw.randint(1, 60) for _ in range(200)]
    packs = tune.best_fit(lengths, 64)
    assert sorted(row for pack in packs for row in pack) == list(range(200))
    assert all(sum(lengths[row] for row in pack) <= 64 for pack in packs)
    assert len(packs) <= 1.05 * sum(lengths) / 64 + 1


def test_packs_are_the_same_each_time_and_fill_the_steps():
    case = tune.Case("twin60m", steps=3, packs=2)
    packs = tune.make_packs(case, 32000)
    assert packs == tune.make_packs(case, 32000)
    assert len(packs) == 6
    assert all(tune.tokens_of(pack) <= case.pack_length for pack in packs)
    rows = [row for pack in packs for row in pack]
    assert all(20 <= len(row["input_ids"]) == len(row["labels"]) <= 400 for row in rows)
    assert all(row["labels"][0] == -100 and row["labels"][-1] == row["input_ids"][-1] for row in rows)
    assert tune.padded_tokens_of(packs) > 1.5 * sum(tune.tokens_of(pack) for pack in packs)


def test_a_label_on_the_first_token_of_a_row_does_not_count():
    assert tune.trained_tokens_of([{"input_ids": [5, 6, 7], "labels": [5, -100, 7]},
                                   {"input_ids": [8, 9], "labels": [-100, 9]}]) == 2

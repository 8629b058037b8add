import random

import pytest
from tests.report.rows import make_rows, null

from llmops.errors import LlmopsError
from llmops.report.pareto import Point, chosen, mark, pareto, points
from llmops.report.verdict import judge

SCORE = "exact_match:test"


def brute_force(points):
    def dominates(p, q):
        return p.score >= q.score and p.cost <= q.cost and (p.score > q.score or p.cost < q.cost)
    return {q.name for q in points if not any(dominates(p, q) for p in points)}


@pytest.mark.parametrize("seed", range(200))
def test_pareto_is_the_brute_force_set(seed):
    draw = random.Random(seed)
    grid = draw.choice([3, 10, 10_000])  # coarse grids make ties
    found = [Point(str(i), draw.randrange(grid), draw.randrange(grid)) for i in range(draw.randrange(1, 40))]
    assert pareto(found) == brute_force(found)


def test_nothing_and_not_finite():
    assert pareto([]) == set()
    assert pareto([Point("a", float("nan"), 1), Point("b", 1, float("inf")), Point("c", 0, 5)]) == {"c"}


def test_mark_leaves_out_what_is_broken_failed_or_unscored():
    rows = make_rows()
    assert mark(rows, SCORE, "joules_per_token") == {"student", "tuned-w4", "tuned-w8"}
    rows[5]["energy"]["1"]["joules_per_token"]["value"] = 1e-9  # broken, though cheapest by far
    assert "tuned-w2" not in mark(rows, SCORE, "joules_per_token")
    assert {point.name for point in points(rows, SCORE, "disk_bytes")}.isdisjoint({"tuned-w2", "healed-w4", "half"})


def test_a_score_where_less_is_better_and_a_cost_where_more_is_better():
    rows = make_rows()
    assert mark(rows, "perplexity:heldout", "joules_per_token") == {"student", "tuned-w4", "tuned-w8"}
    assert mark(rows, SCORE, "decode_tokens_per_s") == {"student", "tuned-w4", "tuned-w8"}


def test_a_null_cost_takes_no_part():
    rows = make_rows()
    rows[3]["energy"]["1"]["joules_per_token"] = null("J/token", "no sensor")
    assert mark(rows, SCORE, "joules_per_token") == {"student", "tuned-w8"}


def test_rows_of_another_protocol_or_machine_take_no_part():
    rows = make_rows()
    rows[2]["quality"][SCORE]["protocol"]["max_new_tokens"] = 1
    assert "tuned-w8" not in mark(rows, SCORE, "disk_bytes")
    rows = make_rows()
    rows[10]["environment"]["cpu"] = "faster"
    assert "student" not in mark(rows, SCORE, "joules_per_token")
    assert "student" in {point.name for point in points(rows, SCORE, "disk_bytes")}


def test_an_unknown_cost_names_the_nearest():
    with pytest.raises(LlmopsError, match='did you mean "disk_bytes"'):
        points(make_rows(), SCORE, "disk_byte")


def test_chosen_follows_the_verdict_then_the_goals_then_what_was_measured():
    rows = make_rows()
    assert chosen(rows) == (SCORE, "joules_per_token")
    assert chosen([{**row, "goals": {}} for row in rows]) == (SCORE, "joules_per_token")
    rows[0]["verdict"]["pareto_axes"] = ["perplexity:heldout", "disk_bytes"]
    assert chosen(rows) == ("perplexity:heldout", "disk_bytes")
    assert chosen([{}]) is None


def test_the_verdict_marks_the_same_variants():
    judged = judge(make_rows())
    line = {row["identity"]["variant"] for row in judged if row["verdict"]["pareto"]}
    assert line == mark(judged, *chosen(judged)) == {"student", "tuned-w4", "tuned-w8"}

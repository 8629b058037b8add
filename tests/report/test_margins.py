"""Margins judged from rows: shown or not, over several variants; groups named; changed answers drawn and escaped."""

import copy
import json

import pytest
from tests.report.rows import EVIL, q

from llmops.evaluate.paired_tests import holm, normal_tail, tango
from llmops.report import html
from llmops.report.groups import gaps, name_and_lines
from llmops.report.table import table
from llmops.report.verdict import judge
from llmops.report.why import layer_map

SCORE = "exact_match:test"


def pair(gained, lost, n=1000, **more):
    delta = (gained - lost) / n
    return {"variant": "base", "n": n, "gained": gained, "lost": lost, "mcnemar_p": 0.5, "p": 0.5, "clusters": None,
            "delta": q(delta, "fraction", ci95=(delta - 0.01, delta + 0.01), n=n), "delta_stderr": 0.005,
            "score_test": {"gained": gained, "lost": lost, "n": n, "scale": 1.0}, **more}


def group(delta, excess, n=100, p=0.5):
    return {**pair(0, round(-delta * n), n), "p_holm": p, "excess": q(excess, "fraction", ci95=(excess - 0.05,
                                                                                              excess + 0.05))}


def row(name, versus=None, goals=None, slices=None):
    quality = {"id": SCORE, "metric": "exact_match", "higher_is_better": True, "n": 1000, "protocol": {},
               "value": q(0.9, "fraction", n=1000), "versus": {"base": versus, "parent": versus} if versus else {}}
    if slices:
        quality["slices"] = slices
    return {"identity": {"run": "r", "variant": name, "parent": None if name == "base" else "base", "key": name},
            "status": {"state": "ok"}, "quality": {SCORE: quality}, "size": {"disk_bytes": q(len(name), "B")},
            "transform": {"kind": None if name == "base" else "quantize", "method": "rtn", "options": {}},
            "goals": goals or {}}


def goal(**bounds):
    return {"quality": {SCORE: bounds}, "costs": {}, "prefer": None}


def test_a_margin_is_met_when_shown_and_corrected_over_the_variants():
    goals = goal(noninferior=0.02)
    counts = {"a": (5, 8), "b": (20, 34), "c": (10, 60)}
    rows = judge([row("base", goals=goals), *(row(name, pair(*each), goals) for name, each in counts.items())])
    expected = holm({name: normal_tail(tango(*each, 1000, -0.02)) for name, each in counts.items()})
    found = {each["identity"]["variant"]: each["verdict"]["goals"][0] for each in rows}
    assert found["base"]["met"] and "held against" in found["base"]["detail"]
    for name in counts:
        assert found[name]["p_holm"] == pytest.approx(expected[name])
        assert found[name]["met"] == (expected[name] <= 0.025)
    assert [found[name]["met"] for name in "abc"] == [True, False, False]
    assert "not shown with 1000 items, about" in found["b"]["detail"] and "would be needed" in found["b"]["detail"]
    assert "would be needed" not in found["c"]["detail"]  # what lost five points is no matter of items
    alone = judge([row("base", goals=goals), row("b", pair(*counts["b"]), goals)])[1]["verdict"]["goals"][0]
    assert alone["p"] == alone["p_holm"] and "Holm" not in alone["detail"]


def test_what_was_not_compared_is_unknown_and_does_not_win():
    goals = goal(noninferior=0.02)
    other = row("b", {"variant": "base", "not_comparable": "different protocol: seed"}, goals)
    rows = judge([row("base", goals=goals), other, row("c", None, goals)])
    assert [each["verdict"]["goals"][0]["met"] for each in rows] == [True, None, None]
    assert rows[1]["verdict"]["goals"][0]["detail"] == "unknown: different protocol: seed"
    assert not rows[1]["verdict"]["winner"]


SLICES = {"topic": {"worst": "river", "groups": {
    "river": group(-0.2, 0.15, p=0.001), "town": group(-0.05, -0.15), EVIL: group(-0.9, 0.8, n=3)}}}


@pytest.mark.parametrize("limit, met, words", [(0.2, True, "topic=river lost 0.15"), (0.12, False, "may be chance"),
                                               (0.05, False, "; shown")])
def test_a_gap_is_that_of_the_worst_group_with_items_enough(limit, met, words):
    goals = goal(max_gap=limit)
    body = pair(10, 60, slices=copy.deepcopy(SLICES))
    body["slices"]["topic"]["groups"]["river"]["excess"]["ci95"] = [0.1 if limit > 0.1 else 0.06, 0.2]
    rows = judge([row("base", goals=goals), row("b", body, goals)])
    [found] = rows[1]["verdict"]["goals"]
    assert found["met"] is met and found["group"] == "topic=river" and words in found["detail"]
    assert [name for _, name, _ in gaps(rows[1], SCORE, "base")] == ["river", "town"]


def test_the_worst_group_is_named_in_table_and_page_and_no_name_breaks_out():
    own = {"topic": {name: {"value": q(0.8, "fraction"), "n": 100} for name in ("river", "town", EVIL)}}
    rows = judge([row("base", slices=own), row("b", pair(10, 60, slices=SLICES), slices=own)])
    [line] = name_and_lines(rows)
    assert line.startswith("worst group of b: exact_match:test, topic=river: -20.0 pp") and "Holm p = 0.001" in line
    assert "topic=river" in str(table(rows).caption)
    page = html.page(rows, title="r")
    assert 'id="slices"' in page and "topic=town" in page and EVIL not in page


EXPLAINED = {"run": "r", "variant": "b", "against": "base", "keys": ["b", "base"], "notes": [], "scores": {SCORE: {
    "n": 10, "changed": 1, "lost": 1, "gained": 0, "items": [{
        "id": "x", "question": f"who? {EVIL}", "groups": {}, "expected": "a", "answer": EVIL, "answer_before": "a",
        "score": 0.0, "score_before": 1.0, "tokens": [{"token": EVIL, "kl": 2.0, "p": 0.9, "q": 0.1, "says": "a",
                                                      "says_variant": EVIL}]}]}},
    "layers": {"score": SCORE, "answers": 1, "tokens": 1,
               "whole": {"block": None, "kind": "everything", "names": [], "kl": 2.0, "delta_logp": -1, "turned": 1},
               "swaps": [{"block": 0, "kind": "q", "names": ["q"], "kl": 0.5, "delta_logp": -0.1, "turned": 1},
                         {"block": 1, "kind": "down", "names": ["d"], "kl": 0.0, "delta_logp": 0.0, "turned": 0},
                         {"block": None, "kind": "lm_head", "names": ["lm_head"], "kl": 0.1, "delta_logp": 0,
                          "turned": 0}]}}


def test_no_group_is_named_where_none_lost():
    """The one that gained least is no victim: it stands there like the others."""
    gained = json.loads(json.dumps(SLICES).replace('"value": -', '"value": '))
    own = {"topic": {name: {"value": q(0.8, "fraction"), "n": 100} for name in ("river", "town")}}
    rows = judge([row("base", slices=own), row("b", pair(60, 10, slices=gained), slices=own)])
    assert name_and_lines(rows) == []
    page = html.page(rows, title="r")
    groups = page[page.index('id="slices"'):]
    assert "<b>80.0%</b>" not in groups[:groups.index("</section>")]
    lost = html.page(judge([row("base", slices=own), row("b", pair(10, 60, slices=SLICES), slices=own)]), title="r")
    assert "<b>80.0%</b>" in lost[lost.index('id="slices"'):]


def test_changed_answers_are_drawn_for_the_builds_that_were_looked_at():
    rows = judge([row("base"), row("b", pair(1, 2))])
    page = html.page(rows, title="r", explained=[EXPLAINED])
    assert 'id="why"' in page and EVIL not in page and "token hot3 other" in page
    assert "block 0 q: KL 0.500 nats a token, 1 answers change" in layer_map(EXPLAINED["layers"], "t")
    stale = {**EXPLAINED, "keys": ["older", "base"]}
    assert 'id="why"' not in html.page(rows, title="r", explained=[stale])
    refused = {**EXPLAINED, "layers": {"not_swapped": "3 and 6 decoder blocks"}}
    assert "Layers were not swapped: 3 and 6" in html.page(rows, title="r", explained=[refused])

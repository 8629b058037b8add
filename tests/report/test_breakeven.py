import copy
import re

import pytest
from tests.report.rows import EVIL, make_rows, many, null
from tests.report.test_html import Reader

from llmops.quantity import Quantity
from llmops.report.breakeven import paybacks, section
from llmops.report.html import page
from llmops.report.markup import tag
from llmops.report.sections import Page


def shown(rows):
    return Reader(tag("div", section(Page(rows))))


def test_every_curve_meets_one_where_the_row_says_it_breaks_even():
    found = {one.row["identity"]["variant"]: one for one in paybacks(Page(make_rows()))}
    assert list(found)[:3] == ["tuned-w4", "student", "tuned-w8"]  # those that pay back soonest
    for name in ("student", "tuned-w4", "tuned-w8"):
        one = found[name]
        tokens = Quantity.from_dict(one.row["building"]["break_even_tokens"])
        assert one.at(tokens.value) == pytest.approx(1.0)
        assert [one.at(end, ratio) for end, ratio in zip(tokens.ci95, one.ratio.ci95, strict=True)] == pytest.approx(
            [1.0, 1.0])
        assert one.at(1e15) == pytest.approx(one.ratio.value)


def test_energy_over_base_is_that_of_adding_it_up():
    one = paybacks(Page(make_rows()))[0]
    tokens = 5e5
    mine = one.built + tokens * one.row["energy"]["1"]["joules_per_token"]["value"]
    assert one.at(tokens) == pytest.approx(mine / (tokens * one.base))
    whole = one.row["building"]["chain_energy_j"]["value"] + one.row["building"]["evaluate_energy_j"]["value"]
    assert one.built == pytest.approx(whole)
    del one.row["building"]["break_even_tokens"]  # without it the same is added up
    assert paybacks(Page([one.row]))[0].built == pytest.approx(whole)


def test_the_picture_holds_a_curve_a_diamond_and_words_for_each():
    reader = shown(make_rows())
    curves = [each["class"] for each in reader.all("path") if each.get("class", "").startswith("curve")]
    assert curves == [f"curve s{place}" for place in range(6)]
    assert len(reader.all("polygon")) == 6 + 3  # a band each, a diamond for each that pays back
    assert "pays back after" in reader.words and "no saving shown" in reader.words
    assert "reaches 1" in reader.words and "2 more are in the table" in reader.words


def test_many_variants_draw_six():
    reader = shown(many(60))
    assert len([each for each in reader.all("path") if each.get("class", "").startswith("curve")]) == 6
    assert re.search(r"\d+ more are in the table", reader.words)


@pytest.mark.parametrize("part", [("building", "chain_energy_j"), ("energy", "1", "ratio_to_base"),
                                  ("energy", "1", "joules_per_token")])
def test_without_an_energy_there_is_no_curve(part):
    rows = make_rows()
    for row in rows:
        *path, last = part
        body = row
        for key in path:
            body = body.get(key, {})
        if last in body:
            body[last] = null("J", "no sensor")
    assert paybacks(Page(rows)) == []
    assert "No curve can be drawn" in shown(rows).words


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30, 1e30])
def test_wild_figures_do_not_break_it(value):
    rows = make_rows()
    for row in rows[2:4]:
        row["building"]["chain_energy_j"] |= {"value": value}
        row["energy"]["1"]["ratio_to_base"] |= {"ci95": [-1e300, 1e300]}
    text = page(rows, title="demo")
    assert not re.search(r'(?:[cxyd]|points|width)="[^"]*(?:nan|inf)', text)


def test_names_stay_text_and_nothing_is_drawn_of_a_run_without_builds():
    rows = copy.deepcopy(make_rows())
    rows[3]["identity"]["variant"] = EVIL
    assert EVIL in shown(rows).words
    assert section(Page(make_rows()[:1])) == ""

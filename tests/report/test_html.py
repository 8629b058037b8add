import re
from html.parser import HTMLParser

import pytest
from tests.report.rows import EVIL, EVIL_ATTRIBUTE, make_rows, many, null

from llmops.errors import StoreError
from llmops.quantity import Quantity
from llmops.report.charts import Dot, scatter
from llmops.report.html import page, write_html
from llmops.report.markdown import pairs
from llmops.report.markup import Markup, tag
from llmops.report.sections import alike

VOID = {"meta", "br", "hr", "input", "col"}
KEPT = {"ok", "measured", "estimated", "constant", "null", "shown", "not shown"}
EVENTS = re.compile("^on", re.IGNORECASE)


class Reader(HTMLParser):
    """Every element with its attributes; fails on tags that do not close in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        keys = [key for key, _ in attributes]
        assert len(keys) == len(set(keys))
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, text):
        self.text.append((self.open[-1] if self.open else "", text))

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def words(self):
        return " ".join(text for at, text in self.text if at not in ("script", "style"))


def few():
    """A trained, a quantized, a broken, an unscored and a failed variant: enough for what is tried in many ways."""
    return [row for place, row in enumerate(make_rows()) if place in (1, 3, 5, 9, 11)]


def read(rows=None, **options):
    return Reader(page(make_rows() if rows is None else rows, title="demo", **options))


def test_nothing_is_loaded_from_anywhere():
    text = page(make_rows(), title="demo", log=["see https://example.org/x"])
    reader = Reader(text)
    for _, attributes in reader.elements:
        for key in ("src", "href", "xlink:href", "action", "data", "srcset", "poster", "style"):
            value = attributes.get(key, "#")
            assert value.startswith("#"), (key, value)
    assert not reader.all("link") and not reader.all("img") and not reader.all("iframe")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|import\(", text)
    policy = next(meta for meta in reader.all("meta") if meta.get("http-equiv"))["content"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_every_link_and_label_leads_somewhere():
    reader = read()
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in reader.elements:
        for key in ("href", "aria-labelledby", "for"):
            if key in attributes:
                assert attributes[key].removeprefix("#") in ids


@pytest.mark.parametrize("evil", [EVIL, EVIL_ATTRIBUTE, "'><img src=x onerror=alert(1)>", "</script><script>alert(1)",
                                  "</style><b>", "<!--", "]]>", "&lt;b&gt;", "\u202egnp.exe", "a\x00b\ud800"])
def test_names_and_data_are_only_ever_text(evil):
    def poisoned(body):
        if isinstance(body, dict):
            return {f"{key}{evil}" if key == "exact_match:test" else key: poisoned(value)
                    for key, value in body.items()}
        if isinstance(body, list):
            return [poisoned(value) for value in body]
        return f"{body}{evil}" if isinstance(body, str) and body not in KEPT else body

    clean = read(few(), log=["x"])
    text = page(poisoned(few()), title=f"demo{evil}", log=[f"x{evil}"])
    assert text.encode("utf-8")
    reader = Reader(text)
    assert {name for name, _ in reader.elements} <= {name for name, _ in clean.elements}
    assert len(reader.all("script")) == 1
    assert not [key for _, attributes in reader.elements for key in attributes if EVENTS.match(key)]
    if evil.isprintable():
        assert f"tuned-w4{evil}" in reader.words


def test_headings_are_in_order_and_the_language_is_said():
    reader = read(log=["a line"])
    levels = [int(name[1]) for name, _ in reader.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert reader.all("html") == [{"lang": "en"}]
    assert len(reader.all("main")) == 1 and reader.all("nav")[0]["aria-label"]


def test_every_picture_is_named_or_hidden_and_every_scrolling_part_can_be_focused():
    reader = read()
    for attributes in reader.all("svg"):
        assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    for _, attributes in reader.elements:
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0" and attributes["aria-label"] and attributes["role"] == "region"
    assert all("scope" in attributes for attributes in reader.all("th"))


def test_a_chart_for_every_score_cost_and_batch_size_and_one_is_shown():
    figures = [each for each in read().all("figure") if "data-score" in each]
    assert len(figures) == 2 * (3 * 2 + 2)  # scores x (speed and energy at two batch sizes, and bytes)
    assert {each.get("data-batch") for each in figures if each["data-cost"].endswith("bytes")} == {None}
    shown = [each for each in figures if each["class"] == "chart on"]
    assert [(each["data-score"], each["data-cost"], each["data-batch"]) for each in shown] == [
        ("exact_match:test", "joules_per_token", "1")]
    picked = [each["value"] for each in read().all("input") if "checked" in each]
    assert picked == ["exact_match:test", "joules_per_token", "1"]
    rows = [{**row, **{part: {"8": row[part]["8"]} for part in ("energy", "latency") if "8" in (row.get(part) or {})}}
            for row in make_rows()]
    alone = read(rows)
    assert {each.get("data-batch") for each in alone.all("figure") if "data-score" in each} == {"8", None}
    assert not [each for each in alone.all("input") if each.get("name") == "batch"]  # nothing to choose from


def test_each_batch_size_has_its_own_figures_and_front():
    rows = make_rows()
    rows[3]["energy"]["8"]["joules_per_token"] = null("J/token", "no window was long enough")
    page = read(rows).words
    assert "energy per token, batch 1" in page and "energy per token, batch 8" in page
    assert page.count("tuned-w4 (no window was long enough)") == 2  # of two scores, at batch 8 alone


def test_bars_end_in_strokes_unless_they_go_on_beyond_the_picture():
    def dot(ci95):
        y = Quantity.measured(0.5, "fraction", "m")
        return Dot("v", "prune", Quantity.measured(1.0, "s", "m", ci95), y, "", "#")

    dots = [dot((0.9, 1.1)), dot((0.9, 1.2)), dot((0.9, 900.0))]
    drawn = re.findall(r'<path d="([^"]*)" class="interval"', scatter(dots, label="l", x_title="x", y_title="y"))
    assert [path.count("v7") for path in drawn] == [2, 2, 1]


def test_warnings_that_differ_in_figures_alone_are_one():
    assert alike(["batch 1: lasted 0.031 s", "batch 4: lasted 0.04 s", "batch 4: lasted 0.04 s", "the disk is full"]) \
        == ["batch 1: lasted 0.031 s (and 1 more, with other figures)", "the disk is full"]


def test_what_was_not_measured_says_so_where_the_winner_is_shown():
    rows = [{key: value for key, value in row.items() if key not in ("latency", "energy", "workload")}
            for row in make_rows()]
    rows[3]["verdict"] = {"winner": True, "goals": []}
    words = read(rows).words
    assert words.count("not measured") >= 2 and "all of latency : the recipe has no `measure:`" in words


def test_a_mapping_of_sentences_is_told_apart_from_one_of_words():
    assert pairs({"torch": "2.13", "numpy": "2.4"}) == "torch 2.13, numpy 2.4"
    assert pairs({"nvml": "the model runs on cpu", "zeus": "absent"}) == "nvml: the model runs on cpu; zeus: absent"


def test_what_cannot_be_drawn_is_named_with_its_reason():
    words = read().words
    assert "tuned-w2 (broken); healed-w4 (failed); half (not measured in this run)" in words
    rows = make_rows()
    rows[3]["energy"]["1"]["joules_per_token"] = null("J/token", "the sensor died")
    assert "tuned-w4 (the sensor died)" in read(rows).words


def test_intended_use_is_as_stated_or_stated_by_nobody():
    assert read().words.count("stated by nobody") == 4
    rows = [{**row, "card": {"intended_use": "our <products>", "limitations": ["old", "small"]}} for row in make_rows()]
    words = read(rows).words
    assert "our <products>" in words and words.count("stated by nobody") == 2


def test_the_verdict_the_reasons_and_the_nulls_are_said():
    words = read().words
    assert "wins by the recipe's goals" in words
    assert "failed: layer model.layers.3.mlp.down_proj: scale is not finite" in words
    assert "idle power was not read: idle_s is 0 (every variant that was scored)" in words
    assert "embodied carbon of the hardware is not known: none was given" in words
    assert "Energy marked ~ is estimated, not measured" in words
    assert "What was not measured, and why" in words
    none = [{**row, "verdict": {**row["verdict"], "winner": False}} for row in make_rows()]
    assert "No variant meets every goal." in read(none).words
    assert "The recipe sets no goals" in read([{**row, "verdict": {}} for row in make_rows()]).words


def test_every_figure_has_its_provenance_in_a_title_and_in_the_details():
    reader = read()
    titles = [attributes["title"] for attributes in reader.all("td") if "title" in attributes]
    assert any("estimated; CodeCarbon model" in title and "n = 5" in title for title in titles)
    assert any("paired bootstrap over items" in title and "items won" in title for title in titles)
    assert not any(title.startswith("not known: \n") or title == "not known: " for title in titles)
    badges = [attributes.get("class") for attributes in reader.all("span")]
    assert {"badge measured", "badge estimated", "badge constant", "badge null"} <= set(badges)


def test_simulated_compression_and_zeros_are_labelled():
    rows = make_rows()
    assert "simulated" not in read(rows).words
    rows[3]["transform"]["simulated"] = True
    words = read(rows).words
    assert "simulated" in words and "zeros save no time" in words


def test_different_machines_are_said():
    rows = make_rows()
    assert "different environments" not in read(rows).words
    rows[4]["environment"]["cpu"] = "another"
    assert "measured in different environments" in read(rows).words


@pytest.mark.parametrize("gone", ["identity", "status", "transform", "size", "latency", "energy", "building", "quality",
                                  "carbon", "verdict", "environment", "workload", "parity", "tokens", "log", "goals"])
def test_any_group_may_be_missing_or_null(gone):
    assert read([{key: value for key, value in row.items() if key != gone} for row in few()]).all("table")
    assert read([{**row, gone: None} for row in few()]).all("table")


@pytest.mark.parametrize("rows", [[], [{}], make_rows()[:1], [make_rows()[11]]])
def test_few_rows(rows):
    assert read(rows).all("h2")


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e30])
def test_wild_figures_do_not_break_a_chart(value):
    rows = make_rows()
    rows[3]["quality"]["perplexity:heldout"]["value"]["value"] = value
    rows[3]["energy"]["1"]["joules_per_token"] |= {"value": value, "ci95": [-1e300, 1e300]}
    text = page(rows, title="demo")
    assert not re.search(r'(?:[cxyd]|points)="[^"]*(?:nan|inf)', text)


def test_all_equal_figures_have_an_axis():
    rows = make_rows()[:3]
    for row in rows:
        for batch in ("1", "8"):
            row["energy"][batch]["joules_per_token"]["value"] = 0.05
    assert Reader(page(rows, title="demo")).all("path")


def test_the_same_rows_give_the_same_page(tmp_path):
    first = write_html(make_rows(), tmp_path / "deep" / "report.html", title="demo").read_bytes()
    assert first == write_html(make_rows(), tmp_path / "b.html", title="demo").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.html", "deep"]


def test_size_of_the_page():
    assert len(page(make_rows(), title="demo").encode()) < 500_000
    assert len(page(many(100), title="demo").encode()) < 6_000_000


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write_html(make_rows(), tmp_path / "file" / "report.html", title="demo")


def test_tag_escapes_children_and_attributes_but_not_markup():
    assert tag("p", "a < b", title='"x"', hidden=True, id=None, data_v=0) == (
        '<p title="&quot;x&quot;" hidden data-v="0">a &lt; b</p>')
    assert tag("p", tag("b", "&"), ["<", None]) == "<p><b>&amp;</b>&lt;</p>"
    assert isinstance(tag("br"), Markup) and tag("br") == "<br>"

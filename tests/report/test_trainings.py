"""How a training went: its picture, several in one, what happened on the way, and the card that tells of it."""

import copy
import inspect
import math
import re
from html.parser import HTMLParser

import pytest
from tests.report.rows import EVIL, make_rows

from llmops.report.card import card
from llmops.report.html import page
from llmops.report.reading import MARKED, attempts, joules_per_trained_token, looks, merges, trace, training_marks
from llmops.report.trainings import MOST_OVERLAID, MOST_POINTS, Mark, Training, overlaid, strip, training
from llmops.train import finder, loop, stop

EVENTS = ["went on from the checkpoint of step 40",
          "memory ran out at step 55 (DefaultCPUAllocator): forward passes cut to at most 4 rows",
          "stopped early at step 120: 3 looks in a row gained too little",
          "kept the weights of step 90, where the held-out loss was lowest (0.4000)",
          "learning rate 0.0002, from a range test of 60 steps between 1e-06 and 1"]


def trained():
    """The made-up rows; "tuned" was looked at, cut off, halved, stopped and merged."""
    rows = copy.deepcopy(make_rows())
    row = next(row for row in rows if row["identity"]["variant"] == "tuned")
    row["building"] |= {
        "looks": [[step, 0.4 + 0.01 * abs(step - 90)] for step in (30, 60, 90, 120)],
        "attempts": [{"wall_s": 3.0, "energy_j": 20.0}, {"wall_s": 9.0, "energy_j": None}],
        "trace": {"energy_j": [[step, 30.0 * step] for step in range(1, 121)],
                  "learning_rate": [[step, 2e-4 * (1 - step / 121)] for step in range(1, 121)]},
        "merge": [{"target": "bf16 base", "kl_mean": 0.0004, "kl_max": 0.02, "chosen": True},
                  {"target": EVIL, "kl_mean": None, "kl_max": None, "chosen": False}]}
    row["log"]["events"] += EVENTS
    return rows, row


class Seen(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def of(self, name, style=None):
        return [each for tag, each in self.elements if tag == name and (style is None or each.get("class") == style)]


def places(points):
    return [tuple(map(float, pair.split(","))) for pair in points.split()]


def test_the_loss_is_drawn_raw_and_smoothed_with_every_look_and_mark():
    losses = [(step, 3 * math.exp(-step / 30) + 0.2 * (-1) ** step) for step in range(1, 401)]
    held = [(100, 0.5), (200, 0.4), (300, float("nan")), (400, 0.6)]
    text = training(Training("v", losses, held, [Mark(200, "B", "kept"), Mark(400, "S", "stopped")]))
    seen = Seen(text)
    raw, line = (places(seen.of("polyline", style)[0]["points"]) for style in ("curve raw", "curve"))
    assert len(raw) <= MOST_POINTS + 30 and len(line) <= MOST_POINTS + 30

    def roughness(points):
        return sum(abs(after[1] - before[1]) for before, after in zip(points, points[1:], strict=False))

    assert roughness(line) < roughness(raw) / 3
    assert line[0][1] < line[-1][1]  # pixels go down, so does the loss
    assert len(seen.of("polygon", "look")) == 3 and len(places(seen.of("polyline", "held")[0]["points"])) == 3
    marks = seen.of("line", "event")
    assert float(marks[1]["x1"]) == pytest.approx(raw[-1][0]) and float(marks[0]["x1"]) < float(marks[1]["x1"])
    assert "<title>step 200: kept</title>" in text and "lowest 0.400 at step 200" in text
    assert seen.of("svg")[0]["role"] == "img" and "<desc>" in text


def test_a_training_without_a_finite_loss_says_so_and_one_of_one_step_is_drawn():
    assert "no finite loss" in training(Training("v", [(1, float("nan"))]))
    assert places(Seen(training(Training("v", [(1, 2.0)]))).of("polyline", "curve")[0]["points"])
    assert strip([(1, 2.0)], "energy so far", "J") == "" and strip([], "x", "") == ""


def test_strips_name_the_unit_their_ticks_are_in():
    text = strip([(step, 30.0 * step) for step in range(1, 121)], "energy so far", "J")
    assert ">energy so far, kJ</text>" in text and ">2</text>" in text and "3,600 J at step 120" in text


def test_overlaid_lines_differ_by_more_than_their_name():
    many = [Training(f"v{place}", [(step, place + 1 / step) for step in range(1, 30)])
            for place in range(MOST_OVERLAID)]
    seen = Seen(overlaid(many, "all"))
    assert len({each["class"] for each in seen.of("polyline")}) == MOST_OVERLAID
    from importlib import resources

    css = resources.files("llmops.report").joinpath("assets", "report.css").read_text(encoding="utf-8")
    dashes = [re.search(rf"svg \.s{place} {{[^}}]*stroke-dasharray: ([\d ]+)", css)[1] for place in
              range(1, MOST_OVERLAID)]
    assert len(set(dashes)) == MOST_OVERLAID - 1


def test_the_page_shows_trainings_together_alone_and_what_happened():
    rows, _ = trained()
    text = page(rows, title="demo")
    section = text[text.index('id="loss"'):text.index('id="details"')]
    assert section.count('class="sample"') == 2  # tuned and healed; the student's loss is another
    assert section.count("class=\"curve raw\"") == 3
    for letter, event in zip("RMSB", EVENTS, strict=False):
        assert f"<b>{letter}</b> {event}" in section
    assert "held out 0.700" in section and "2 attempts" in section and "energy so far, kJ" in section
    assert "<td class=\"num\">0.0004 nats</td>" in section and "&lt;script&gt;" in section and EVIL not in section
    assert re.search(r"~7\.93 mJ/token in training", section)
    assert ">per token</th>" in text and "attempts</dt><dd>2" in text


def test_a_row_without_any_of_it_reads_as_before():
    row = make_rows()[2]
    found = [looks(row), trace(row, "energy_j"), training_marks(row), merges(row)]
    assert found == [[], [], [], []] and attempts(row) is None
    assert joules_per_trained_token(row).value is None and "How the training went" not in card(row, [row])


def test_what_is_damaged_is_left_out():
    row = {"building": {"looks": "x", "trace": {"energy_j": [[1], ["a", 2], [3, 4.0]]}, "merge": [3], "attempts": True}}
    assert (looks(row), trace(row, "energy_j"), merges(row), attempts(row)) == ([], [(3.0, 4.0)], [], None)


def test_energy_of_a_trained_token_is_that_of_the_build():
    _, row = trained()
    found = joules_per_trained_token(row)
    assert found.value == pytest.approx(3900 / (120 * 4096)) and found.provenance == "estimated"


def test_the_card_tells_how_the_training_went():
    rows, row = trained()
    text = card(row, rows)
    section = text[text.index("## How the training went"):text.index("## How to load it")]
    assert "held-out loss 1.00 to 0.700 in 4 looks, lowest 0.400 at step 90" in section
    for words in ("went on from the checkpoint of step 40", "stopped early at step 120", "from a range test"):
        assert words in section
    assert "| bf16 base | 0.0004 nats | 0.02 nats | yes |" in section and EVIL not in text
    assert "It took 2 attempts" in text and "Each token that ran through the model in training took ~7.93 mJ" in text


def test_marks_are_what_the_loop_says():
    source = "".join(map(inspect.getsource, (loop, stop, finder)))
    for words in ("went on from the checkpoint of step ", "memory ran out at step ", "stopped early at step ",
                  "kept the weights of step "):
        assert words in source
        assert any(pattern.match(f"{words}7") for pattern in MARKED.values())
    assert "from a range test" in source


def test_one_event_may_name_several_steps():
    row = {"log": {"events": ["went on from the checkpoint of step 3, then 9",
                              "memory ran out at the look after step 8 (x): passes cut in half",
                              "memory ran out at optimizer step 4 with one row"]}}
    assert [mark[:2] for mark in training_marks(row)] == [(3.0, "R"), (8.0, "M"), (9.0, "R")]

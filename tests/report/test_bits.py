"""The heat map of bits: every cell once, the dearest darkest, the choice ringed, and the same in words."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from tests.report.rows import EVIL, make_rows

from llmops.report.bits import allocation_of, heat_map, in_words
from llmops.report.html import page

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
BODY: dict[str, Any] = {
    "sensitivity": "gradient", "unit": "nats a token", "crops": [16, 128], "budget": {"bits": 3.2},
    "average_bits": 3.17, "predicted": 0.0213,
    "candidates": ["int2 g32 symmetric", "int3 g32 symmetric", "int4 g32 symmetric"],
    "groups": [{"layers": [f"model.layers.{block}.{name}" for name in names], "bits": [2.5, 3.5, 4.5],
                "cost": [cost, cost / 8, cost / 64], "chosen": chosen}
               for block, names, cost, chosen in [
                   (0, QKV, 0.8, 2), (0, ["mlp.down_proj"], 0.1, 1), (1, QKV, 0.05, 0),
                   (1, ["mlp.down_proj"], 1e-4, 0)]]}


def row(body: Any = BODY) -> dict[str, Any]:
    made = copy.deepcopy(next(row for row in make_rows() if row["identity"]["variant"] == "tuned-w4"))
    made["building"]["allocation"] = copy.deepcopy(body)
    return made


def test_every_cell_is_there_shaded_by_the_logarithm_and_the_choice_ringed() -> None:
    seen = allocation_of(row())
    assert seen is not None
    picture = heat_map(seen)
    cells = re.findall(r"<g><title>(block \d [a-z, ]+) in (int\d) [^:]+: ([\d.e-]+) nats a token, ([\d.]+) bits"
                       r"(, chosen)?</title><rect [^>]*class=\"heat(\d)\"></rect>(<rect [^>]*class=\"ring\"></rect>)?",
                       picture)
    assert len(cells) == 12 and sum(bool(cell[4]) for cell in cells) == sum(bool(cell[6]) for cell in cells) == 4
    by = {(name, scheme): (float(cost), int(shade), bool(ring)) for name, scheme, cost, _, _, shade, ring in cells}
    assert by["block 0 q, k, v", "int2"] == (0.8, 7, False) and by["block 0 q, k, v", "int4"][2]
    assert by["block 1 down", "int4"][1] == 0
    ordered = sorted(by.values())
    assert [shade for _, shade, _ in ordered] == sorted(shade for _, shade, _ in ordered)
    assert picture.startswith("<svg") and 'role="img"' in picture and "<desc>" in picture


def test_words_say_what_the_picture_shows() -> None:
    seen = allocation_of(row())
    assert seen is not None
    assert in_words(seen) == (
        "Dearest at int2 g32 symmetric: block 0 q, k, v (0.800), block 0 down (0.100), block 1 q, k, v (0.0500); "
        "together 100% of what all layers cost in it; most bits (4.50): block 0 q, k, v. The whole choice was "
        "expected to cost 0.0213 nats a token.")


def test_the_page_has_it_once_and_escapes_names() -> None:
    body = copy.deepcopy(BODY)
    body["groups"][0]["layers"] = [EVIL]
    rows = make_rows()
    rows[3] = row(body)
    text = page(rows, title="t")
    assert text.count('<h2 id="bits">') == 1 and EVIL not in text and '<a href="#bits">Bits by layer</a>' in text
    assert 'id="bits"' not in page(make_rows(), title="t")


@pytest.mark.parametrize("broken", [
    {}, {"groups": []}, {**BODY, "candidates": ["one"]}, {**BODY, "crops": None}, "text",
    {**BODY, "groups": [{**BODY["groups"][0], "chosen": 7}]},
    {**BODY, "groups": [{**BODY["groups"][0], "layers": []}]}])
def test_a_row_that_is_not_whole_has_no_picture(broken: Any) -> None:
    assert allocation_of(row(broken)) is None
    page([row(broken)], title="t")


def test_costs_without_a_logarithm_are_drawn_too() -> None:
    body = copy.deepcopy(BODY)
    for each in body["groups"]:
        each["cost"] = [0.0, -1e-9, float("inf")]
    seen = allocation_of(row(body))
    assert seen is not None and heat_map(seen).count('class="heat0"') == 8 and heat_map(seen).count('"heat7"') == 4

"""Quantized variants with children, as a recipe has them: built, stored, read back, scored, told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import recipe, workplace

import llmops
from llmops.models.fake_quant import packed_layers
from llmops.recipe import parse_recipe
from llmops.report.card import card
from llmops.report.html import page
from llmops.report.words import what

TRAIN = {"data": "train", "max_steps": 2, "learning_rate": 3e-3}
W2 = {"quantize": {"method": "rtn", "scheme": "w2a16", "group_size": 32}}
VARIANTS: dict[str, Any] = {
    "w2": W2,
    "full": {"from": "w2", "finetune": {"method": "full", **TRAIN}},
    "again": {"from": "full", "finetune": {"method": "lora", "rank": 4, **TRAIN}},
    "apart": {"from": "w2", "finetune": {"method": "lora", "merge": False, "rank": 4, **TRAIN}},
    "sparse": {"prune": {"method": "magnitude", "pattern": "2:4"}, "score": False},
    "sparse-w2": {"from": "sparse", **W2, "score": False},
    "sparse-healed": {"from": "sparse-w2", "finetune": {"method": "lora", "rank": 4, **TRAIN}},
    "student": {"from": "sparse-w2", "distill": {"method": "logits", "teacher": "w2", **TRAIN}},
    "merged": {"from": "apart", "quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}, "score": False}}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    place = workplace(tmp_path_factory.mktemp("place"))
    return llmops.run(body_of(place), runs=place / "runs"), place / "runs"


def body_of(place: Path) -> Any:
    return parse_recipe(recipe(VARIANTS), base_dir=place)


def test_every_variant_is_what_was_built(done: tuple[Any, Path]) -> None:
    rows = {row["identity"]["variant"]: row for row in done[0].rows}
    for name in VARIANTS:
        assert rows[name]["status"]["state"] == "ok", (name, rows[name]["status"])
        assert rows[name]["parity"]["ok"], (name, rows[name]["parity"])
    stored = {name: row["transform"]["storage_dtype"] for name, row in rows.items() if name != "base"}
    assert {stored[name] for name in ("w2", "full", "again", "sparse-healed", "student")} == {"int2 g32 symmetric"}
    assert stored["apart"] == "adapter on int2 g32 symmetric" and stored["merged"] == "int4 g32 symmetric"
    for name in ("full", "again", "sparse-healed", "student"):
        assert any("of their codes are others than the parent's" in event for event in rows[name]["log"]["events"])
        assert any(check["name"] == "bits" for check in rows[name]["parity"]["checks"])
    begun = {name: " ".join(rows[name]["log"]["events"]) for name in ("full", "again", "student")}
    assert "begin near those that were quantized" in begun["full"] and "has other weights around it" in begun["again"]
    assert rows["full"]["size"]["disk_bytes"]["value"] < 1.02 * rows["w2"]["size"]["disk_bytes"]["value"]


def test_zeros_come_through_the_whole_chain(done: tuple[Any, Path]) -> None:
    pruned, _ = llmops.load(done[1] / "r" / "sparse")
    start, _ = llmops.load(done[1] / "r" / "sparse-w2", kernel="reference")
    for name in ("sparse-healed", "student"):
        healed, _ = llmops.load(done[1] / "r" / name, kernel="reference")
        woken = 0
        for key, layer in packed_layers(healed).items():
            W = layer.dequantized()
            assert torch.all(W[pruned.get_submodule(key).weight == 0] == 0), (name, key)
            woken += int(((start.get_submodule(key).dequantized() == 0) & (W != 0)).sum())
        assert woken > 0, name  # what rounding alone made zero is free


def test_an_adapter_apart_lies_on_its_parents_build(done: tuple[Any, Path]) -> None:
    folder = (done[1] / "r" / "apart").resolve()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == (done[1] / "r" / "w2").resolve()
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 200_000
    model, _ = llmops.load(folder)
    assert len(packed_layers(model)) == 28


def test_the_report_says_what_was_done(done: tuple[Any, Path]) -> None:
    rows = done[0].rows
    assert "full 2 steps qat" in page(rows, title="r")
    row = next(row for row in rows if row["identity"]["variant"] == "student")
    told = card(row, rows)
    assert what(row) == "logits of w2 2 steps qat"
    assert "int2 g32 symmetric" in json.dumps(row) and "distilled" in told and "compressed-tensors" in told


def test_a_model_that_came_in_integers_is_trained_as_well(done: tuple[Any, Path]) -> None:
    folder = (done[1] / "r" / "w2").resolve()
    given = {"name": "came", "model": str(folder), "evaluate": [{"perplexity": {"data": "prose", "context": 64}}]}
    body = parse_recipe(recipe({"full": {"finetune": {"method": "full", **TRAIN}}}) | given, base_dir=done[1].parent)
    row = llmops.run(body, runs=done[1]).rows[1]
    assert row["status"]["state"] == "ok" and row["parity"]["ok"], row["status"]
    assert row["transform"]["storage_dtype"] == "int2 g32 symmetric"
    assert any("what was quantized is not there" in event for event in row["log"]["events"])


def test_a_second_run_builds_nothing(done: tuple[Any, Path]) -> None:
    again = llmops.run(body_of(done[1].parent), runs=done[1])
    assert [row["row_id"] for row in again.rows] == [row["row_id"] for row in done[0].rows]

"""A whole run with a preference step in its tree."""

import json

import pytest
from tests.runs import TUNED, recipe, workplace

import llmops
from llmops.errors import DataError
from llmops.recipe import parse_recipe

PREFERRED = {"method": "dpo", "data": "pairs", "rank": 4, "max_steps": 3, "learning_rate": 1e-3, "batch_size": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("place"))
    rows = [{"prompt": f"Where is clock {number}?", "better": "in town" + "!" * (number % 3), "worse": "who knows"}
            for number in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def body(variants):
    made = recipe(variants)
    columns = {"prompt": "prompt", "chosen": "better", "rejected": "worse"}
    made["data"] |= {"pairs": {"source": "pairs.jsonl", "split": "[:75%]", "columns": columns},
                     "pairs_test": {"source": "pairs.jsonl", "split": "[75%:]", "columns": columns}}
    made["evaluate"] = [{"preference_accuracy": {"data": "pairs_test"}}]
    return made


def test_a_tree_with_preferences_is_built_scored_and_quantized(place, tmp_path):
    made = body({"tuned": TUNED, "preferred": {"from": "tuned", "finetune": PREFERRED},
                 "w8": {"from": "preferred", "quantize": {"method": "rtn", "scheme": "w8a16"}}})
    result = llmops.run(parse_recipe(made, base_dir=place), runs=tmp_path / "runs")
    rows = {row["identity"]["variant"]: row for row in result.rows}
    assert {name: row["status"]["state"] for name, row in rows.items()} == dict.fromkeys(
        ("base", "tuned", "preferred", "w8"), "ok")
    preferred = rows["preferred"]
    assert preferred["transform"]["chain"] == ["finetune:lora", "finetune:dpo"]
    assert preferred["parity"]["ok"] and preferred["building"]["data"]["reward_margin"] > 0
    assert preferred["building"]["data"]["pairs"] == 30 and preferred["building"]["data"]["pairs_looked_at"] == 12
    assert any("reward margin 0 ->" in event for event in preferred["log"]["events"])
    score = rows["w8"]["quality"]["preference_accuracy:pairs_test"]
    assert score["value"]["n"] == 10 and score["versus"]["parent"]["variant"] == "preferred"
    shown = (tmp_path / "runs" / "r" / "report.html").read_text()
    assert "dpo r4 beta 0.1 3 steps" in shown


@pytest.mark.parametrize(("data", "said"), [
    ("train", "variant preferred: data \"train\" holds rows of kind messages; the step trains on preference")])
def test_rows_of_another_kind_are_found_before_a_step(place, tmp_path, data, said):
    made = body({"preferred": {"finetune": {**PREFERRED, "data": data}}})
    with pytest.raises(DataError, match=said):
        llmops.run(parse_recipe(made, base_dir=place), runs=tmp_path / "runs")

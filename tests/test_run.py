"""Whole runs: nothing twice, nothing lost, and a row that says what happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tests.runs import TUNED, chat, recipe, workplace

import llmops
from llmops.build import variant as build
from llmops.errors import DataError, StepError
from llmops.recipe import parse_recipe

SMALL = {"tuned": TUNED, "w4": {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w4a16"}},
         "mag": {"from": "tuned", "prune": {"method": "magnitude", "sparsity": 0.5}}}
MEASURE = {"prompt_tokens": 8, "new_tokens": 4, "batch_sizes": [1, 2], "repeats": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return workplace(tmp_path_factory.mktemp("place"))


def run(place: Path, runs: Path, variants=None, **more):
    return llmops.run(parse_recipe(recipe(variants or SMALL, **more), base_dir=place), runs=runs)


def states(result) -> dict[str, str]:
    return {row["identity"]["variant"]: row["status"]["state"] for row in result.rows}


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    runs = tmp_path_factory.mktemp("finished") / "runs"
    return runs, run(place, runs, measure=MEASURE, goals={"exact_match": {"max_drop": 1.0}, "prefer": "disk_bytes"})


def test_a_row_holds_every_group_with_provenance(finished):
    _, result = finished
    assert states(result) == {"base": "ok", "tuned": "ok", "w4": "ok", "mag": "ok"}
    row = result.rows[2]
    for group in ("identity", "transform", "parity", "size", "environment", "workload", "latency", "energy", "building",
                  "carbon", "quality", "tokens", "verdict"):
        assert row[group], group
    assert row["transform"]["chain"] == ["finetune:lora", "quantize:rtn"]
    assert row["transform"]["storage_dtype"] == "int4 g128 symmetric"
    assert row["energy"]["1"]["joules_per_token"]["provenance"] in ("measured", "estimated", "null")
    assert row["energy"]["1"]["joules_per_token"]["value"] != 0
    assert row["quality"]["exact_match:test"]["versus"]["parent"]["variant"] == "tuned"
    assert set(row["quality"]["exact_match:test"]["versus"]) >= {"parent", "base"}
    assert row["tokens"]["parent"]["kl_mean"]["value"] > 0
    assert {"measure_energy_j", "evaluate_energy_j"} <= set(row["building"])
    for part in ("evaluate", "measure"):
        assert row["building"][f"{part}_flops"]["provenance"] == "estimated" and row["building"][f"{part}_wall_s"]

    def quantities(body):
        if isinstance(body, dict) and "provenance" in body:
            yield body
        elif isinstance(body, dict):
            for value in body.values():
                yield from quantities(value)

    found = list(quantities(row))
    assert len(found) > 40
    assert all((entry["value"] is None) == (entry["provenance"] == "null") and entry["method"] for entry in found)


def test_the_chain_pays_for_its_ancestors(finished):
    _, result = finished
    rows = {row["identity"]["variant"]: row["building"] for row in result.rows}
    if rows["tuned"]["energy_j"]["value"] is None:
        pytest.skip("no energy sensor and no estimate here")
    total = rows["tuned"]["energy_j"]["value"] + rows["w4"]["energy_j"]["value"]
    assert rows["w4"]["chain_energy_j"]["value"] == pytest.approx(total)


def test_folder_page_card_log_and_links(finished):
    runs, _ = finished
    shown = {path.name for path in (runs / "r").iterdir()}
    assert shown >= {"report.html", "result.json", "recipe.yaml", "log.txt", "tuned", "w4", "mag"}
    folder = runs / "r" / "w4"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json",
                                                        "README.md", "llmops.json"}
    front = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "transformers"
    assert json.loads((folder / "llmops.json").read_text())["parity"]["ok"]
    assert not list((runs / "store").glob(".*"))


def test_a_second_run_does_no_work_and_imports_no_torch(finished, place):
    runs, first = finished
    body = recipe(SMALL, measure=MEASURE, goals={"exact_match": {"max_drop": 1.0}, "prefer": "disk_bytes"})
    script = ("import json, sys, llmops; from pathlib import Path; from llmops.recipe import parse_recipe\n"
              "found = llmops.run(parse_recipe(json.loads(sys.argv[1]), base_dir=Path(sys.argv[2])),\n"
              "                   runs=sys.argv[3])\n"
              "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
              "print(json.dumps([row['row_id'] for row in found.rows]))")
    done = subprocess.run([sys.executable, "-c", script, json.dumps(body), str(place), str(runs)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [row["row_id"] for row in first.rows]


def test_a_card_that_changes_is_written_and_nothing_else_is_done(finished, place):
    runs, first = finished
    goals = {"exact_match": {"max_drop": 1.0}, "prefer": "disk_bytes"}
    before = {path: path.stat().st_mtime_ns for path in (runs / "store").rglob("*.safetensors")}
    result = run(place, runs, measure=MEASURE, goals=goals, name="carded", card={"intended_use": "telling towns"})
    assert {path: path.stat().st_mtime_ns for path in (runs / "store").rglob("*.safetensors")} == before
    assert [row["quality"] for row in result.rows] == [row["quality"] for row in first.rows]  # not scored again
    assert all(row["card"] == {"intended_use": "telling towns"} for row in result.rows)
    assert "telling towns" in (runs / "carded" / "w4" / "README.md").read_text()
    assert "telling towns" in (runs / "carded" / "report.html").read_text()
    again = run(place, runs, measure=MEASURE, goals=goals, name="carded", card={"intended_use": "telling lakes"})
    assert "telling lakes" in (runs / "carded" / "w4" / "README.md").read_text()
    assert [row["row_id"] for row in again.rows] != [row["row_id"] for row in result.rows]


def test_another_recipe_with_the_same_prefix_builds_only_the_rest(finished, place):
    runs, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in (runs / "store").iterdir()}
    result = run(place, runs, {**SMALL, "w8": {"from": "tuned", "quantize": {"method": "rtn", "scheme": "w8a16"}}},
                 measure=MEASURE, name="other")
    assert set(states(result).values()) == {"ok"}
    after = {path.name for path in (runs / "store").iterdir()}
    assert len(after) == len(before) + 1 and set(before) < after


def test_a_step_that_fails_says_why_and_its_siblings_go_on(place, tmp_path, monkeypatch):
    def broken(job, options):
        raise StepError("the loss became nan at optimizer step 3, on rows 1, 2")

    monkeypatch.setitem(build.STEPS, ("prune", "magnitude"), broken)
    variants = {**SMALL, "mag-w4": {"from": "mag", "quantize": {"method": "rtn", "scheme": "w4a16"}}}
    result = run(place, tmp_path, variants)
    assert states(result) == {"base": "ok", "tuned": "ok", "w4": "ok", "mag": "failed", "mag-w4": "skipped"}
    assert "rows 1, 2" in result.rows[3]["status"]["reason"]
    assert result.exit_code == 3
    monkeypatch.undo()
    assert states(run(place, tmp_path, variants)) == dict.fromkeys(["base", "tuned", "w4", "mag", "mag-w4"], "ok")


def test_a_variant_that_is_not_what_was_built_is_broken_and_cannot_win(place, tmp_path, monkeypatch):
    def half_kept(job, options):
        work = original(job, options)
        work.expected = build.parity.Expected(sparsity=0.9)
        return work

    original = build.STEPS["prune", "magnitude"]
    monkeypatch.setitem(build.STEPS, ("prune", "magnitude"), half_kept)
    result = run(place, tmp_path, {"mag": {"prune": {"method": "magnitude", "sparsity": 0.5}}},
                 goals={"prefer": "disk_bytes"})
    row = result.rows[1]
    assert row["status"]["state"] == "broken" and "0.900 asked for" in row["status"]["reason"]
    assert not row["verdict"]["winner"] and result.exit_code == 3


def test_goals_decide_the_winner_and_the_exit_code(place, tmp_path):
    met = run(place, tmp_path, SMALL, goals={"exact_match": {"max_drop": 1.0}, "prefer": "disk_bytes"})
    assert met.winner == "w4" and met.exit_code == 0
    missed = run(place, tmp_path, SMALL, goals={"exact_match": {"min": 1.0}})
    assert missed.winner is None and missed.exit_code == 1
    assert [goal["met"] for goal in missed.rows[1]["verdict"]["goals"]] == [False]


def test_killed_anywhere_the_same_command_goes_on(place, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe(SMALL), "model": str(place / "model"), "data": {
        name: {**source, **({"source": str(place / source["source"])} if "source" in source else {})}
        for name, source in recipe(SMALL)["data"].items()}}))
    command = [sys.executable, "-m", "llmops", "tune", str(path), "--runs", str(tmp_path / "runs"), "--quiet"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(lambda: len(_rows(tmp_path / "runs")) >= 2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = _built(tmp_path / "runs")
    assert kept
    rows = [row["row_id"] for row in _rows(tmp_path / "runs")]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    found = _rows(tmp_path / "runs")
    assert [row["status"]["state"] for row in found] == ["ok"] * 4
    assert set(rows) <= {row["row_id"] for row in found}
    assert kept.items() <= _built(tmp_path / "runs").items()  # what was built before the kill was not built again


def test_an_interrupt_exits_with_130_and_keeps_the_state(place, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe(SMALL), "model": str(place / "model"), "data": {
        name: {**source, **({"source": str(place / source["source"])} if "source" in source else {})}
        for name, source in recipe(SMALL)["data"].items()}}))
    child = subprocess.Popen([sys.executable, "-m", "llmops", "tune", str(path), "--runs", str(tmp_path / "runs")],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: len(_rows(tmp_path / "runs")) >= 1)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    assert child.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert len(_rows(tmp_path / "runs")) >= 1
    assert not list((tmp_path / "runs" / "store").glob(".*"))


@pytest.mark.parametrize(("rows", "message"), [
    ([chat("Where does Ada 0 live?", "lake")], r"1 of 24 rows of test stand in the training data"),
    ([{"messages": [{"role": "user", "content": "x"}]}], "assistant"),
    ([], "empty|no rows"),
])
def test_bad_training_data_is_refused_before_anything_is_built(place, tmp_path, rows, message):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if len(rows) == 1 and "Ada" in str(rows):
        (tmp_path / "train.jsonl").write_text((place / "test.jsonl").read_text().splitlines()[0] + "\n")
    body = recipe(SMALL)
    body["data"]["train"]["source"] = str(tmp_path / "train.jsonl")
    with pytest.raises((DataError, llmops.RecipeError), match=message):
        llmops.run(parse_recipe(body, base_dir=place), runs=tmp_path / "runs")
    assert not (tmp_path / "runs" / "store").exists()


def test_scores_do_not_depend_on_when_they_are_computed(finished, place, tmp_path):
    _, first = finished
    again = run(place, tmp_path, SMALL)
    assert [row["quality"]["perplexity:prose"]["value"]["value"] for row in again.rows] == [
        row["quality"]["perplexity:prose"]["value"]["value"] for row in first.rows]


def test_an_unscored_variant_has_a_row_and_no_scores(place, tmp_path):
    result = run(place, tmp_path, {"tuned": {**TUNED, "score": False}, "w4": SMALL["w4"]})
    assert states(result) == {"base": "ok", "tuned": "ok", "w4": "ok"}
    assert not result.rows[1]["quality"] and result.rows[2]["quality"]
    again = run(place, tmp_path, {"tuned": {**TUNED, "score": False}, "w4": SMALL["w4"]})
    assert [row["row_id"] for row in again.rows] == [row["row_id"] for row in result.rows]


def test_no_pickle_is_ever_loaded(place, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (place / "model").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({"model.norm.weight": torch.ones(128)}, folder / "pytorch_model.bin")
    with pytest.raises(llmops.ModelError, match="pickles"):
        llmops.load(folder)


def _built(runs: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (runs / "store").glob("[!.]*/llmops.json")}


def _rows(runs: Path) -> list[dict]:
    if not (runs / "ledger.db").exists():
        return []
    try:
        return llmops.Ledger(runs / "ledger.db").rows()
    except llmops.StoreError:
        return []


def _wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.05)

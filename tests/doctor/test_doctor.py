"""The doctor: the machine, and a recipe rehearsed on a two-layer twin."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tests.runs import TUNED, recipe, workplace

from llmops.doctor import examine, exit_code, rehearse, render
from llmops.doctor.checklist import Checklist
from llmops.doctor.machine import KNOWN_GOOD
from llmops.doctor.rehearsal import rehearsed
from llmops.errors import RecipeError, StoreError
from llmops.models.twin import make_twin
from llmops.recipe import load_recipe

ROOT = Path(__file__).parent.parent.parent


def written(folder: Path, body: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_the_machine_is_looked_over(tmp_path):
    checks = {check.name: check for check in examine(tmp_path / "runs")}
    assert {"python", "torch", "transformers", "processor", "gpu" if not torch.cuda.is_available() else "gpu 0",
            "memory", "energy", "kernel w4a16", "disk", "hub"} <= set(checks)
    assert checks["torch"].state == checks["kernel w8a16"].state == "ok"
    assert exit_code(list(checks.values())) == 0
    assert not (tmp_path / "runs").exists()


def test_a_place_that_cannot_be_written_fails(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError("Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    checks = {check.name: check for check in examine(tmp_path)}
    assert checks["disk"].state == "fail" and "--runs" in checks["disk"].cure
    assert exit_code(list(checks.values())) == 3


def test_known_good_versions_are_those_of_the_constraints():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
                  if "==" in line and not line.startswith("#"))
    for package, (tested, _) in KNOWN_GOOD.items():
        assert not tested or pinned[package] == tested, package


def test_a_failed_check_does_not_end_the_list():
    found = Checklist()
    with found.trying("first", "mend it"):
        raise StoreError("no room")
    with found.trying("second"):
        raise ZeroDivisionError
    found.add("third", "ok", "fine")
    assert [(check.state, check.detail) for check in found.checks] == [
        ("fail", "no room"), ("fail", "ZeroDivisionError: no message"), ("ok", "fine")]
    assert render(found.checks).splitlines() == [
        "x first   no room", "          -> mend it", "x second  ZeroDivisionError: no message", "+ third   fine"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_a_twin_keeps_what_is_not_a_size(tmp_path, name):
    workplace(tmp_path, name)
    path = tmp_path / "model" / "config.json"
    wide = json.loads(path.read_text())
    wide |= {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32 if name != "qwen2" else 16,
             "num_key_value_heads": 8 if name != "gemma3" else 1}
    path.write_text(json.dumps(wide))
    sizes = make_twin(tmp_path / "model", tmp_path / "twin")
    narrow = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert sizes["layers"] == narrow["num_hidden_layers"] == 2 and sizes["hidden"] <= 512
    assert narrow["hidden_size"] % 128 == 0 and narrow["intermediate_size"] <= 2 * narrow["hidden_size"]
    if name != "gemma3":
        assert (narrow["num_attention_heads"] // narrow["num_key_value_heads"]
                == wide["num_attention_heads"] // wide["num_key_value_heads"])
    kept = {"model_type", "vocab_size", "tie_word_embeddings", "rope_parameters", "sliding_window", "attention_bias"}
    assert {key: narrow.get(key) for key in kept} == {key: wide.get(key) for key in kept}
    if "layer_types" in narrow:
        assert narrow["layer_types"] == wide["layer_types"][:2]
    assert (tmp_path / "twin" / "chat_template.jinja").read_text() == (
        tmp_path / "model" / "chat_template.jinja").read_text()


def test_what_is_rehearsed_is_the_recipe_made_short(tmp_path):
    folder = workplace(tmp_path)
    body = recipe({
        "tuned": {"finetune": {**TUNED["finetune"], "max_steps": 400, "rank": 64, "stop": {"every": 50}}},
        "again": {"finetune": {**TUNED["finetune"], "rank": 8}},
        "half": {"from": "tuned", "prune": {"method": "depth", "layers": 3}},
        "w4": {"from": "half", "quantize": {"method": "rtn", "scheme": "w4a16"}}})
    short = rehearsed(load_recipe(written(folder, body)), folder / "model")
    assert short["variants"]["tuned"]["finetune"] | {"data": 0, "learning_rate": 0} == {
        "method": "lora", "data": 0, "learning_rate": 0, "max_steps": 2, "batch_size": 2, "accumulate": 1,
        "warmup": 0.0, "max_length": 128, "rank": 8, "stop": {"every": 1}}
    assert "again" not in short["variants"]  # the same step and method as tuned
    assert short["variants"]["half"]["prune"]["layers"] == 1
    assert {"doctor-adapter", "doctor-student"} <= set(short["variants"])
    assert "doctor-w4" not in short["variants"] and "doctor-half" not in short["variants"]
    assert Path(short["data"]["train"]["source"]).is_absolute()


def test_what_its_teacher_answers_is_rehearsed_on_labelled_rows(tmp_path):
    recipe = load_recipe(str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml"))
    student = rehearsed(recipe, tmp_path)["variants"]["student"]["distill"]
    assert recipe.variants["student"].options.answers == "teacher"
    assert student["data"] == "train" and "answers" not in student and student["max_steps"] == 2


def test_pairs_that_train_every_weight_are_rehearsed_so(tmp_path):
    folder = workplace(tmp_path)
    body = recipe({"all": {"finetune": {"method": "dpo", "data": "train", "rank": None}}})
    short = rehearsed(load_recipe(written(folder, body)), folder / "model")
    assert short["variants"]["all"]["finetune"]["rank"] is None


def test_a_recipe_on_a_qwen3_goes_through_every_stage(tmp_path):
    folder = workplace(tmp_path, "qwen3")
    body = recipe({"tuned": TUNED, "wanda": {"from": "tuned", "prune": {
        "method": "wanda", "sparsity": 0.5, "data": "calib", "length": 32}}})
    checks = rehearse(str(written(folder, body)))
    assert not [check for check in checks if check.state == "fail"], render(checks)
    names = " ".join(check.name for check in checks)
    for stage in ("data train", "twin", "kill and resume", "finetune lora", "prune wanda", "prune depth",
                  "distill logits", "quantize rtn", "export", "longest batch"):
        assert stage in names, stage
    killed = next(check for check in checks if check.name == "kill and resume")
    assert re.search("went on from its checkpoint; losses equal to the last bit", killed.detail)


def test_a_template_that_drops_its_terminator_is_found(tmp_path):
    folder = workplace(tmp_path)
    template = folder / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("message['content'] + '<|end|>'", "message['content']", 1))
    checks = rehearse(str(written(folder, recipe({"tuned": TUNED}))))
    assert exit_code(checks) == 3
    data = next(check for check in checks if check.name == "data")
    assert data.state == "fail" and "no end-of-turn token" in data.detail


def test_an_invalid_recipe_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\nname: r\nmodle: builtin:tiny\n")
    with pytest.raises(RecipeError, match="r.yaml:3:1"):
        rehearse(str(path))

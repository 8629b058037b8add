"""`llmops export` over a run: what is found, what is written down, what is refused, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import TUNED, recipe, workplace

from llmops import cli
from llmops.api import load
from llmops.errors import LlmopsError, ModelError, StepError
from llmops.export import RECORD, export, exported
from llmops.formats import awq, gptq
from llmops.runner import run

VARIANTS: dict[str, Any] = {
    "w4": {"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}},
    "adapter": {"finetune": {**TUNED["finetune"], "merge": False, "max_steps": 1}}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs of a finished recipe."""
    place = workplace(tmp_path_factory.mktemp("work"))
    given = recipe(VARIANTS, model=str(place / "model"))
    given["data"] = {"train": {"source": str(place / "train.jsonl")}, "prose": {"source": str(place / "prose.txt")}}
    given["evaluate"] = [{"perplexity": {"data": "prose", "context": 64, "max_tokens": 256}}]
    assert run(given, runs=place / "runs").failed == []
    return place / "runs"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (awq, gptq):  # read by the decoder, whether GPTQModel is here or not
        monkeypatch.setattr(module, "find_spec", lambda _: None)


def test_a_variant_of_the_latest_run(runs: Path, tmp_path: Path) -> None:
    before = (runs / "ledger.db").read_bytes()
    record = export("w4", "gptq", runs=str(runs))
    out = tmp_path / "w4-gptq"
    assert record["folder"] == str(out) and record["max_logit_difference"]["value"] == 0
    assert record["bytes"]["value"] > (out / "model.safetensors").stat().st_size
    kept = json.loads((out / "llmops.json").read_text())["export"]
    assert kept == {key: value for key, value in record.items() if key != "folder"}
    assert (kept["run"], kept["variant"], kept["chain"]) == ("r", "w4", ["quantize:rtn"])
    assert (runs / "ledger.db").read_bytes() == before
    ids = torch.arange(8)[None]
    theirs, ours = load(out, kernel="reference")[0](ids).logits, load(runs / "r" / "w4", kernel="reference")[0](ids)
    assert torch.equal(theirs, ours.logits)
    export("w4", "awq", run="r", runs=str(runs), out=tmp_path / "other")
    assert [each["format"] for each in json.loads((runs / "r" / RECORD).read_text())][-2:] == ["gptq", "awq"]
    shown = (runs / "r" / "report.html").read_text()
    assert shown.count('<td>gptq</td><td>' + record["reader"]) == shown.count("<td>awq</td>") == 1
    export("w4", "gptq", run="r", runs=str(runs), out=tmp_path / "again")
    assert (runs / "r" / "report.html").read_text().count("<td>gptq</td>") == 1  # the newest of a variant and format
    assert exported(tmp_path) == []


def test_an_adapter_apart_is_merged_first_and_base_is_found(runs: Path) -> None:
    record = export("adapter", "dense", runs=str(runs))
    assert record["notes"] == ["the adapter apart was merged into its base first"]
    assert record["kl_mean"]["value"] < 1e-6
    config = json.loads((Path(record["folder"]) / "config.json").read_text())
    assert config["model_type"] == "llama" and not (Path(record["folder"]) / "adapter_config.json").exists()
    assert export("base", "dense", runs=str(runs))["max_logit_difference"]["value"] == 0


def test_an_exported_folder_can_be_what_a_recipe_starts_from(runs: Path, tmp_path: Path) -> None:
    """Packed stays packed: it is scored and exported on; a step that needs 16 bit is refused before anything runs."""
    out = Path(export("w4", "gptq", runs=str(runs))["folder"])
    given = recipe({}, model=str(out), name="imported")
    given["data"] = {"prose": {"source": str(runs.parent / "prose.txt")},
                     "train": {"source": str(runs.parent / "train.jsonl")}}
    given["evaluate"] = [{"perplexity": {"data": "prose", "context": 64, "max_tokens": 256}}]
    (row,) = run(given, runs=tmp_path / "runs").rows
    theirs = json.loads((runs / "r" / "result.json").read_text())
    was = next(each for each in theirs if each["identity"]["variant"] == "w4")
    ours, other = (score["value"]["value"] for each in (row, was) for score in each["quality"].values())
    assert ours == pytest.approx(other, rel=1e-3)
    assert row["size"]["weights_bytes"]["value"] == was["size"]["weights_bytes"]["value"]
    assert export("base", "awq", runs=str(tmp_path / "runs"))["kl_mean"]["value"] < 1e-6
    with pytest.raises(LlmopsError, match="given a base model that is quantized already"):
        again = {"quantize": {"method": "rtn", "scheme": "w4a16"}}
        run({**given, "variants": {"again": again}}, runs=tmp_path / "runs")


def test_places_that_are_taken(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(LlmopsError, match="mine: is there, and is no export; expected a new folder"):
            export("w4", "gptq", runs=str(runs), out="mine", force=force)
    export("w4", "gptq", runs=str(runs), out="ours")
    with pytest.raises(LlmopsError, match="ours: an export is there; .* or write over it with --force"):
        export("w4", "awq", runs=str(runs), out="ours")
    assert export("w4", "awq", runs=str(runs), out="ours", force=True)["format"] == "awq"
    assert "awq" in (tmp_path / "ours" / "config.json").read_text()
    assert not (tmp_path / "ours" / "quantize_config.json").exists()


def test_what_breaks_leaves_nothing(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export("w4", "gptq", runs=str(runs), out="kept")
    noted = (runs / "r" / RECORD).read_text()
    with pytest.raises(LlmopsError, match="holds integers"):
        export("base", "gptq", runs=str(runs), out="new")

    def broken(*_: Any) -> Any:
        raise OSError("disk full")

    monkeypatch.setattr(gptq, "state_logits", broken)
    with pytest.raises(LlmopsError, match="disk full"):
        export("w4", "gptq", runs=str(runs), out="kept", force=True)
    def lost(*_: Any) -> Any:
        raise NotImplementedError("no such op\nand more")

    monkeypatch.setattr(gptq, "state_logits", lost)
    with pytest.raises(StepError, match="gptq: could not be written or read back .NotImplementedError: no such op.;"):
        export("w4", "gptq", runs=str(runs), out="new")
    (tmp_path / "file").write_text("")
    with pytest.raises(LlmopsError, match="cannot be made .*; expected a folder that can be written to: .* --out"):
        export("w4", "gptq", runs=str(runs), out="file/new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept"]
    assert json.loads((tmp_path / "kept" / "llmops.json").read_text())["export"]["format"] == "gptq"
    assert (runs / "r" / RECORD).read_text() == noted


@pytest.mark.parametrize(("words", "match"), [
    (("w5", "gptq"), 'unknown variant "w5"; expected one of base, w4, adapter'),
    (("w4", "gtpq"), 'unknown format "gtpq"; .*; did you mean "gptq"'), (("./nowhere", "gptq"), "no model folder"),
    (("builtin:huge", "dense"), 'unknown built-in model "builtin:huge"')])
def test_names_that_are_not_there(words: tuple[str, str], match: str, runs: Path) -> None:
    with pytest.raises((LlmopsError, ModelError), match=match):
        export(*words, runs=str(runs))


def test_a_folder_without_a_run_and_the_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LlmopsError, match="empty: holds neither config.json nor adapter_config.json"):
        export("empty", "dense", runs=str(tmp_path / "none"))
    folder = str(runs.parent / "model")
    assert cli.main(["export", folder, "--to", "safetensors", "--runs", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == str(tmp_path / "model-safetensors")
    assert "read back by transformers: largest logit difference 0.00e+00" in out[1]
    assert not (tmp_path / "none").exists()
    assert cli.main(["export", folder, "--to", "dense", "--json", "--out", "x"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == folder
    assert cli.main(["export", folder]) == 2 and "--to" in capsys.readouterr().err

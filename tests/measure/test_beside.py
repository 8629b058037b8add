"""Two who measure at once know of each other, whichever comes first; what a dead process left means nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.runs import recipe, workplace

from llmops.cli import main
from llmops.errors import LlmopsError
from llmops.measure.beside import alone, beside


def test_both_know_of_each_other_even_when_one_lies_within_the_other(tmp_path: Path) -> None:
    with beside(folder=tmp_path) as first:
        with beside(folder=tmp_path) as second:
            pass
        assert first.found == [] and len(second.found) == 1
    assert first.found == second.found  # one process here, so the lines are the same
    assert list(tmp_path.iterdir()) == []


def test_alone_is_alone_and_left_files_go(tmp_path: Path) -> None:
    (tmp_path / "4711-dead.measuring").write_text("")
    with beside(exclusive=True, folder=tmp_path) as found:
        assert not (tmp_path / "4711-dead.measuring").exists()
    assert found.found == []


def test_exclusive_refuses_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    with beside(folder=tmp_path), pytest.raises(LlmopsError, match="without --exclusive"), beside(True, None, tmp_path):
        raise AssertionError("was let in")
    with pytest.raises(LlmopsError, match="exclusive"), beside(True, None, tmp_path), beside(folder=tmp_path):
        pass


def test_who_only_looks_is_refused_and_not_told_of(tmp_path: Path) -> None:
    alone(tmp_path / "no folder yet")
    refused = pytest.raises(LlmopsError, match=r"llmops process \d+ measures on this machine; expected nobody")
    with beside(folder=tmp_path) as found, refused:
        alone(tmp_path)
    assert found.found == []
    alone(tmp_path)


def test_an_exclusive_run_is_not_begun_beside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("llmops.measure.beside._folder", lambda: tmp_path / "measuring")
    workplace(tmp_path)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe({"w8": {"quantize": {"method": "rtn", "scheme": "w8a16"}}},
                                                       measure={"sensor": "declared", "watts": 5, "prompt_tokens": 8,
                                                                "new_tokens": 2})))
    with beside(folder=tmp_path / "measuring"):
        assert main(["tune", str(tmp_path / "r.yaml"), "--runs", str(tmp_path / "runs"), "--exclusive"]) == 2
    assert "measures on this machine; expected nobody: wait for them" in capsys.readouterr().err
    store = tmp_path / "runs" / "store"
    assert not store.exists() or list(store.iterdir()) == []


def test_others_on_the_gpu_count(tmp_path: Path) -> None:
    gpus = [{"name": "A100", "other_processes": 0}, {"name": "H100", "other_processes": 2}]
    with beside(gpus=gpus, folder=tmp_path) as found:
        pass
    assert found.found == ["H100 runs 2 other process(es)"]
    with pytest.raises(LlmopsError, match="H100 runs 2"), beside(True, gpus, tmp_path):
        pass


def test_a_folder_that_takes_no_files_hides_the_others_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with beside(folder=tmp_path / "file" / "sub") as found:
        pass
    assert found.found == []

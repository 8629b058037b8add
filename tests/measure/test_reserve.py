"""A machine held for a whole run: who comes second is refused before anything is done, and told who is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.runs import recipe, workplace

from llmops.cli import main
from llmops.errors import LlmopsError
from llmops.measure import beside
from llmops.measure.reserve import reserved
from llmops.progress import Watcher
from llmops.recipe import parse_recipe
from llmops.runner import run

SMALL = {"prompt_tokens": 4, "new_tokens": 2, "batch_sizes": [1], "repeats": 2, "sensor": "none"}
W8 = {"w8": {"quantize": {"method": "rtn", "scheme": "w8a16"}}}


def test_those_who_share_do_not_see_each_other_and_leave_nothing(tmp_path: Path) -> None:
    with reserved(False, "run a", tmp_path), reserved(False, "run b", tmp_path):
        assert len(list(tmp_path.glob("*.run"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["machine.lock"]


@pytest.mark.parametrize("first, second, said", [
    (True, True, r"asked for exclusively, and others are at work on it: process \d+ \(run a, since .*\)"),
    (False, True, r"asked for exclusively.*process \d+ \(run a"),
    (True, False, r"the machine is held exclusively: process \d+ \(run a")])
def test_who_comes_second_is_told_who_is_there(tmp_path: Path, first: bool, second: bool, said: str) -> None:
    with reserved(first, "run a", tmp_path), pytest.raises(LlmopsError, match=said), reserved(second, "b", tmp_path):
        raise AssertionError("was let in")
    with reserved(True, "run c", tmp_path):  # free at once
        pass


def test_a_holder_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    script = ("import sys, time\nfrom pathlib import Path\nfrom llmops.measure.reserve import reserved\n"
              "with reserved(True, 'run gone', Path(sys.argv[1])):\n    print('held', flush=True)\n"
              "    time.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(LlmopsError, match=f"process {process.pid} .run gone"), reserved(False, "x", tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with reserved(True, "next", tmp_path):
        with pytest.raises(LlmopsError, match=f"process {os.getpid()}"), reserved(True, "y", tmp_path):
            pass
        assert len(list(tmp_path.glob("*.run"))) == 1  # what the dead one left is gone


def test_a_place_where_nothing_can_be_locked_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with reserved(True, "a", tmp_path / "file" / "sub"), reserved(True, "b", tmp_path / "file" / "sub"):
        pass


def test_a_second_exclusive_run_is_refused_at_its_start_and_loses_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(beside, "shared_folder", lambda: tmp_path / "machine")
    place, runs = workplace(tmp_path), tmp_path / "runs"
    body = recipe(W8, measure={**SMALL, "exclusive": True})
    body["evaluate"] = body["evaluate"][:1]
    import yaml

    (place / "r.yaml").write_text(yaml.safe_dump(body))
    with reserved(False, "run other", tmp_path / "machine"):
        assert main(["tune", str(place / "r.yaml"), "--runs", str(runs), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "asked for exclusively" in said and "run other" in said
    assert not list((runs / "store").glob("*")) if (runs / "store").exists() else True
    with reserved(True, "run other", tmp_path / "machine"), pytest.raises(LlmopsError, match="held exclusively"):
        run(parse_recipe({**body, "measure": SMALL}, base_dir=place), runs=runs)
    result = run(parse_recipe(body, base_dir=place), runs=runs)
    assert {row["status"]["state"] for row in result.rows} == {"ok"}
    with reserved(True, "run other", tmp_path / "machine"):  # nothing is left to measure, so nobody is in the way
        assert run(parse_recipe(body, base_dir=place), runs=runs).exit_code == 0


def test_a_run_that_only_trains_is_seen_and_refused_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "shared_folder", lambda: tmp_path / "machine")
    place, runs = workplace(tmp_path), tmp_path / "runs"
    plain = parse_recipe(recipe(W8), base_dir=place)
    with reserved(True, "run other", tmp_path / "machine"), pytest.raises(LlmopsError, match="held exclusively"):
        run(plain, runs=runs)
    seen: list[str] = []

    class Looks(Watcher):
        def note(self, line: str) -> None:
            pass

        def progress(self, *_: object, **__: object) -> None:
            seen.extend(each["what"] for each in beside.holders(tmp_path / "machine"))

    assert run(plain, runs=runs, watcher=Looks(quiet=True)).exit_code == 0
    assert set(seen) == {f"run {plain.name}"}


@pytest.mark.parametrize("words", [["explain", "demo", "w8"], ["export", "w8", "--to", "gguf"], ["doctor", "demo"],
                                   ["bench", "kernels"], ["bench", "models", "builtin:tiny"]])
def test_whatever_computes_is_refused_beside_one_that_has_the_machine_alone(
        words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(beside, "shared_folder", lambda: tmp_path)
    with reserved(True, "run other", tmp_path):
        assert main(words) == 2
    assert "held exclusively: process" in capsys.readouterr().err

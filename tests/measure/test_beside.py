"""Two who measure at once know of each other, whichever comes first; what a dead process left means nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmops.errors import LlmopsError
from llmops.measure.beside import beside
from llmops.measure.reserve import reserved


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


def test_work_that_is_not_measured_is_seen_at_both_ends_and_in_between(tmp_path: Path) -> None:
    script = ("import sys\nfrom pathlib import Path\nfrom llmops.measure.reserve import reserved\n"
              "with reserved(False, 'run training', Path(sys.argv[1])):\n    print('here', flush=True)\n"
              "    sys.stdin.read()\n")

    def worker() -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        return process

    first = worker()
    with pytest.raises(LlmopsError, match="run training"), beside(True, None, tmp_path):
        pass
    with reserved(False, "run ours", tmp_path), beside(folder=tmp_path) as found:  # our own hold is not another
        assert found.found == [f"llmops process {first.pid} is at work on this machine (run training)"]
        first.communicate("")
        second = worker()
        second.communicate("")  # came and went
    assert found.found[1:] == [f"llmops process {second.pid} is at work on this machine"]

"""A variant folder is whole or absent."""

import os
import signal
import subprocess
import sys

import pytest

from llmops.errors import StoreError
from llmops.models.save import staged


def test_a_block_that_ends_well_leaves_the_folder_and_nothing_else(tmp_path):
    with staged(tmp_path / "key") as scratch:
        (scratch / "a").write_text("1")
        assert not (tmp_path / "key").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_block_that_breaks_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "key") as scratch:
        (scratch / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_middle_the_place_is_empty_and_the_next_try_works(tmp_path):
    script = ("import sys, time; from pathlib import Path; from llmops.models.save import staged\n"
              "with staged(Path(sys.argv[1])) as scratch:\n"
              "    (scratch / 'a').write_text('half'); print('in', flush=True); time.sleep(60)\n")
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "key")], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "in\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "key").exists()
    with staged(tmp_path / "key") as scratch:
        (scratch / "a").write_text("whole")
    assert (tmp_path / "key" / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_the_second_of_two_that_build_the_same_keeps_what_is_there(tmp_path):
    with staged(tmp_path / "key") as slow:
        (slow / "a").write_text("slow")
        with staged(tmp_path / "key") as fast:
            (fast / "a").write_text("fast")
    assert (tmp_path / "key" / "a").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_place_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--runs"), staged(tmp_path / "file" / "key"):
        pass

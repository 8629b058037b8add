"""One holder at a time, free at once when the holder dies, also where the file system knows no flock."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmops import locks as module
from llmops.errors import StoreError
from llmops.locks import Holder, Locks, alive

ROOT = Path(__file__).parent.parent
PATHS = os.environ | {"PYTHONPATH": str(ROOT / "src")}


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)


@pytest.fixture(params=["flock", "beat"])
def kind(request):
    if request.param == "beat":
        request.getfixturevalue("no_flock")
    return request.param


def test_one_holder_at_a_time_and_nothing_is_left(tmp_path, kind):
    first, second = Locks(tmp_path), Locks(tmp_path)
    lock = first.take("a")
    assert lock is not None
    with lock:
        assert second.take("a") is None and first.take("a") is None
        other = second.take("b")
        assert other is not None
        with other:
            assert {path.suffix for path in tmp_path.iterdir()} == {".lock" if kind == "flock" else ".beat"}
        holder = second.holder("a")
        assert holder is not None and holder.pid == os.getpid() and str(os.getpid()) in str(holder)
    again = second.take("a")
    assert again is not None
    with again:
        pass
    assert not list(tmp_path.iterdir()) and second.holder("a") is None


HOLD = """
import errno, sys, time
from pathlib import Path
from llmops import locks
if sys.argv[2] == "beat":
    def refuse(*given): raise OSError(errno.ENOLCK, "")
    locks.fcntl.flock = refuse
held = locks.Locks(Path(sys.argv[1])).take("a")
print("held", flush=True)
time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, kind):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), kind], env=PATHS, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        locks = Locks(tmp_path)
        assert locks.take("a") is None
        holder = locks.holder("a")
        assert holder is not None and holder.pid == child.pid
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    lock = locks.take("a")
    assert lock is not None
    with lock:
        holder = locks.holder("a")
        assert holder is not None and holder.pid == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_heartbeat_that_stopped_elsewhere_is_taken_over_by_our_clock(tmp_path, no_flock, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    beat = tmp_path / "a.beat"
    beat.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "then", "command": "llmops", "token": "x"}))
    os.utime(beat, ns=(10**18, 10**18))  # the other host's clock may say anything
    locks = Locks(tmp_path, stale_s=60)
    assert locks.take("a") is None
    clock[0] = 59.0
    assert locks.take("a") is None
    os.utime(beat, ns=(2 * 10**18, 2 * 10**18))  # it beats
    clock[0] = 100.0
    assert locks.take("a") is None
    clock[0] = 161.0
    lock = locks.take("a")
    assert lock is not None
    with lock:
        holder = locks.holder("a")
        assert holder is not None and holder.pid == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_live_heartbeat_beats_and_a_lock_that_was_taken_over_is_not_removed(tmp_path, no_flock):
    lock = Locks(tmp_path, stale_s=0.06).take("a")
    assert lock is not None
    beat = tmp_path / "a.beat"
    with lock:
        first, end = beat.stat().st_mtime_ns, time.monotonic() + 60
        while beat.stat().st_mtime_ns == first:
            assert time.monotonic() < end
            time.sleep(0.01)
        taken = json.loads(beat.read_text()) | {"token": "another"}
        beat.write_text(json.dumps(taken))
    assert beat.exists()


def test_who_is_quicker_at_a_stale_file_keeps_it(tmp_path):
    """Two take over at once: the slower one finds the live lock of the quicker in its hands, and puts it back."""
    beat = tmp_path / "a.beat"
    stale = {"pid": 1, "host": "elsewhere", "since": "then", "command": "llmops", "token": "stale"}
    beat.write_text(json.dumps(stale))
    read = module._read

    def late(path):
        found = read(path)
        if path == beat:
            beat.write_text(json.dumps(stale | {"token": "quicker"}))
        return found

    module._read, before = late, module._read
    try:
        assert not Locks(tmp_path)._clear(beat)
    finally:
        module._read = before
    assert json.loads(beat.read_text())["token"] == "quicker"
    assert [path.name for path in tmp_path.iterdir()] == ["a.beat"]


COUNT = """
import sys, time
from pathlib import Path
from llmops.locks import Locks
folder, locks = Path(sys.argv[1]), Locks(Path(sys.argv[1]) / "locks")
for _ in range(100):
    while (lock := locks.take("counter")) is None:
        time.sleep(0.0005)
    with lock:
        value = int((folder / "count").read_text())
        (folder / "count").write_text(str(value + 1))
"""


def test_many_processes_never_hold_it_together(tmp_path):
    (tmp_path / "count").write_text("0")
    children = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)], env=PATHS) for _ in range(3)]
    assert [child.wait(timeout=120) for child in children] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "300"
    assert not list((tmp_path / "locks").iterdir())


def test_sweep_removes_what_nobody_holds(tmp_path):
    locks = Locks(tmp_path)
    (tmp_path / "old.lock").write_text("{}")
    held = locks.take("new")
    assert held is not None
    with held:
        Locks(tmp_path).sweep(["old", "new", "never"])
        assert [path.name for path in tmp_path.iterdir()] == ["new.lock"]


def test_a_folder_that_cannot_be_written_to_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="no lock can be taken there .*--runs"):
        Locks(tmp_path / "file" / "store").take("a")


def test_alive_and_holder():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert alive(os.getpid()) and not alive(child.pid)
    assert str(Holder(3, "here", "noon", "llmops tune", "x")) == "3 on here, since noon (llmops tune)"

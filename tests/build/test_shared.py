"""Folders that several builds use: whole shards or none, and what each cost."""

import json
import os
import signal
import time

import pytest

from llmops.build.shared import Shared
from llmops.errors import StoreError
from llmops.measure.sharing import charged, teacher_cost
from llmops.quantity import Quantity


def joules(value: float) -> Quantity:
    return Quantity(value, "J", "measured", "counter")


def test_shards_are_made_once_and_their_cost_is_kept_with_who_paid(tmp_path):
    clock = iter([(0.0, joules(0)), (2.0, joules(10)), (5.0, joules(40)), (6.0, joules(47))])
    first = Shared(tmp_path / "key", {"k": "8"}, "one", lambda: next(clock))
    with first.making():
        assert first.shard("a", lambda: b"aa") and first.shard("b", lambda: b"bb")
        assert not first.shard("a", lambda: pytest.fail("made twice"))
        first.finish({"rows": 3})
    second = Shared(tmp_path / "key", {"k": "8"}, "two")
    first.used(), second.used(), second.used()
    assert second.manifest() == {"rows": 3, "parts": {"k": "8"}} and second.users() == {"one", "two"}
    wall, energy = second.cost()
    assert (wall.value, energy.value, energy.provenance) == (3.0, 17.0, "measured")
    assert second.cost(by="two")[1].value == 0 and second.cost(by="one")[1].value == 17


def test_a_shard_without_a_reading_is_charged_at_the_power_of_the_others(tmp_path):
    clock = iter([(0.0, joules(0)), (2.0, joules(20)), (2.0, Quantity.null("J", "sensor asleep")), (3.0, joules(30))])
    shared = Shared(tmp_path / "key", {}, "one", lambda: next(clock))
    with shared.making():
        shared.shard("a", lambda: b"a"), shared.shard("b", lambda: b"b")
    energy = shared.cost()[1]
    assert energy.value == pytest.approx(30) and energy.provenance == "estimated"


def test_kill_9_in_the_middle_loses_no_finished_shard(tmp_path):
    child = os.fork()
    if child == 0:  # pragma: no cover - killed in there
        shared = Shared(tmp_path / "key", {}, "one")

        def slow() -> bytes:
            (shared.folder / "begun").touch()
            time.sleep(60)
            return b""

        with shared.making():
            shared.shard("a", lambda: b"done")
            shared.shard("b", slow)
        os._exit(1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "key" / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "key" / ".b.1").write_bytes(b"half")  # as a kill in the middle of writing leaves it
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shared = Shared(tmp_path / "key", {}, "two")
    with shared.making():  # the lock of the dead is free
        assert not shared.shard("a", lambda: pytest.fail("a finished shard was lost"))
        assert shared.shard("b", lambda: b"now")
    assert (shared.folder / "a").read_bytes() == b"done" and (shared.folder / "b").read_bytes() == b"now"
    assert not [path for path in shared.folder.iterdir() if path.name.startswith(".")]


def test_a_value_is_remembered_for_all(tmp_path):
    assert Shared(tmp_path / "key", {}, "one").remembered("answers", lambda: ["a", None]) == ["a", None]
    assert Shared(tmp_path / "key", {}, "two").remembered("answers", lambda: pytest.fail("asked twice")) == ["a", None]


def test_damage_and_folders_that_cannot_be_written_are_told(tmp_path):
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read.*will be made anew"):
        Shared(tmp_path / "key", {}).manifest()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"), Shared(tmp_path / "file" / "key", {}).making():
        pass


def manifest(own: float, beside: float | None, *shared: float | None) -> dict:
    entries = [{"what": "signals", "key": "s", "energy_j": (joules(each) if each is not None else
                                                            Quantity.null("J", "no sensor")).as_dict()}
               for each in shared]
    teaching = {} if beside is None else {"energy_j": joules(beside).as_dict()}
    return {"cost": {"energy_j": joules(own).as_dict()}, "teaching": teaching, "shared": entries}


def test_what_is_shared_is_split_and_adds_up_to_the_whole():
    rows = [manifest(own, 0.0, 90.0) for own in (10.0, 20.0, 30.0)]
    assert [charged(row, lambda key: 3).value for row in rows] == [40, 50, 60]
    assert sum(teacher_cost(row, lambda key: 3).value or 0 for row in rows) == 90
    assert "split over 3 builds" in teacher_cost(rows[0], lambda key: 3).method


def test_a_teacher_beside_its_student_is_part_of_what_the_student_cost():
    row = manifest(10.0, 4.0)
    assert charged(row, lambda key: 1).value == 10 and teacher_cost(row, lambda key: 1).value == 4
    assert teacher_cost(manifest(10.0, None), lambda key: 1) is None


def test_a_cost_that_nobody_saw_makes_the_total_unknown_with_its_reason():
    found = charged(manifest(10.0, 0.0, None), lambda key: 2)
    assert found.value is None and "no sensor" in found.method
    assert json.dumps(found.as_dict())

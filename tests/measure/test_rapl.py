from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.measure.replay import Clock

from llmops.measure.meter import Meter
from llmops.measure.rapl import open_rapl
from llmops.measure.sensors import NotUsable

RANGE_UJ = 262_143_328_850


def domain(root: Path, folder: str, name: str, uj: int) -> Path:
    place = root / folder
    place.mkdir(parents=True)
    (place / "name").write_text(f"{name}\n")
    (place / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (place / "energy_uj").write_text(f"{uj}\n")
    return place / "energy_uj"


def test_packages_and_dram_are_counted_once(tmp_path):
    clock = Clock()
    first = domain(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = domain(tmp_path, "intel-rapl:1", "package-1", 7_000_000)
    dram = domain(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    for folder, name in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")):
        domain(tmp_path, folder, name, 0)
    with Meter(open_rapl(tmp_path), clock=clock).window("w") as window:
        clock.advance(1)
        first.write_text("25000000")
        second.write_text("17000000")
        dram.write_text("4000000")
        (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("15000000")
        (tmp_path / "intel-rapl:2" / "energy_uj").write_text("99000000")
        (tmp_path / "intel-rapl-mmio:0" / "energy_uj").write_text("25000000")
    assert window.energy.value == pytest.approx(33)
    assert window.parts["cpu"].value == pytest.approx(30) and window.parts["ram"].value == pytest.approx(3)
    assert window.energy.provenance == "measured"


def test_a_wrapped_counter_goes_on(tmp_path):
    counter = domain(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 4_000_000)
    sensor = open_rapl(tmp_path)
    counter.write_text(str(6_000_000))
    assert sensor.read()["cpu"] == pytest.approx(10)
    counter.write_text(str(RANGE_UJ - 1_000_000))
    sensor._poll()  # the thread's reading, so that the next wrap is not lost
    counter.write_text(str(1_000_000))
    assert sensor.read()["cpu"] == pytest.approx(10 + (RANGE_UJ - 7_000_000 + 2_000_000) / 1e6)


def test_a_counter_that_was_set_back_is_no_wrapped_one(tmp_path):
    """A machine that slept begins at 0: 40 kJ in a second would be billed to whoever measures just then."""
    clock = Clock()
    counter = domain(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ // 2)
    meter = Meter(open_rapl(tmp_path, clock), clock=clock)
    with meter.window("w") as window:
        clock.advance(1)
        counter.write_text("3000000")
    assert window.energy.value is None and "the counter of rapl fell (cpu)" in window.energy.method
    with meter.window("next") as window:
        clock.advance(1)
        counter.write_text("43000000")
    assert window.energy.value == pytest.approx(40)


def test_missing_dram_is_said(tmp_path):
    domain(tmp_path, "intel-rapl:0", "package-0", 1)
    sensor = open_rapl(tmp_path)
    assert set(sensor.read()) == {"cpu"}
    assert "DRAM is not metered" in sensor.method


def test_what_cannot_be_read_says_why(tmp_path, monkeypatch):
    with pytest.raises(NotUsable, match="does not exist"):
        open_rapl(tmp_path / "none")
    with pytest.raises(NotUsable, match="no package domain"):
        open_rapl(tmp_path)
    energy = domain(tmp_path, "intel-rapl:0", "package-0", 1)
    energy.chmod(0o000)
    if os.geteuid() == 0:  # root reads everything: let the file refuse itself
        read_text = Path.read_text

        def refuse(path: Path, *args, **kwargs):
            if path.name == "energy_uj":
                raise PermissionError(13, "Permission denied", str(path))
            return read_text(path, *args, **kwargs)

        monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(NotUsable, match="readable by root only"):
        open_rapl(tmp_path)


def test_garbage_in_a_counter_is_a_reason(tmp_path):
    domain(tmp_path, "intel-rapl:0", "package-0", 1).write_text("n/a")
    with pytest.raises(NotUsable, match="cannot be read"):
        open_rapl(tmp_path)

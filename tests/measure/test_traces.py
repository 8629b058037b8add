"""Traces recorded, kept and played back; update periods found; counters that die or belong to other boards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.measure.replay import Clock, ReplaySensor

from llmops.errors import LlmopsError
from llmops.measure.meter import Meter
from llmops.measure.probing import update_period
from llmops.measure.replay import Replay, Trace, read_trace, record, write_trace
from llmops.measure.sensors import NotUsable
from llmops.measure.zeus_sensor import open_zeus


def stairs(period: float, watts: float = 100.0, seconds: float = 20.0) -> Trace:
    times = [period * step for step in range(round(seconds / period) + 1)]
    return Trace(times, {"gpu0": [watts * second for second in times]})


def test_a_trace_is_recorded_kept_and_played_back(tmp_path: Path) -> None:
    clock = Clock()
    sensor = ReplaySensor(lambda: {"gpu0": 100 * (clock.now // 0.5 * 0.5), "cpu": 3.0 * (clock.now // 1)})
    made = record(sensor, 5.0, 0.1, clock, clock.advance)
    assert len(made.times) == 10  # what did not change was not kept
    write_trace(made, tmp_path / "t.csv")
    assert read_trace(tmp_path / "t.csv") == made
    clock.now = 0.0
    played = Replay(made, clock)
    clock.now = 2.25
    assert played.read() == {"gpu0": 200.0, "cpu": 6.0}


@pytest.mark.parametrize("text", [
    "", "s,gpu0\n", "t,gpu0\n0,1\n", "s,gpu0\n1,1\n0,2\n", "s,gpu0\n0,x\n", "s,gpu0\n0\n"])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(LlmopsError, match=r"t.csv: .*expected CSV"):
        read_trace(tmp_path / "t.csv")


@pytest.mark.parametrize("period", [0.02, 0.1, 0.25])
def test_the_period_of_a_counter_is_found(period: float) -> None:
    clock = Clock()
    found = update_period(Replay(stairs(period), clock), 4.0, clock, clock.advance)
    assert found == pytest.approx(period, rel=0.03)
    assert clock.now < 4.0 if period < 0.25 else True  # it stops when it knows


def test_the_slowest_part_counts_and_a_still_one_does_not() -> None:
    clock = Clock()
    sensor = ReplaySensor(lambda: {"a": clock.now // 0.02, "b": clock.now // 0.1, "off": 0.0})
    assert update_period(sensor, 4.0, clock, clock.advance) == pytest.approx(0.1, rel=0.03)


def test_continuous_and_still_counters_have_no_period() -> None:
    clock = Clock()
    assert update_period(ReplaySensor(lambda: {"m": clock.now}), 1.0, clock, clock.advance) is None
    assert update_period(ReplaySensor(lambda: {"m": 1.0}), 0.1, clock, clock.advance) is None


def test_a_replayed_sensor_that_dies_is_null_with_the_reason() -> None:
    clock = Clock()
    meter = Meter(Replay(stairs(0.1), clock, ends_s=3.0), clock=clock)
    with meter.window("alive") as alive:
        clock.advance(2.0)
    with meter.window("dies") as dies:
        clock.advance(2.0)
    assert alive.energy.value == pytest.approx(200, rel=0.06)
    assert dies.energy.value is None and "device is lost since 3 s" in dies.energy.method


@dataclass
class Jetson:
    cpu_energy_mj: float | None = None
    gpu_energy_mj: float | None = None
    total_energy_mj: float | None = None


@dataclass
class Apple:
    cpu_total_mj: int | None
    efficiency_cores_mj: list[int]
    performance_core_manager_mj: int
    gpu_mj: int
    ane_mj: int = 0


def zeus(gpus: Any, board: Any) -> Any:
    def fail(reason: str) -> Any:
        raise RuntimeError(reason)

    modules = {"zeus": SimpleNamespace(__version__="0.16"), "zeus.device.gpu": SimpleNamespace(
        get_gpus=lambda: gpus or fail("no GPU")), "zeus.device.soc": SimpleNamespace(
        get_soc=lambda: board or fail("no board"))}
    return lambda name: modules[name]


class AMDGPUs:
    def __init__(self, joules: list[float]) -> None:
        self.joules = joules

    def __len__(self) -> int:
        return len(self.joules)

    def supports_get_total_energy_consumption(self, index: int) -> bool:
        return self.joules[index] >= 0

    def get_total_energy_consumption(self, index: int) -> float:
        return self.joules[index] * 1000


def test_zeus_counters_of_amd_apple_and_jetson() -> None:
    cards = AMDGPUs([10.0, 20.0])
    sensor = open_zeus(zeus(cards, None))
    cards.joules = [13.0, 27.0]
    assert sensor.read() == {"gpu0": 3.0, "gpu1": 7.0} and "2 AMD GPU(s)" in sensor.method
    for board, wanted in ((Jetson(1000.0, 2000.0, 5000.0), 4.0), (Apple(500, [100, 100], 50, 1500), 1.0)):
        soc = SimpleNamespace(get_total_energy_consumption=lambda board=board: board)
        sensor = open_zeus(zeus(None, soc))
        for name, value in vars(board).items():
            if isinstance(value, int | float):
                setattr(board, name, value * 1.5 if isinstance(board, Apple) else value * 1.8)
        assert sensor.read() == {"board": pytest.approx(wanted)} and sensor.provenance == "measured"


@pytest.mark.parametrize("gpus, board, said", [
    (None, None, "no GPU; no board"), (AMDGPUs([-1.0]), None, "no energy counter"),
    (type("NVIDIAGPUs", (AMDGPUs,), {})([1.0]), None, "read by the NVML sensor"),
    (None, SimpleNamespace(get_total_energy_consumption=Jetson), "tells no energy")])
def test_what_zeus_cannot_read_is_a_reason_never_zero(gpus: Any, board: Any, said: str) -> None:
    with pytest.raises(NotUsable, match=said.replace("(", "[(]")):
        open_zeus(zeus(gpus, board))


def test_zeus_that_is_not_installed_is_a_reason() -> None:
    def missing(name: str) -> Any:
        raise ImportError("No module named 'zeus'")

    with pytest.raises(NotUsable, match=r"pip install llmops\[zeus\]"):
        open_zeus(missing)


def test_an_aligned_window_is_exact_where_a_plain_one_is_an_update_off() -> None:
    clock = Clock()
    trace = Trace([0.1 * step for step in range(300)], {  # 100 W for 5 s, then 400 W
        "gpu0": [100 * second + 300 * max(0.0, second - 5) for second in (0.1 * step for step in range(300))]})
    meter = Meter(Replay(trace, clock, update_period_s=0.1), clock=clock, sleep=clock.advance)
    clock.advance(4.95)
    with meter.window("plain") as plain:
        clock.advance(10.0)
    clock.now = 4.95
    with meter.window("aligned", aligned=True) as aligned:
        clock.advance(10.0)
    assert plain.energy.value == pytest.approx(100 * 0.1 + 400 * 9.9) and plain.wall_s == pytest.approx(10)
    assert aligned.energy.value == pytest.approx(400 * 10.0, rel=0.0101)  # one update more
    assert aligned.wall_s == pytest.approx(10)


def test_an_aligned_window_does_not_wait_for_what_stands_still_or_died() -> None:
    clock = Clock()
    trace = Trace([0.1 * step for step in range(300)], {"gpu0": [10.0 * step for step in range(300)],
                                                        "off": [0.0] * 300})
    meter = Meter(Replay(trace, clock, update_period_s=0.1, ends_s=12.0), clock=clock, sleep=clock.advance)
    with meter.window("one is off", aligned=True) as window:
        clock.advance(5.0)
    assert window.energy.value is None and "(off)" in window.energy.method and clock.now < 6.1
    assert window.parts["gpu0"].value == pytest.approx(500, abs=61)
    with meter.window("dies", aligned=True) as window:
        clock.advance(5.45)
    assert window.energy.value is None and "device is lost" in window.energy.method

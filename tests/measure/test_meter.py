from __future__ import annotations

import pytest
from tests.measure.replay import Clock, ReplaySensor

from llmops.measure.meter import Meter
from llmops.measure.sensors import DeclaredSensor, NullSensor


def power(clock: Clock, watts: dict[str, float], update_s: float = 0.0):
    """A counter of constant power that changes every `update_s`."""
    def trace() -> dict[str, float]:
        seen = clock.now if not update_s else (clock.now // update_s) * update_s
        return {part: value * seen for part, value in watts.items()}
    return trace


def test_known_power_gives_known_energy_by_part():
    clock = Clock()
    meter = Meter(ReplaySensor(power(clock, {"gpu0": 300.0, "gpu1": 50.0})), clock=clock)
    clock.advance(7)
    with meter.window("train") as window:
        clock.advance(4)
    assert window.wall_s == 4
    assert window.energy.value == pytest.approx(1400)
    assert (window.energy.unit, window.energy.provenance) == ("J", "measured")
    assert {part: quantity.value for part, quantity in window.parts.items()} == {"gpu0": 1200.0, "gpu1": 200.0}


def test_a_slow_counter_is_within_one_percent_over_a_hundred_updates():
    clock = Clock()
    meter = Meter(ReplaySensor(power(clock, {"gpu0": 200.0}, update_s=0.1), update_period_s=0.1), clock=clock)
    for offset in (0.0, 0.033, 0.07, 0.099):
        clock.advance(offset)
        with meter.window("w") as window:
            clock.advance(10.0)
        assert window.energy.value == pytest.approx(2000, rel=0.011)


def test_nested_windows_add_up_and_the_sensor_runs_once():
    clock = Clock()
    sensor = ReplaySensor(power(clock, {"cpu": 10.0}))
    meter = Meter(sensor, clock=clock)
    with meter.window("outer") as outer:
        clock.advance(1)
        with meter.window("a") as first:
            clock.advance(2)
        with meter.window("b") as second:
            clock.advance(3)
    assert [first.energy.value, second.energy.value, outer.energy.value] == pytest.approx([20, 30, 60])
    assert sensor.calls == ["read", "start", "read", "read", "read", "read", "stop", "read"]


def test_a_still_counter_is_null_not_zero():
    clock = Clock()
    meter = Meter(ReplaySensor(lambda: {"gpu0": 5.0}), clock=clock)
    with meter.window("w") as window:
        clock.advance(1)
    assert window.energy.value is None
    assert "did not advance" in window.energy.method
    assert window.parts["gpu0"].value is None


def test_one_still_part_spoils_a_counter_but_not_a_model():
    clock = Clock()

    def trace() -> dict[str, float]:
        return {"cpu": 3.0, "ram": 10.0 * clock.now}

    for provenance, expected in (("measured", None), ("estimated", 20.0)):
        with Meter(ReplaySensor(trace, provenance), clock=clock).window("w") as window:
            clock.advance(2)
        assert window.energy.value == expected
        assert window.parts["cpu"].value is None and window.parts["ram"].value == pytest.approx(20)


def test_a_window_shorter_than_an_update_is_null_even_if_the_counter_jumped():
    clock = Clock()
    meter = Meter(ReplaySensor(power(clock, {"gpu0": 200.0}, update_s=0.1), update_period_s=0.1), clock=clock)
    clock.advance(0.095)
    with meter.window("w") as window:
        clock.advance(0.01)  # sees a whole update: 20 J for 2 J
    assert window.energy.value is None
    assert "shorter than one update" in window.energy.method


def test_a_falling_counter_is_null():
    clock = Clock()
    with Meter(ReplaySensor(lambda: {"gpu0": 100.0 - clock.now}), clock=clock).window("w") as window:
        clock.advance(1)
    assert window.energy.value is None
    assert "fell" in window.energy.method


def test_a_part_that_vanishes_is_null():
    clock = Clock()
    meter = Meter(ReplaySensor(lambda: {"gpu0": clock.now} | ({"gpu1": 1.0} if clock.now < 1 else {})), clock=clock)
    with meter.window("w") as window:
        clock.advance(1)
    assert window.energy.value is None
    assert "gpu1" in window.energy.method


def test_a_sensor_that_dies_midway_leaves_the_work_and_its_time():
    clock = Clock()

    def trace() -> dict[str, float]:
        if clock.now > 1:
            raise OSError("GPU is lost")
        return {"gpu0": clock.now}

    meter = Meter(ReplaySensor(trace), clock=clock)
    with meter.window("w") as window:
        clock.advance(3)
    assert window.wall_s == 3
    assert window.energy.value is None
    assert "GPU is lost" in window.energy.method


def test_a_sensor_that_cannot_start_is_a_reason():
    clock = Clock()
    sensor = ReplaySensor(power(clock, {"cpu": 1.0}))

    def broken() -> None:
        raise RuntimeError("no thread")

    sensor.start = broken  # type: ignore[method-assign]
    with Meter(sensor, clock=clock).window("w") as window:
        clock.advance(1)
    assert window.energy.value is None and "no thread" in window.energy.method


def test_a_body_that_raises_still_closes_the_window_and_the_sensor():
    clock = Clock()
    sensor = ReplaySensor(power(clock, {"cpu": 2.0}))
    meter = Meter(sensor, clock=clock)
    with pytest.raises(KeyError), meter.window("w") as window:
        clock.advance(5)
        raise KeyError("x")
    assert window.energy.value == pytest.approx(10)
    assert sensor.calls == ["read", "start", "stop", "read"]


def test_no_sensor_says_why_and_declared_watts_are_an_estimate():
    clock = Clock()
    with Meter(NullSensor("nothing to read"), clock=clock).window("w") as window:
        clock.advance(1)
    assert (window.energy.value, window.energy.method, window.wall_s) == (None, "nothing to read", 1)
    with Meter(DeclaredSensor(65, clock), clock=clock).window("w") as window:
        clock.advance(2)
    assert (window.energy.value, window.energy.provenance) == (130, "estimated")
    assert "65 W" in window.energy.method

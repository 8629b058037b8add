"""A counter that is set back and passes its old value again between the ends of a window."""

from __future__ import annotations

import time

import pytest
from tests.measure.replay import Clock, ReplaySensor

from llmops.measure.meter import Meter
from llmops.measure.sensors import DeclaredSensor
from llmops.measure.watch import Watch


class Counter:
    """What a test says that it shows."""

    def __init__(self, joules):
        self.joules = joules

    def __call__(self):
        return {"gpu0": self.joules, "gpu1": 1000.0 + self.joules}


def test_a_window_whose_counter_was_set_back_and_caught_up_is_null():
    clock, counter = Clock(), Counter(100.0)
    meter = Meter(ReplaySensor(counter), clock=clock)
    with meter.window("outer") as outer, meter.window("w") as window:
        clock.advance(1)
        counter.joules = 40.0
        meter._watch._look()  # what the thread does
        clock.advance(9)
        counter.joules = 900.0
        assert window.so_far()[1].value is None
    for each in (outer, window):
        assert each.energy.value is None and "the counter of replay fell (gpu0, gpu1)" in each.energy.method
        assert each.parts["gpu0"].value is None and "fell within" in each.parts["gpu0"].method
    with meter.window("next") as window:
        clock.advance(1)
        counter.joules = 1000.0
    assert window.energy.value == pytest.approx(200)


def test_the_end_of_a_window_is_held_against_the_last_look_in_it():
    clock, counter = Clock(), Counter(100.0)
    meter = Meter(ReplaySensor(counter), clock=clock)
    with meter.window("w") as window:
        clock.advance(8)
        counter.joules = 900.0
        meter._watch._look()
        clock.advance(1)
        counter.joules = 150.0  # set back since, and above where the window began
    assert "fell" in window.energy.method


def test_a_look_that_fails_is_no_verdict():
    clock, counter = Clock(), Counter(100.0)
    sensor = ReplaySensor(counter)
    meter = Meter(sensor, clock=clock)
    with meter.window("w") as window:
        sensor.trace = lambda: 1 / 0
        meter._watch._look()
        sensor.trace = counter
        clock.advance(1)
        counter.joules = 400.0
    assert window.energy.value == pytest.approx(600)


def test_the_thread_looks_by_itself_while_a_window_is_open():
    counter = Counter(100.0)
    sensor = ReplaySensor(counter)
    meter = Meter(sensor)
    meter._watch = Watch(sensor, every_s=0.005)
    with meter.window("w") as window:
        counter.joules = 40.0
        until = time.monotonic() + 5.0
        while not meter._watch.falls and time.monotonic() < until:
            time.sleep(0.005)
        counter.joules = 900.0
    assert "fell" in window.energy.method
    seen = len(sensor.calls)
    time.sleep(0.03)
    assert len(sensor.calls) == seen


def test_only_hardware_counters_are_read_between():
    """Reading CodeCarbon's model ends one of its tasks."""
    assert Watch(DeclaredSensor(10.0))._poller is None

from __future__ import annotations

import time

import pytest

from llmops.measure import nvml as nvml_module
from llmops.measure import sensors
from llmops.measure.options import MeasureOptions
from llmops.measure.sensors import NotUsable, Poller, probe


def refuse(reason: str):
    def opener(options: MeasureOptions, device: str):
        raise NotUsable(reason)
    return opener


def test_none_is_null_with_a_reason():
    sensor = probe(MeasureOptions(sensor="none"))
    assert (sensor.name, sensor.provenance) == ("none", "null")
    assert "asked for no sensor" in sensor.method


def test_auto_takes_the_first_that_works_and_keeps_the_reasons(monkeypatch):
    monkeypatch.setitem(sensors.SENSORS, "nvml", refuse("no card"))
    monkeypatch.setitem(sensors.SENSORS, "rapl", refuse("root only"))
    monkeypatch.setitem(sensors.SENSORS, "zeus", refuse("no board"))
    sensor = probe(MeasureOptions(watts=40))
    assert (sensor.name, sensor.provenance) == ("declared", "estimated")
    assert sensor.skipped == {"nvml": "no card", "rapl": "root only", "zeus": "no board"}


def test_a_named_sensor_is_never_replaced(monkeypatch):
    monkeypatch.setitem(sensors.SENSORS, "rapl", refuse("root only"))
    sensor = probe(MeasureOptions(sensor="rapl"))
    assert sensor.provenance == "null"
    assert "rapl: root only" in sensor.method


def test_a_driver_that_breaks_while_probed_is_a_reason(monkeypatch):
    def explode(options: MeasureOptions, device: str):
        raise ZeroDivisionError("driver bug")

    for name in sensors.SENSORS:
        monkeypatch.setitem(sensors.SENSORS, name, explode)
    sensor = probe(MeasureOptions())
    assert sensor.provenance == "null"
    assert sensor.skipped["codecarbon"] == "ZeroDivisionError: driver bug"


def test_counters_meter_only_the_device_that_works(monkeypatch):
    monkeypatch.setitem(sensors.SENSORS, "codecarbon", refuse("not wanted"))
    assert "runs on cpu" in probe(MeasureOptions(), "cpu").skipped["nvml"]
    monkeypatch.setattr(nvml_module, "open_nvml", lambda: (_ for _ in ()).throw(NotUsable("no card")))
    skipped = probe(MeasureOptions(), "cuda:0").skipped
    assert skipped["nvml"] == "no card" and "runs on a GPU" in skipped["rapl"]


@pytest.mark.parametrize("body", [
    {"sensor": "declared"}, {"sensor": "rapl", "watts": 20}, {"batch_sizes": [1, 1]}, {"batch_sizes": [0]},
    {"sensor": "wattmeter"}, {"zone": "France"}, {"repeats": 1}, {"window": 3},
])
def test_options_that_cannot_be_meant_are_refused(body):
    with pytest.raises(ValueError):
        MeasureOptions.model_validate(body)


def test_a_poller_keeps_what_its_thread_died_of():
    def fail() -> None:
        raise OSError("gone")

    poller = Poller(fail, 0.001)
    poller.start()
    for _ in range(1000):
        time.sleep(0.002)
        if poller._thread is not None and not poller._thread.is_alive():
            break
    with pytest.raises(OSError, match="gone"):
        poller.check()
    poller.stop()

"""CodeCarbon for real: offline, once a process."""

from __future__ import annotations

import inspect
import socket
import tempfile
import time
from pathlib import Path

import pytest

from llmops.measure import codecarbon_model
from llmops.measure.meter import Meter
from llmops.measure.options import MeasureOptions
from llmops.measure.sensors import probe


@pytest.fixture
def no_network(monkeypatch):
    tried: list[object] = []

    def refuse(self, address, *rest):
        tried.append(address)
        raise OSError("the network is off in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    return tried


def test_the_estimate_is_had_offline_and_labelled(no_network, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(codecarbon_model, "_shared", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nforce_cpu_power = 90000\nforce_ram_power = 90000\npue = 50\nsave_to_file = true\n"
        "electricitymaps_api_token = x\nco2_signal_api_token = x\nallow_multiple_runs = False\n")
    monkeypatch.setenv("CODECARBON_TRACKING_MODE", "machine")
    lock = Path(tempfile.gettempdir()) / ".codecarbon.lock"
    locked_before = lock.exists()
    sensor = probe(MeasureOptions(sensor="codecarbon"))
    assert sensor.name == "codecarbon", sensor.method
    assert sensor.provenance == "estimated" and sensor.method.startswith("CodeCarbon")
    meter = Meter(sensor)
    with meter.window("outer") as outer:
        with meter.window("busy") as busy:
            until = time.process_time() + 0.2
            while time.process_time() < until:
                sum(range(1000))
        with meter.window("idle") as idle:
            time.sleep(0.2)
    assert outer.energy.provenance == "estimated"
    assert outer.energy.value >= 0.99 * (busy.energy.value + idle.energy.value)
    assert busy.parts["cpu"].value > (idle.parts["cpu"].value or 0.0)
    assert outer.energy.value / outer.wall_s < 5000  # the 90 kW of the user's file were not taken
    assert set(outer.parts) >= {"cpu", "ram"}
    assert no_network == []
    assert lock.exists() == locked_before
    assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]
    assert probe(MeasureOptions(sensor="codecarbon")) is sensor  # one a process
    assert "codecarbon" not in capfd.readouterr().err.lower()


def test_every_option_of_the_installed_version_is_given():
    from codecarbon.emissions_tracker import BaseEmissionsTracker, OfflineEmissionsTracker

    known = {*inspect.signature(BaseEmissionsTracker.__init__).parameters,
             *inspect.signature(OfflineEmissionsTracker.__init__).parameters}
    deprecated = {"co2_signal_api_token", "save_to_file", "save_to_api", "save_to_logger", "save_to_prometheus",
                  "save_to_logfire"}
    missing = known - set(codecarbon_model.tracker_options(known)) - {"self", "args", "kwargs"} - deprecated
    assert missing == set()
    old = codecarbon_model.tracker_options(known - {"output_methods"})
    assert old["save_to_file"] is False and old["save_to_api"] is False


def test_a_model_that_returns_nothing_is_not_usable(monkeypatch):
    from codecarbon import emissions_tracker

    class Silent:
        def __init__(self, **options):
            pass

        def start_task(self):
            pass

        def stop_task(self):
            return None

    monkeypatch.setattr(codecarbon_model, "_shared", None)
    monkeypatch.setattr(emissions_tracker, "OfflineEmissionsTracker", Silent)
    sensor = probe(MeasureOptions(sensor="codecarbon"))
    assert sensor.provenance == "null"
    assert "no running task" in sensor.skipped["codecarbon"]

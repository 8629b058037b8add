from __future__ import annotations

import pytest
from tests.measure.replay import Clock

from llmops.measure.meter import Meter
from llmops.measure.nvml import NvmlPower, open_nvml
from llmops.measure.sensors import NotUsable


class Nvml:
    """pynvml as far as the sensors use it; each card draws a constant power, counted in mJ every 100 ms."""

    def __init__(self, clock: Clock, watts: dict[str, float], counter: bool = True, mig: bool = False) -> None:
        self.clock, self.watts, self.counter, self.mig = clock, watts, counter, mig

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.watts:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        return int(self.mig), int(self.mig)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self.counter:
            raise RuntimeError("Not Supported")
        return 10**9 + int(self.watts[handle] * 1000 * round(self.clock.now // 0.1 * 0.1, 6))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        if not self.watts[handle]:
            raise RuntimeError("Not Supported")
        return int(self.watts[handle] * 1000)


def test_the_counter_sums_the_visible_cards_and_shows_each():
    clock = Clock()
    sensor = open_nvml(Nvml(clock, {"GPU-a": 100.0, "GPU-b": 300.0, "GPU-hidden": 999.0}), ["GPU-b", "GPU-a"])
    with Meter(sensor, clock=clock).window("w") as window:
        clock.advance(10)
    assert sensor.name == "nvml" and window.energy.provenance == "measured"
    assert window.energy.value == pytest.approx(4000, rel=0.01)
    assert window.parts["gpu0"].value == pytest.approx(3000, rel=0.01)
    assert window.parts["gpu1"].value == pytest.approx(1000, rel=0.01)


def test_without_a_counter_power_is_integrated_and_labelled():
    clock = Clock()
    sensor = open_nvml(Nvml(clock, {"GPU-a": 250.0}, counter=False), ["GPU-a"])
    assert isinstance(sensor, NvmlPower)
    assert sensor.provenance == "estimated" and sensor.method.startswith("integrated power")


def test_integrated_power_follows_a_ramp_and_skips_what_lies_between_windows():
    clock = Clock()
    nvml = Nvml(clock, {"GPU-a": 100.0}, counter=False)
    sensor = NvmlPower(nvml, {"gpu0": "GPU-a"}, clock, period_s=1e6)  # the thread never fires: the test samples
    meter = Meter(sensor, clock=clock)
    for _ in range(2):
        nvml.watts["GPU-a"] = 100.0
        with meter.window("w") as window:
            for step in range(1, 11):
                clock.advance(1)
                nvml.watts["GPU-a"] = 100.0 + 10 * step
                sensor._sample()
        assert window.energy.value == pytest.approx(1500)
        clock.advance(100)


@pytest.mark.parametrize("nvml, uuids, reason", [
    (Nvml(Clock(), {"GPU-a": 1.0}, mig=True), ["GPU-a"], "MIG"),
    (Nvml(Clock(), {"MIG-a": 1.0}), ["MIG-a"], "MIG"),
    (Nvml(Clock(), {"GPU-a": 1.0}), ["GPU-other"], "does not know"),
    (Nvml(Clock(), {"GPU-a": 1.0}), [], "no device"),
    (Nvml(Clock(), {"GPU-a": 0.0}, counter=False), ["GPU-a"], "neither energy counter"),
])
def test_what_cannot_be_metered_says_why(nvml, uuids, reason):
    with pytest.raises(NotUsable, match=reason):
        open_nvml(nvml, uuids)


def test_a_driver_that_does_not_start_says_why():
    class Broken:
        def nvmlInit(self) -> None:
            raise RuntimeError("Driver Not Loaded")

    with pytest.raises(NotUsable, match="Driver Not Loaded"):
        open_nvml(Broken(), ["GPU-a"])

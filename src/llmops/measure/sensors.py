"""Sensors of energy behind one small protocol, and the probe that chooses one.

Idea. Every source of energy figures is turned into one thing: a counter that only grows, in joules since it was
started, one number for each part of the machine that it sees (`gpu0`, `cpu`, `ram`). The energy of a window is then a
difference of two readings, windows nest for nothing, and a source that dies shows as a failed reading.

What a sensor is worth is said by its `provenance`: `measured` (a hardware counter) or `estimated` (a model of power,
or power that was sampled and integrated). What it covers is said by `method`, which ends up beside every figure. A
machine without a sensor has a `NullSensor`: it has a reason, and no figure, least of all 0.

The order of `auto` is NVML's counter (only where the model runs on CUDA), RAPL (only where it runs on the CPU), Zeus
for AMD, Apple and Jetson where it is installed, then estimates: declared watts where the user declared them, else
CodeCarbon's offline model. A sensor that was asked for by name is never replaced by another one.

Left out: the sum of NVML and RAPL in one figure, wall-plug meters.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from llmops.errors import LlmopsError, unknown
from llmops.measure.options import MeasureOptions
from llmops.quantity import Provenance

__all__ = ["DeclaredSensor", "NotUsable", "NullSensor", "Poller", "Sensor", "probe"]


class NotUsable(Exception):
    """A sensor that cannot be had on this machine; the message is the reason, for `Sensor.skipped`."""


class Sensor(Protocol):
    """A growing counter of joules.

    `start` and `stop` bracket the time that is metered (threads, tasks). `read` works before, within and after it; what
    happens while stopped need not be counted. Readings never fall. `update_period_s`: the time between two changes of
    the counter, None where it changes continuously. `skipped`: why better sensors were not used, by name; the probe
    fills it.
    """

    name: str
    provenance: Provenance
    method: str
    update_period_s: float | None
    skipped: dict[str, str]

    def start(self) -> None: ...

    def read(self) -> dict[str, float]:
        """Joules by part, from an origin that stays. May raise anything when the source fails."""
        ...

    def stop(self) -> None: ...


class NullSensor:
    """No sensor: `method` is the reason."""

    provenance: Provenance = "null"

    def __init__(self, reason: str) -> None:
        self.name = "none"
        self.method = reason
        self.update_period_s: float | None = None
        self.skipped: dict[str, str] = {}

    def start(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        return {}

    def stop(self) -> None:
        pass


class DeclaredSensor:
    """Watts that somebody declared, times time."""

    provenance: Provenance = "estimated"

    def __init__(self, watts: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.name = "declared"
        self.method = f"declared power of {watts:g} W x wall time; nothing was read from the machine"
        self.update_period_s: float | None = None
        self.skipped: dict[str, str] = {}
        self._watts = watts
        self._clock = clock
        self._origin = clock()

    def start(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        return {"machine": self._watts * (self._clock() - self._origin)}

    def stop(self) -> None:
        pass


class Poller:
    """Calls `action` every `period_s` on a daemon thread while started; keeps the first exception for `check`."""

    def __init__(self, action: Callable[[], None], period_s: float) -> None:
        self._action = action
        self._period_s = period_s
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def start(self) -> None:
        self._halt.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run, name="llmops-sensor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._halt.wait(self._period_s):
            try:
                self._action()
            except Exception as error:  # kept: the thread must not print, the next reading raises it
                self._failure = error
                return

    def check(self) -> None:
        """Raises what the thread died of, if it did."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        self._halt.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _nvml(options: MeasureOptions, device: str) -> Sensor:
    if not device.startswith("cuda"):
        raise NotUsable(f"the model runs on {device}, which NVML does not meter")
    from llmops.measure.nvml import open_nvml

    return open_nvml()


def _rapl(options: MeasureOptions, device: str) -> Sensor:
    if device.startswith("cuda"):
        raise NotUsable("the model runs on a GPU, which RAPL does not meter")
    from llmops.measure.rapl import open_rapl

    return open_rapl()


def _codecarbon(options: MeasureOptions, device: str) -> Sensor:
    from llmops.measure.codecarbon_model import open_codecarbon

    return open_codecarbon()


def _zeus(options: MeasureOptions, device: str) -> Sensor:
    from llmops.measure.zeus_sensor import open_zeus

    return open_zeus()


def _declared(options: MeasureOptions, device: str) -> Sensor:
    if options.watts is None:
        raise NotUsable("no watts were declared")
    return DeclaredSensor(options.watts)


SENSORS: dict[str, Callable[[MeasureOptions, str], Sensor]] = {
    "nvml": _nvml, "rapl": _rapl, "zeus": _zeus, "declared": _declared, "codecarbon": _codecarbon,
}  # in the order that `auto` tries them


def _probed(sensor: Sensor) -> Sensor:
    """The sensor with the update period that this machine's hardware counter shows, where one can be found."""
    if sensor.provenance == "measured":
        from llmops.measure.probing import update_period

        found = update_period(sensor)
        if found is not None:
            sensor.update_period_s = found
            sensor.method += f"; changes every {found * 1000:.3g} ms (probed)"
    return sensor


def probe(options: MeasureOptions, device: Any = "cpu") -> Sensor:
    """The sensor that `options.sensor` asks for, on the device where the model runs ("cpu", "cuda", "cuda:1").

    Never raises for a machine without sensors: that is a `NullSensor` with the reasons. `sensor.skipped` tells for
    every sensor that was tried and not used why. Raises LlmopsError for a name that does not exist.
    """
    wanted, place = options.sensor, str(device)
    if wanted == "none":
        return NullSensor("the recipe asked for no sensor (measure.sensor: none)")
    if wanted != "auto" and wanted not in SENSORS:
        raise LlmopsError(unknown("sensor", wanted, ["auto", *SENSORS, "none"]))
    skipped: dict[str, str] = {}
    for name in SENSORS if wanted == "auto" else [wanted]:
        try:
            sensor = SENSORS[name](options, place)
        except NotUsable as reason:
            skipped[name] = str(reason)
        except Exception as error:  # a driver or a library that breaks while probed is a reason, not a crash
            skipped[name] = f"{type(error).__name__}: {error}"
        else:
            sensor.skipped = skipped
            return _probed(sensor)
    null = NullSensor("no usable energy sensor: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    null.skipped = skipped
    return null

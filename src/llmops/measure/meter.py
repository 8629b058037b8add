"""Windows of time and energy: `with meter.window("train") as window: ...`.

The device is synchronized before the first and after the last reading, otherwise kernels that were only queued would
be billed to the next window. Readings lie outside the timed section, so a slow sensor does not lengthen `wall_s`.

A counter that changes every 100 ms tells at either end what was up to 100 ms ago. In a window of 100 updates that is
up to 1 % at each end, more where power changes or an update is missed (benchmarks/bench_energy_traces.py). An `aligned`
window therefore waits at both ends for a change of every part, and bills from change to change. What the device draws
while the last one is waited for (idle, for less than an update) is in it; `wall_s` is not lengthened.

A window's energy is null, with the reason, when there is no sensor, when the sensor failed at either end, when a
counter fell (also between the ends, where it passed its old value again: `watch.py`), when the window is shorter than
one update of the counter, and when the counter did not move in it. For a hardware counter one part that did not move is
enough: hardware that is on draws power, so a still counter means "not seen", not "nothing used". A sensor that fails
never raises into the work that is metered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmops.measure.sensors import Sensor
from llmops.measure.watch import Watch
from llmops.quantity import Quantity

__all__ = ["Meter", "Window", "synchronize"]

WORTH_WAITING_S = 0.005  # a counter that changes more often than that is read as it stands
PATIENCE = 5.0  # updates that a change is waited for: a few may be missed


class Window:
    """What a window saw; filled when it closes. `energy` in J, `parts` by part of the machine, `wall_s` in seconds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.wall_s = 0.0
        self.energy = Quantity.null("J", f'the window "{label}" is still open')
        self.parts: dict[str, Quantity] = {}
        self.so_far: Callable[[], tuple[float, Quantity]] = lambda: (self.wall_s, self.energy)
        """(seconds, J) while it is open; once closed, the final figures."""


def synchronize(device: str) -> None:
    """Wait for all queued work: of one device for "cuda:1", of every device in use for "cuda"; a CPU has no queue."""
    if not device.startswith("cuda"):
        return
    import torch

    if ":" in device:
        torch.cuda.synchronize(device)
        return
    for index in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(index) > 0:  # synchronizing an unused device would open a context on it
            torch.cuda.synchronize(index)


class Meter:
    """Joins a sensor, a device and a clock. Windows may nest; they may not overlap across threads."""

    def __init__(self, sensor: Sensor, device: Any = "cpu", clock: Callable[[], float] = time.perf_counter,
                 sleep: Callable[[float], None] = time.sleep) -> None:
        self.sensor = sensor
        self._watch = Watch(sensor)
        self._sleep = sleep
        self.device = str(device)
        self._clock = clock
        self._depth = 0

    @contextmanager
    def window(self, label: str, aligned: bool = False) -> Iterator[Window]:
        """Meter the body of a `with`. The figures are there once it is left, also when the body raised.

        aligned: begin and end at a change of a hardware counter, which takes up to two updates longer.
        """
        window = Window(label)
        synchronize(self.device)
        before = self._read()
        if self._depth == 0:
            before = self._attempt(self.sensor.start) or before
        if aligned:
            before = self._change(before)
        if self._depth == 0:
            self._watch.start()
        self._depth += 1
        began, falls = self._clock(), len(self._watch.falls)

        def so_far() -> tuple[float, Quantity]:
            wall_s = self._clock() - began
            return wall_s, self._energy(before, self._read(), wall_s, falls)[0]

        window.so_far = so_far
        try:
            yield window
        finally:
            try:
                synchronize(self.device)
            finally:
                window.wall_s = self._clock() - began
                self._depth -= 1
                if self._depth == 0:
                    self._watch.stop()
                # Stopped before the last reading: what a sensor must do to stop, it then does once, not twice.
                failure = self._attempt(self.sensor.stop) if self._depth == 0 else None
                after = failure or self._read()
                window.energy, window.parts = self._energy(before, self._change(after) if aligned else after,
                                                           window.wall_s, falls)
                window.so_far = lambda: (window.wall_s, window.energy)

    def _read(self) -> dict[str, float] | str:
        """Joules by part, or why there are none."""
        try:
            return self._watch.read()
        except Exception as error:  # drivers raise what they like; the work that is metered must go on
            return self._failed(error)

    def _change(self, reading: dict[str, float] | str) -> dict[str, float] | str:
        """Every part at its next change after `reading`; one that does not change within a few updates as it is."""
        period = self.sensor.update_period_s
        if isinstance(reading, str) or self.sensor.provenance != "measured" or not period or period < WORTH_WAITING_S:
            return reading
        found: dict[str, float] = {}
        until = self._clock() + PATIENCE * period
        while len(found) < len(reading) and self._clock() < until:
            self._sleep(period / 100)
            now = self._read()
            if isinstance(now, str):
                return now
            found |= {part: joules for part, joules in now.items()
                      if part not in found and joules != reading.get(part)}
        return reading | found

    def _attempt(self, action: Callable[[], None]) -> str | None:
        try:
            action()
        except Exception as error:  # as above
            return self._failed(error)
        return None

    def _failed(self, error: Exception) -> str:
        return f"sensor {self.sensor.name} failed: {type(error).__name__}: {error}"

    def _energy(self, before: dict[str, float] | str, after: dict[str, float] | str, wall_s: float,
                falls: int) -> tuple[Quantity, dict[str, Quantity]]:
        """falls: how many of the watch's were seen before the window began."""
        sensor = self.sensor
        if sensor.provenance == "null":
            return Quantity.null("J", sensor.method), {}
        for reading in (before, after):
            if isinstance(reading, str):
                return Quantity.null("J", reading), {}
        assert isinstance(before, dict) and isinstance(after, dict)
        period = sensor.update_period_s
        if period is not None and wall_s < period:
            return Quantity.null("J", f"the window of {wall_s:.2g} s is shorter than one update of {sensor.name} "
                                      f"({period:g} s)"), {}
        if before.keys() != after.keys():
            lost = ", ".join(sorted(before.keys() ^ after.keys()))
            return Quantity.null("J", f"sensor {sensor.name} did not read {lost} at both ends of the window"), {}
        steps = {part: after[part] - before[part] for part in before}
        fallen = [part for part, step in steps.items() if step < 0 or part in self._watch.falls[falls:]]
        parts = {part: self._part(part, -1.0 if part in fallen else step, wall_s) for part, step in steps.items()}
        still = [part for part, step in steps.items() if step == 0]
        if fallen:
            return Quantity.null("J", f"the counter of {sensor.name} fell ({', '.join(fallen)})"), parts
        if len(still) == len(steps) or (still and sensor.provenance == "measured"):
            return Quantity.null("J", f"the counter of {sensor.name} did not advance within {wall_s:.2g} s "
                                      f"({', '.join(still) or 'no parts'})"), parts
        return Quantity(sum(steps.values()), "J", sensor.provenance, sensor.method), parts

    def _part(self, part: str, joules: float, wall_s: float) -> Quantity:
        if joules > 0:
            return Quantity(joules, "J", self.sensor.provenance, f"{part}: {self.sensor.method}")
        what = "did not advance" if joules == 0 else "fell"
        return Quantity.null("J", f"{part}: the counter of {self.sensor.name} {what} within {wall_s:.2g} s")

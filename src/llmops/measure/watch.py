"""A counter looked at between the ends of a window, too, for what its ends cannot tell.

A driver that is loaded again, or a board that wakes up, may set a counter back to 0. If it then passes its old value
before the window ends, the difference of the two ends is positive and wrong. So every reading is held against the one
before it, and while a window of a hardware counter is open a thread takes one every second: to pass unseen, a counter
would have to be set back and catch up between two of those, and the error is then less than what it counts in that
time. A reading that fails here is no verdict: the ends of the window are what has to be read.
"""

from __future__ import annotations

import contextlib
import threading

from llmops.measure.sensors import Poller, Sensor

__all__ = ["Watch"]

EVERY_S = 1.0


class Watch:
    """Reads `sensor`; `falls` are the parts whose counter fell, in the order in which that was seen."""

    def __init__(self, sensor: Sensor, every_s: float = EVERY_S) -> None:
        self.falls: list[str] = []
        self._sensor = sensor
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()  # from the reading to its comparison, else a later one could come in between
        self._poller = Poller(self._look, every_s) if sensor.provenance == "measured" else None

    def read(self) -> dict[str, float]:
        """The sensor's reading; raises what the sensor raises."""
        with self._lock:
            reading = dict(self._sensor.read())
            self.falls += [part for part, joules in reading.items() if joules < self._last.get(part, joules)]
            self._last = reading
        return reading

    def _look(self) -> None:
        with contextlib.suppress(Exception):
            self.read()

    def start(self) -> None:
        if self._poller is not None:
            self._poller.start()

    def stop(self) -> None:
        if self._poller is not None:
            self._poller.stop()

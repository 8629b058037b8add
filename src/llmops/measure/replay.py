"""Traces: what a sensor read over time, recorded, kept as CSV, and played back as a sensor.

A trace is a staircase: at each of its times a reading of every part, which holds until the next. `Replay` gives what
the counter would have shown at the clock's time, so every rule of `meter.py` can be tried on a record of a real card,
or on one whose energy is known because it was computed.

    s,gpu0,gpu1
    0.0,0.0,0.0
    0.1,25.4,24.9
"""

from __future__ import annotations

import csv
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmops.errors import LlmopsError
from llmops.measure.sensors import Sensor
from llmops.quantity import Provenance

__all__ = ["Replay", "Trace", "read_trace", "record", "write_trace"]


@dataclass(frozen=True)
class Trace:
    """times: seconds, rising; joules: part -> what its counter showed from each time on."""

    times: Sequence[float]
    joules: Mapping[str, Sequence[float]]

    def at(self, second: float) -> dict[str, float]:
        """The readings that stood at a time. Raises RuntimeError before the first and long after the last."""
        index = bisect_right(self.times, second) - 1
        if index < 0:
            raise RuntimeError(f"the trace begins at {self.times[0]:g} s, asked for {second:g} s")
        return {part: values[index] for part, values in self.joules.items()}


class Replay:
    """A trace as a sensor, on a clock. ends_s: from then on every reading fails, as a sensor's that died."""

    def __init__(self, trace: Trace, clock: Callable[[], float] = time.perf_counter, *,
                 update_period_s: float | None = None, ends_s: float | None = None,
                 provenance: Provenance = "measured", method: str = "replayed trace") -> None:
        self.name, self.method = "replay", method
        self.provenance: Provenance = provenance
        self.update_period_s = update_period_s
        self.skipped: dict[str, str] = {}
        self._trace, self._clock, self._ends_s = trace, clock, ends_s
        self._began = clock()

    def start(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        second = self._trace.times[0] + self._clock() - self._began
        if self._ends_s is not None and second >= self._ends_s:
            raise RuntimeError(f"the device is lost since {self._ends_s:g} s")
        return self._trace.at(second)

    def stop(self) -> None:
        pass


def record(sensor: Sensor, seconds: float, every_s: float = 0.01, clock: Callable[[], float] = time.perf_counter,
           sleep: Callable[[float], None] = time.sleep) -> Trace:
    """What a sensor shows, read every `every_s` seconds; readings that did not change are not kept."""
    began = clock()
    times, rows = [0.0], [sensor.read()]
    while (now := clock() - began) < seconds:
        reading = sensor.read()
        if reading != rows[-1]:
            times.append(now)
            rows.append(reading)
        sleep(every_s)
    return Trace(times, {part: [row[part] for row in rows] for part in rows[0]})


def write_trace(trace: Trace, path: Path) -> None:
    """As CSV, to be read by `read_trace` and by anything else."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["s", *trace.joules])
        out.writerows([repr(second), *(repr(values[index]) for values in trace.joules.values())]
                      for index, second in enumerate(trace.times))


def read_trace(path: Path) -> Trace:
    """A recorded trace. Raises LlmopsError for a file that is none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            head, *rows = list(csv.reader(file))
        numbers = [[float(cell) for cell in row] for row in rows]
    except (OSError, ValueError) as error:
        raise LlmopsError(f"{path}: cannot be read as a trace ({error}); expected CSV: s and a column a "
                          "part") from error
    times = [row[0] for row in numbers]
    if head[0] != "s" or not numbers or any(len(row) != len(head) for row in numbers) or times != sorted(times):
        raise LlmopsError(f"{path}: is no trace; expected CSV whose first column is s, rising, and a column a part")
    return Trace(times, {part: [row[index] for row in numbers] for index, part in enumerate(head) if index})

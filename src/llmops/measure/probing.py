"""How often a counter changes, found by reading it until it has changed a number of times.

Data sheets name a period for a family of cards; what a window needs is that of this one. Read as fast as it answers,
a counter stands still and then jumps; the times of its jumps are P apart. The median of those gaps is the period (a
jump that the reader slept through makes one gap of 2 P, which a median ignores), and of several parts the slowest
counts. A part that does not move while another makes all its jumps may be a device that is off: it is not waited for,
windows find it out. A counter that changes at every reading is read faster than it can be told: None, continuous.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from llmops.measure.sensors import Sensor

__all__ = ["update_period"]

JUMPS = 12
EVERY_READING = 0.9  # of the readings changed: continuous
PAUSE_S = 0.0005


def update_period(sensor: Sensor, most_s: float = 3.0, clock: Callable[[], float] = time.perf_counter,
                  sleep: Callable[[float], None] = time.sleep) -> float | None:
    """Seconds between two changes of the slowest part; None where it changes continuously, or too rarely to tell.

    Takes JUMPS changes of every part that moves, `most_s` seconds at most.
    """
    last, jumps, readings = sensor.read(), dict[str, list[float]](), 0
    until = clock() + most_s
    while clock() < until and not (jumps and all(len(times) > JUMPS for times in jumps.values())):
        sleep(PAUSE_S)
        now, reading = clock(), sensor.read()
        readings += 1
        for part, joules in reading.items():
            if joules != last.get(part):
                jumps.setdefault(part, []).append(now)
        last = reading
    periods = []
    for times in jumps.values():
        gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        if len(gaps) >= 2 and len(times) < EVERY_READING * readings:
            periods.append(median(gaps))
    return max(periods, default=None)

"""Devices whose energy is known because it is computed: a power over time, and counters that show it in their own way.

    power      piecewise linear (steps and ramps); its integral is exact
    counter    the integral, rounded down to `step_j`, at its last update; an update may be missed; it may wrap
    gauge      what a power reading shows: the mean of the last `average_s`, at its last update
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Power:
    """Watts at times, linear between; two equal times make a step. `energy` integrates exactly."""

    points: tuple[tuple[float, float], ...]
    _sums: list[float] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        total = 0.0
        self._sums.append(0.0)
        for (t0, w0), (t1, w1) in zip(self.points, self.points[1:], strict=False):
            total += (w0 + w1) / 2 * (t1 - t0)
            self._sums.append(total)

    def energy(self, second: float) -> float:
        """Joules from the first point to `second`."""
        index = min(bisect_right([time for time, _ in self.points], second), len(self.points) - 1) - 1
        (t0, w0), (t1, w1) = self.points[index], self.points[index + 1]
        here = w0 if t1 == t0 else w0 + (w1 - w0) * (second - t0) / (t1 - t0)
        return self._sums[index] + (w0 + here) / 2 * (second - t0)


@dataclass(frozen=True)
class Counter:
    """A hardware counter over a power. missed: share of updates that do not happen; wraps_j: where it begins again."""

    power: Power
    period_s: float = 0.1
    step_j: float = 0.001
    phase_s: float = 0.0
    missed: float = 0.0
    wraps_j: float | None = None
    seed: int = 0

    def _updated(self, second: float) -> float:
        tick = math.floor((second - self.phase_s) / self.period_s)
        while tick > 0 and random.Random(self.seed * 1_000_003 + tick).random() < self.missed:
            tick -= 1
        return max(0.0, tick * self.period_s + self.phase_s)

    def joules(self, second: float) -> float:
        """What it shows."""
        shown = math.floor(self.power.energy(self._updated(second)) / self.step_j) * self.step_j
        return shown % self.wraps_j if self.wraps_j is not None else shown

    def watts(self, second: float, average_s: float = 1.0) -> float:
        """What a gauge beside it shows."""
        at = self._updated(second)
        began = max(0.0, at - average_s)
        return (self.power.energy(at) - self.power.energy(began)) / (at - began) if at > began else 0.0


def steps(draw: random.Random, seconds: float) -> Power:
    """Idle and work in turns, each some tenths of a second to some seconds long."""
    points, now = [(0.0, 80.0)], 0.0
    while now < seconds:
        last = points[-1][1]
        now += draw.uniform(0.2, 4.0)
        points += [(now, last), (now, draw.choice((80.0, 250.0, 400.0, 690.0)))]
    return Power((*points, (now + 10, points[-1][1])))


def ramps(draw: random.Random, seconds: float) -> Power:
    """A card that warms up and throttles: slopes of some seconds."""
    points, now = [(0.0, 80.0)], 0.0
    while now < seconds:
        now += draw.uniform(1.0, 8.0)
        points.append((now, draw.uniform(80.0, 700.0)))
    return Power((*points, (now + 10, points[-1][1])))


def bursts(draw: random.Random, seconds: float) -> Power:
    """Decoding: 35 ms of work, 15 ms of waiting, faster than any counter."""
    points, now = [], 0.0
    while now < seconds + 10:
        points += [(now, 420.0), (now + 0.035, 420.0), (now + 0.035, 120.0), (now + 0.05, 120.0)]
        now += 0.05 * draw.uniform(0.98, 1.02) + 1e-9
    return Power(tuple(points))


IDLE_W, BEFORE_S, AFTER_S = 80.0, 15.0, 12.0
SHAPES = {"steps": steps, "ramps": ramps, "bursts": bursts}


@dataclass(frozen=True)
class Case:
    """One window of work on an idle device. true_j: of the work alone, from `begin` to `end`."""

    shape: str
    missed: float
    window_s: float
    counter: Counter
    begin: float
    end: float

    @property
    def true_j(self) -> float:
        return self.counter.power.energy(self.end) - self.counter.power.energy(self.begin)


def cases(window_s: float, each: int) -> list[Case]:
    """`each` windows of every shape, up to a twentieth longer than `window_s`, without and with a tenth of the updates
    missing; the same in every process."""
    found = []
    for shape, make in SHAPES.items():
        for missed in (0.0, 0.1):
            for number in range(each):
                seed = f"{shape} {missed} {number}"
                draw = random.Random(seed)
                length = window_s * draw.uniform(1.0, 1.05)  # work ends when it ends, not at an update
                power = _worked(make(draw, length), length)
                counter = Counter(power, phase_s=draw.uniform(0, 0.1), missed=missed, seed=number)
                found.append(Case(shape, missed, length, counter, BEFORE_S, BEFORE_S + length))
    return found


def _worked(work: Power, window_s: float) -> Power:
    """Idle, the work for as long as the window, idle."""
    inside = [(time, watts) for time, watts in work.points if time < window_s]
    last = inside[-1][1]
    shifted = [(BEFORE_S + time, watts) for time, watts in inside]
    end = BEFORE_S + window_s
    return Power(((0.0, IDLE_W), (BEFORE_S, IDLE_W), *shifted, (end, last), (end, IDLE_W), (end + AFTER_S, IDLE_W)))

"""Carbon intensity by zone and hour, from a CSV, and the cleanest window in it.

    utc,zone,g_per_kwh
    2026-11-24T00:00Z,FRA,41
    2026-11-24T01:00Z,FRA,38

A figure holds from its time to the next of its zone, the last one as long as the one before it. Means are weighted by
time, exactly. What the file does not cover is refused, never taken from a neighbouring hour or another zone.

The cleanest window of a fixed length (`cleanest`): the mean over [t, t + d] is piecewise linear in t and bends only
where t or t + d is a boundary of two figures, so its least value is at one of these places or at an end of what is
allowed. Those are all looked at; the earliest of equal ones wins.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from llmops.errors import LlmopsError, nearest, unknown
from llmops.quantity import Quantity

__all__ = ["COLUMNS", "Grid", "Window", "cleanest", "from_figures", "read_grid"]

COLUMNS = ("utc", "zone", "g_per_kwh")
MOST_G_PER_KWH = 3000.0  # above every grid there is; more is another unit
HOLD_S = 3600.0  # how long a provider's figure stands in for the next one that is late, beyond its own period


@dataclass(frozen=True)
class Grid:
    """`zones`: name -> (seconds since the epoch at which each figure begins, and at last ends; the figures, g/kWh).

    kind: "average", "marginal", or "" where nobody said.
    """

    name: str
    zones: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]
    kind: str = ""

    def zone(self, wanted: str | None) -> str:
        """The zone asked for, or the only one. Raises LlmopsError for a zone that the file does not have."""
        if wanted is None:
            if len(self.zones) == 1:
                return next(iter(self.zones))
            raise LlmopsError(f"{self.name} holds {len(self.zones)} zones: {', '.join(self.zones)}; expected one to be "
                              "chosen: set measure.zone in the recipe, or --zone beside --forecast")
        if wanted not in self.zones:
            raise LlmopsError(f"{self.name}: {unknown('zone', wanted, self.zones)}; another zone is not taken instead")
        return wanted

    def covers(self, zone: str) -> tuple[float, float]:
        """First and last second that the zone has a figure for."""
        times, _ = self.zones[zone]
        return times[0], times[-1]

    def mean(self, zone: str, start: float, end: float) -> float:
        """Mean g/kWh over [start, end] in seconds since the epoch, weighted by time; at an instant, the figure there.

        Raises LlmopsError when the file does not cover all of it.
        """
        times, figures = self.zones[zone]
        if start < times[0] or end > times[-1] or end < start:
            raise LlmopsError(f"{self.name} tells of {zone} from {_shown(times[0])} to {_shown(times[-1])}; asked for "
                              f"{_shown(start)} to {_shown(end)}: use a file that covers it")
        at = min(bisect_right(times, start) - 1, len(figures) - 1)
        if end == start:
            return figures[at]
        total = []
        while at < len(figures) and times[at] < end:
            total.append(figures[at] * (min(end, times[at + 1]) - max(start, times[at])))
            at += 1
        return math.fsum(total) / (end - start)

    def intensity(self, zone: str | None, start: float, end: float) -> Quantity:
        """The mean as a Quantity; null with the reason where the file does not cover the time."""
        chosen = self.zone(zone)
        try:
            value = self.mean(chosen, start, end)
        except LlmopsError as error:
            return Quantity.null("gCO2e/kWh", str(error))
        kind = f"{self.kind}, " if self.kind else ""
        return Quantity(value, "gCO2e/kWh", "estimated",
                        f"{chosen}, mean from {_shown(start)} to {_shown(end)}, {kind}location-based ({self.name})")


@dataclass(frozen=True)
class Window:
    """A stretch of time and its mean intensity. Seconds since the epoch, g/kWh."""

    start: float
    end: float
    g_per_kwh: float


def cleanest(grid: Grid, zone: str, earliest: float, deadline: float, lasts_s: float) -> Window:
    """The window of `lasts_s` seconds between `earliest` and `deadline` with the lowest mean; equal ones: the earliest.

    Only what the file covers is looked at. Raises LlmopsError where no window fits.
    """
    times, _ = grid.zones[zone]
    last = min(deadline, times[-1]) - lasts_s
    if last < earliest:
        raise LlmopsError(f"no window of {lasts_s / 3600:.3g} h fits between {_shown(earliest)} and "
                          f"{_shown(min(deadline, times[-1]))}: {grid.name} ends at {_shown(times[-1])} and the "
                          f"deadline is {_shown(deadline)}; expected a later deadline, a longer forecast, or a shorter "
                          "run (--lasts)")
    bends = {earliest, last, *times, *(time - lasts_s for time in times)}
    starts = sorted(start for start in bends if earliest <= start <= last)
    means = [(grid.mean(zone, start, start + lasts_s), start) for start in starts]
    least = min(mean for mean, _ in means)
    mean, start = next(each for each in means if each[0] <= least * (1 + 1e-12))
    return Window(start, start + lasts_s, mean)


def from_figures(name: str, zone: str, figures: Mapping[float, float], period_s: float, kind: str, start: float,
                 end: float | None) -> Grid:
    """The grid of one zone from what a provider published. figures: second -> g/kWh; end: None for a forecast.

    A figure holds until the next, at most for its period and `HOLD_S` more; the last of a forecast for its period. A
    first figure later than `start` by no more than its period (forecasts begin with the next one) holds from `start`.
    Raises LlmopsError where [start, end] is not covered so, and for figures that are no intensity.
    """
    wrong = next((value for value in figures.values() if not 0 <= value <= MOST_G_PER_KWH), None)
    if wrong is not None:
        raise LlmopsError(f"{name}: a figure of {wrong:g} for {zone}; expected grams CO2e per kWh, from 0 to "
                          f"{MOST_G_PER_KWH:g}")
    times = sorted(figures)
    if not times:
        raise LlmopsError(f"{name}: no figure for {zone}; expected some from {_shown(start)} on")
    ends = times[-1] + period_s + (HOLD_S if end is not None else 0)
    begins = [start if start < times[0] <= start + period_s else times[0], *times[1:], ends]
    late = next((here for here, later in zip(begins, begins[1:], strict=False)
                 if later - here > period_s + HOLD_S and later > start and (end is None or here < end)), None)
    if late is not None or begins[0] > start or (end is not None and begins[-1] < end):
        told = (f"knows nothing after {_shown(late)}" if late is not None else
                f"tells of {_shown(times[0])} to {_shown(times[-1])}")
        raise LlmopsError(f"{name} {told} of {zone}; expected figures from {_shown(start)}"
                          + (f" to {_shown(end)}" if end is not None else "") + " without a hole of over an hour")
    return Grid(name, {zone: (tuple(begins), tuple(figures[time] for time in times))}, kind)


def read_grid(path: Path | str) -> Grid:
    """The file's figures. Raises LlmopsError with the line of what is wrong in it."""
    path = Path(path)
    found: dict[str, dict[float, float]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                near = nearest(missing[0], reader.fieldnames or [])
                raise LlmopsError(f"{path}:1: no column {', '.join(missing)}; expected {','.join(COLUMNS)}{near}")
            for row in reader:
                time, zone, value = _row(path, reader.line_num, row)
                if time in found.setdefault(zone, {}):
                    raise LlmopsError(f"{path}:{reader.line_num}: a second figure for {zone} at {row['utc']}; expected "
                                      "one: remove one of the two")
                found[zone][time] = value
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LlmopsError(f"{path}: cannot be read ({error}); expected a CSV with {','.join(COLUMNS)}") from error
    if not found:
        raise LlmopsError(f"{path}: holds no figures; expected a line an hour with {','.join(COLUMNS)}")
    return Grid(path.name, {zone: _in_order(path, zone, figures) for zone, figures in found.items()})


def _row(path: Path, line: int, row: Mapping[str, str | None]) -> tuple[float, str, float]:
    zone = (row["zone"] or "").strip()
    try:
        time = datetime.fromisoformat((row["utc"] or "").strip())
    except ValueError:
        raise LlmopsError(f'{path}:{line}: utc "{row["utc"]}"; expected a time as 2026-11-24T13:00Z') from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)  # the column says so
    try:
        value = float(row["g_per_kwh"] or "")
    except ValueError:
        value = math.nan
    if not 0 <= value <= MOST_G_PER_KWH:
        raise LlmopsError(f'{path}:{line}: g_per_kwh "{row["g_per_kwh"]}"; expected grams CO2e per kWh, from 0 to '
                          f"{MOST_G_PER_KWH:g}")
    if not zone:
        raise LlmopsError(f"{path}:{line}: no zone; expected its name, as FRA")
    return time.timestamp(), zone, value


def _in_order(path: Path, zone: str, figures: Mapping[float, float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    times = sorted(figures)
    steps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    if steps and max(steps) > min(steps):
        hole = times[steps.index(max(steps))]
        raise LlmopsError(f"{path}: the figures of {zone} are {min(steps) / 60:g} to {max(steps) / 60:g} minutes apart "
                          f"(after {_shown(hole)}); expected even steps without holes")
    return (*times, times[-1] + (steps[-1] if steps else 3600.0)), tuple(figures[time] for time in times)


def _shown(seconds: float) -> str:
    return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds):%Y-%m-%dT%H:%MZ}"

"""Start when the grid is cleanest: `llmops tune --green --deadline 12h`.

The forecast is a CSV of hours (`measure/grid.py`), `--forecast FILE` or the recipe's `measure.intensity`, or that of a
provider (`measure/providers`), `--forecast watttime` or the recipe's `measure.provider`. Of all
windows as long as the run that end before the deadline, the one with the lowest mean intensity is taken; the process
then sleeps until it begins. What starting at once would have meant is worked out from the same file and written down
in the run's folder (`start.json`) and, in grams, in every row. Nothing is saved in joules by waiting.

How long the run takes is `--lasts`, else what the ledger knows of the same variants, else an hour, and it says which.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError
from llmops.measure.grid import Grid, cleanest, read_grid
from llmops.measure.providers import PROVIDERS, forecast
from llmops.quantity import Quantity, weakest
from llmops.recipe.plan import Plan
from llmops.recipe.schema import Recipe

__all__ = ["Green", "Start", "asked", "choose", "seconds", "wait"]

ASSUMED_S = 3600.0
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NAP_S = 30.0  # clocks are set and laptops sleep: the time is looked at again


@dataclass(frozen=True)
class Green:
    """What the command line asked for. deadline_s, lasts_s: seconds from now; forecast: a CSV, or a provider's name;
    zone: of the forecast, where it is not the recipe's."""

    deadline_s: float
    forecast: Path | None = None
    lasts_s: float | None = None
    zone: str | None = None


@dataclass(frozen=True)
class Start:
    """What was chosen. Times in seconds since the epoch, intensities in g/kWh (means over the run's length)."""

    zone: str
    forecast: str
    asked: float
    start: float
    lasts_s: float
    lasts_from: str
    deadline: float
    g_per_kwh: float
    now_g_per_kwh: float
    kind: str = "not told"

    @property
    def waited_s(self) -> float:
        return self.start - self.asked

    def as_dict(self) -> dict[str, Any]:
        """For `start.json`, with the two times also in words."""
        return {**asdict(self), "waited_s": self.waited_s, "asked_utc": _utc(self.asked),
                "start_utc": _utc(self.start), "saved": 1 - self.g_per_kwh / self.now_g_per_kwh
                if self.now_g_per_kwh else None}

    def told(self) -> str:
        """A line for people."""
        change = 100 * (self.g_per_kwh / self.now_g_per_kwh - 1) if self.now_g_per_kwh else 0.0
        when = "at once" if self.waited_s <= 0 else f"at {_utc(self.start)}, in {self.waited_s / 3600:.2g} h"
        kind = f" ({self.kind})" if self.kind != "not told" else ""
        return (f"green start: {when}; {self.g_per_kwh:.4g} gCO2e/kWh in {self.zone} by {self.forecast}{kind}, "
                f"starting now {self.now_g_per_kwh:.4g} ({change:+.1f} %); a run of {self.lasts_s / 3600:.2g} h "
                f"({self.lasts_from})")

    def row(self, building_j: Quantity) -> dict[str, Any]:
        """For a row's group "carbon": both intensities, and the grams of building had the run started at once."""
        kind = f"{self.kind}, " if self.kind != "not told" else ""
        method = f"forecast {self.forecast}, {kind}{self.zone}, mean over {self.lasts_s / 3600:.2g} h from "
        grid = Quantity(self.now_g_per_kwh, "gCO2e/kWh", "estimated", f"{method}{_utc(self.asked)}, starting at once")
        if building_j.value is None:
            grams = Quantity.null("gCO2e", building_j.method)
        else:
            grams = Quantity(building_j.value * self.now_g_per_kwh / 3.6e6, "gCO2e",
                             weakest([building_j.provenance, grid.provenance]),
                             f"had it started at once: energy ({building_j.method}) x intensity ({grid.method})")
        chosen = Quantity(self.g_per_kwh, "gCO2e/kWh", "estimated", f"{method}{_utc(self.start)}, the green start")
        return {"start_intensity": chosen.as_dict(), "start_now_intensity": grid.as_dict(),
                "start_now_building_g": grams.as_dict()}


def seconds(given: str, what: str) -> float:
    """"90m" -> 5400.0. Raises LlmopsError for anything but a number with s, m, h or d."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", given.strip())
    if found is None or float(found[1]) <= 0:
        raise LlmopsError(f'{what} "{given}"; expected a time from now as 90m, 12h or 2d')
    return float(found[1]) * UNITS[found[2]]


def asked(green: bool, deadline: str | None, forecast: str | None, lasts: str | None, zone: str | None = None,
          ) -> Green | None:
    """What the options of `tune` come to. Raises LlmopsError for options that miss each other."""
    if not green:
        for name, given in (("--deadline", deadline), ("--forecast", forecast), ("--lasts", lasts), ("--zone", zone)):
            if given is not None:
                raise LlmopsError(f"{name} {given} was given without --green; expected both or neither")
        return None
    if deadline is None:
        raise LlmopsError("--green needs a deadline by which the run is to be done; expected --deadline 12h")
    return Green(seconds(deadline, "--deadline"), Path(forecast) if forecast is not None else None,
                 seconds(lasts, "--lasts") if lasts is not None else None, zone)


def choose(green: Green, plan: Plan, rows: Iterable[Mapping[str, Any]] = (), now: float | None = None) -> Start:
    """The cleanest window for what the plan has left to do. rows: of the ledger, for how long it takes.

    Raises LlmopsError without a forecast, for a zone that it does not have, or when no window fits.
    """
    asked = time.time() if now is None else now
    grid, zone = _forecast(green, plan.recipe, asked)
    lasts_s, source = (green.lasts_s, "--lasts") if green.lasts_s is not None else _expected(plan, rows)
    if lasts_s > green.deadline_s:
        raise LlmopsError(f"--deadline is {green.deadline_s / 3600:.3g} h from now and the run takes "
                          f"{lasts_s / 3600:.3g} h ({source}); expected a deadline after its end")
    deadline = asked + green.deadline_s
    begins, ends = grid.covers(zone)
    if not begins <= asked or asked + lasts_s > ends:
        raise LlmopsError(f"{grid.name}: tells of {zone} from {_utc(begins)} to {_utc(ends)}; a run of "
                          f"{lasts_s / 3600:.3g} h from now ({_utc(asked)}) is not in it: use a forecast that "
                          "covers it, or --lasts")
    found = cleanest(grid, zone, asked, deadline, lasts_s)
    return Start(zone, grid.name, asked, found.start, lasts_s, source, deadline, found.g_per_kwh,
                 grid.mean(zone, asked, asked + lasts_s), grid.kind or "not told")


def _forecast(green: Green, recipe: Recipe, now: float) -> tuple[Grid, str]:
    """(the forecast, the zone in it)."""
    measure = recipe.measure
    provider, file, own = (measure.provider, measure.intensity, measure.zone) if measure is not None else (None,) * 3
    given = str(green.forecast) if green.forecast is not None else None
    if given in PROVIDERS or (given is None and provider is not None):
        name = given if given is not None else str(provider)
        zone = green.zone or (own if provider == name else None)
        if zone is None:
            raise LlmopsError(f"--forecast {name} needs a zone as {PROVIDERS[name].title} names them, as "
                              f"{PROVIDERS[name].zones}; expected --zone, or measure.provider with measure.zone")
        return forecast(name, zone, green.deadline_s / 3600, now), zone
    path = green.forecast or (recipe.base_dir / file if file is not None else None)
    if path is None:
        raise LlmopsError("--green was given without a forecast; expected a CSV with utc,zone,g_per_kwh: "
                          f"--forecast FILE, or measure.intensity in the recipe; or a provider: {', '.join(PROVIDERS)}")
    grid = read_grid(path)
    return grid, grid.zone(green.zone or own)


def wait(start: Start, clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep) -> None:
    """Sleep until the window begins. An interrupt ends it; nothing has been done by then."""
    while (left := start.start - clock()) > 0:
        sleep(min(left, NAP_S))


def _expected(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> tuple[float, str]:
    """Seconds of what is left, by what the same variants took before."""
    took: dict[str, float] = {}
    for row in rows:
        if row["identity"]["run"] == plan.recipe.name and row["status"]["state"] == "ok":
            parts = [(row["building"].get(name) or {}).get("value") for name in ("wall_s", "evaluate_wall_s")]
            took[row["identity"]["variant"]] = sum(part or 0.0 for part in parts)
    left = [stage.variant for stage in plan.stages if not stage.done]
    known = [took[name] for name in left if name in took]
    if not left or len(known) < len(left) or sum(known) <= 0:
        return ASSUMED_S, "assumed: the ledger does not know all of its variants; say --lasts"
    return sum(known), "what the same variants took before"


def _utc(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%dT%H:%MZ}"

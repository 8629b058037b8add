"""The Carbon Intensity API of Great Britain's system operator (NESO): half-hourly averages, two days ahead. No key.

    GET /intensity/FROM/TO     {"data": [{"from", "to", "intensity": {"forecast", "actual"}}]}, at most 14 days
    GET /intensity/FROM/fw48h  the same, from FROM on

The estimate from what was generated ("actual") where there is one, else the forecast. It covers Great Britain and
nothing else, so that any zone but GB is refused.
"""

from __future__ import annotations

from typing import Any

from llmops.errors import LlmopsError
from llmops.measure.grid import Grid, from_figures
from llmops.measure.providers.web import get, iso, number, seconds_of

__all__ = ["ZONES", "forecast", "history"]

BASE = "https://api.carbonintensity.org.uk"
TITLE = "UK Carbon Intensity"
ZONES = ("GB",)
PERIOD_S = 1800.0
LONGEST_S = 13 * 86400.0


def history(zone: str, start: float, end: float) -> Grid:
    """Half-hourly figures from start to end. Raises LlmopsError."""
    figures, at = dict[float, float](), start - start % PERIOD_S
    while at < end:
        later = min(at + LONGEST_S, end)
        figures |= _ask(zone, f"{_minute(at)}/{_minute(later + PERIOD_S)}")
        at = later
    return from_figures(TITLE, zone, figures, PERIOD_S, "average", start, end)


def forecast(zone: str, hours: float, now: float) -> Grid:
    """Half-hourly figures of the 48 hours from now. Raises LlmopsError."""
    return from_figures(f"{TITLE}, forecast", zone, _ask(zone, f"{_minute(now)}/fw48h"), PERIOD_S, "average", now, None)


def _minute(seconds: float) -> str:
    return f"{iso(seconds)[:16]}Z"


def _ask(zone: str, what: str) -> dict[float, float]:
    if zone not in ZONES:
        raise LlmopsError(f'{TITLE} covers Great Britain alone; given zone "{zone}", expected GB')
    listed = get(TITLE, f"{BASE}/intensity/{what}", {}, {}, zone=zone).get("data")
    if not isinstance(listed, list):
        raise LlmopsError(f'{TITLE}: an answer without "data"; expected a list of half-hours')
    found = {}
    for each in listed:
        told: dict[str, Any] = each.get("intensity") or {}
        value = number(TITLE, told.get("actual") if told.get("actual") is not None else told.get("forecast"))
        if value is not None:
            found[seconds_of(TITLE, each.get("from"))] = value
    return found

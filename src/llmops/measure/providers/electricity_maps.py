"""Electricity Maps, API v4: hourly averages of what a zone consumes (flow-traced), life-cycle emission factors.

    GET /v4/carbon-intensity/history      the last 24 hours     {"zone", "history": [{"datetime", "carbonIntensity"}]}
    GET /v4/carbon-intensity/past-range   ten days at most      {"zone", "data": [...]}
    GET /v4/carbon-intensity/latest       the hour under way    {"zone", "datetime", "carbonIntensity"}
    GET /v4/carbon-intensity/forecast     6, 24, 48 or 72 h     {"zone", "forecast": [...]}

The key goes into the header `auth-token`. `disableCallerLookup` keeps it from answering for where the caller stands
when it does not know the zone, and the zone of every answer is compared with the one asked for. Which of these a key
may use depends on its plan; the free one has latest and history of one zone. Recent hours are estimates of theirs.
"""

from __future__ import annotations

import time
from typing import Any

from llmops.errors import LlmopsError
from llmops.measure.grid import Grid, from_figures
from llmops.measure.providers.web import get, iso, keys, number, seconds_of

__all__ = ["forecast", "history"]

BASE = "https://api.electricitymaps.com"
TITLE = "Electricity Maps"
VARIABLES = ("ELECTRICITY_MAPS_TOKEN",)
HOUR_S = 3600.0
RECENT_S = 23 * HOUR_S  # what `history` surely holds
LONGEST_S = 9 * 24 * HOUR_S
HORIZONS = (6, 24, 48, 72)


def history(zone: str, start: float, end: float) -> Grid:
    """Hourly figures from start to end. Raises LlmopsError."""
    figures: dict[float, float] = {}
    if start >= time.time() - RECENT_S:
        figures |= _figures(_ask(zone, "history"), "history")
    else:
        at = start - start % HOUR_S
        while at < end:
            later = min(at + LONGEST_S, end)
            figures |= _figures(_ask(zone, "past-range", start=iso(at), end=iso(later)), "data")
            at = later
    if not figures or max(figures) + HOUR_S < end:
        figures |= _latest(zone)
    return from_figures(f"{TITLE}, life-cycle, flow-traced", zone, figures, HOUR_S, "average", start, end)


def forecast(zone: str, hours: float, now: float) -> Grid:
    """Hourly figures from now on, for at most 72 hours. Raises LlmopsError."""
    horizon = next((each for each in HORIZONS if each >= hours), HORIZONS[-1])
    figures = _latest(zone) | _figures(_ask(zone, "forecast", horizonHours=horizon), "forecast")
    return from_figures(f"{TITLE}, forecast", zone, figures, HOUR_S, "average", now, None)


def _latest(zone: str) -> dict[float, float]:
    return _figures({"data": [_ask(zone, "latest")]}, "data")


def _ask(zone: str, what: str, **query: Any) -> dict[str, Any]:
    [token] = keys(TITLE, VARIABLES)
    answer = get(TITLE, f"{BASE}/v4/carbon-intensity/{what}",
                 {"zone": zone, "temporalGranularity": "hourly", "disableCallerLookup": "true", **query},
                 {"auth-token": token}, zone=zone, hidden=[token], variables=VARIABLES)
    if answer.get("zone") != zone:
        raise LlmopsError(f'{TITLE}: asked for zone "{zone}", answered for "{answer.get("zone")}"; expected the zone '
                          "that was asked for: its names are as FR, DE or US-CAL-CISO")
    return answer


def _figures(answer: dict[str, Any], key: str) -> dict[float, float]:
    listed = answer.get(key)
    if not isinstance(listed, list):
        raise LlmopsError(f'{TITLE}: an answer without "{key}"; expected a list of hours')
    found = {}
    for each in listed:
        value = number(TITLE, each.get("carbonIntensity"))
        if value is not None:
            found[seconds_of(TITLE, each.get("datetime"))] = value
    return found

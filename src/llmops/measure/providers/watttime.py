"""WattTime, API v3: the marginal emissions rate (MOER), what one more kWh causes, not what the average kWh did.

    GET /login           HTTP Basic               {"token"}, good for half an hour
    GET /v3/historical   region, start, end       {"data": [{"point_time", "value"}], "meta": {"region", "units"}}
    GET /v3/forecast     region, horizon_hours    the same

Figures come in pounds of CO2 a megawatt-hour, every five minutes, and are turned into g/kWh here. Marginal figures suit
the question when to run; they are not what an inventory reports, and every row that holds one says "marginal". Without
a plan only the region CAISO_NORTH is open.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from llmops.errors import LlmopsError
from llmops.measure.grid import Grid, from_figures
from llmops.measure.providers.web import get, iso, keys, number, seconds_of

__all__ = ["forecast", "history"]

BASE = "https://api.watttime.org"
TITLE = "WattTime"
VARIABLES = ("WATTTIME_USER", "WATTTIME_PASSWORD")
SIGNAL, UNITS = "co2_moer", "lbs_co2_per_mwh"
G_PER_LB = 453.59237
PERIOD_S = 300.0
LONGEST_S = 30 * 86400.0
MOST_HOURS = 72


def history(zone: str, start: float, end: float) -> Grid:
    """Figures of every five minutes from start to end. Raises LlmopsError."""
    token, figures, at = _login(), dict[float, float](), start - PERIOD_S
    while at < end:
        later = min(at + LONGEST_S, end)
        figures |= _ask(token, zone, "historical", start=iso(at), end=iso(later))
        at = later
    return from_figures(f"{TITLE} {SIGNAL}", zone, figures, PERIOD_S, "marginal", start, end)


def forecast(zone: str, hours: float, now: float) -> Grid:
    """Figures of every five minutes from now on, for at most 72 hours. Raises LlmopsError."""
    horizon = max(1, min(MOST_HOURS, -int(-hours // 1)))
    figures = _ask(_login(), zone, "forecast", horizon_hours=horizon)
    return from_figures(f"{TITLE} {SIGNAL}, forecast", zone, figures, PERIOD_S, "marginal", now, None)


def _login() -> str:
    user, password = keys(TITLE, VARIABLES, ascii_only=False)
    basic = b64encode(f"{user}:{password}".encode()).decode()
    answer = get(TITLE, f"{BASE}/login", {}, {"Authorization": f"Basic {basic}"}, hidden=[password, basic],
                 variables=VARIABLES)
    token = answer.get("token")
    if not isinstance(token, str) or not token:
        raise LlmopsError(f"{TITLE}: the login answered without a token; expected one")
    return token


def _ask(token: str, zone: str, what: str, **query: Any) -> dict[float, float]:
    answer = get(TITLE, f"{BASE}/v3/{what}", {"region": zone, "signal_type": SIGNAL, **query},
                 {"Authorization": f"Bearer {token}"}, zone=zone, hidden=[token], variables=VARIABLES)
    meta, listed = answer.get("meta"), answer.get("data")
    if not isinstance(meta, dict) or not isinstance(listed, list):
        raise LlmopsError(f'{TITLE}: an answer without "data" and "meta"; expected both')
    if (meta.get("region"), meta.get("units"), meta.get("signal_type", SIGNAL)) != (zone, UNITS, SIGNAL):
        raise LlmopsError(f'{TITLE}: asked for {SIGNAL} of "{zone}" in {UNITS}, answered with '
                          f'{meta.get("signal_type")} of "{meta.get("region")}" in {meta.get("units")}; expected what '
                          "was asked for")
    found = {}
    for each in listed:
        value = number(TITLE, each.get("value"))
        if value is not None:
            found[seconds_of(TITLE, each.get("point_time"))] = value * G_PER_LB / 1000
    return found

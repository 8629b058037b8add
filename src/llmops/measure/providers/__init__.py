"""Carbon intensity by key, from who publishes it: opt-in, by name, for one zone, never another.

    web.py                  a request: time-out, no redirects, no key in any message
    electricity_maps.py     averages, world-wide; key
    watttime.py             marginal, world-wide; account
    uk_carbon_intensity.py  averages, Great Britain; no key

Keys come from environment variables and go into request headers alone: never into an address, a message, a log or a
row. Nothing is asked of the network unless a recipe (`measure.provider`) or a call (`--forecast NAME`) names one.

A figure holds from its time to the next one, at most for its period and an hour more: what a provider publishes late is
bridged so far, and no further. What is longer unknown is null with the reason. Whose answer is of another zone than
was asked for is refused: some answer for where the caller stands when they do not know the zone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llmops.errors import LlmopsError, unknown
from llmops.measure.grid import Grid

__all__ = ["PROVIDERS", "Provider", "forecast", "history", "provider_of"]


@dataclass(frozen=True)
class Provider:
    """module: here; kind: "average" or "marginal" (of one kWh more); variables: where its key is; zones: an example."""

    module: str
    title: str
    kind: str
    variables: tuple[str, ...]
    zones: str


PROVIDERS = {
    "electricity_maps": Provider("electricity_maps", "Electricity Maps", "average", ("ELECTRICITY_MAPS_TOKEN",),
                                 "FR, DE, US-CAL-CISO"),
    "watttime": Provider("watttime", "WattTime", "marginal", ("WATTTIME_USER", "WATTTIME_PASSWORD"),
                         "FR, CAISO_NORTH"),
    "uk_carbon_intensity": Provider("uk_carbon_intensity", "UK Carbon Intensity", "average", (), "GB")}


def provider_of(name: str) -> Provider:
    """Raises LlmopsError for a name that is none of them."""
    if name not in PROVIDERS:
        raise LlmopsError(unknown("provider", name, PROVIDERS))
    return PROVIDERS[name]


def history(name: str, zone: str, start: float, end: float) -> Grid:
    """The figures from `start` to `end`, seconds since the epoch. Raises LlmopsError: no key, a key that is refused, an
    unknown zone, no network, an answer that is not one."""
    ask: Callable[..., Grid] = _module(name).history
    return ask(zone, start, end)


def forecast(name: str, zone: str, hours: float, now: float | None = None) -> Grid:
    """The figures from now to `hours` later, as far as the provider looks ahead. Raises as `history`."""
    ask: Callable[..., Grid] = _module(name).forecast
    return ask(zone, hours, time.time() if now is None else now)


def _module(name: str) -> Any:
    return import_module(f"{__name__}.{provider_of(name).module}")

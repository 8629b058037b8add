"""Carbon, applied last: grams = energy x intensity of the grid.

The intensity comes from the table that CodeCarbon carries (annual averages by country, Our World in Data), read as a
file: no tracker, no network, no guess of where the machine stands. A zone that is not in it is an error with the
nearest one; another country is never taken instead. No zone at all is the world average, and says so.

SCI (Software Carbon Intensity, ISO/IEC 21031:2024) is ((E x I) + M) per R, here R = 1,000 output tokens: E the energy
of the workload (gross: reserved hardware counts), I the location-based intensity, M the embodied carbon of the
hardware. Without M there is no SCI: it is null then, and the operational part stands by itself.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError
from llmops.quantity import Quantity, weakest

__all__ = ["carbon", "embodied_per_1k", "grams", "intensity", "sci_per_1k", "zones"]

JOULES_PER_KWH = 3.6e6
INTENSITY_UNIT = "gCO2e/kWh"
TOKENS = 1000
YEAR_S = 365.25 * 86400
NO_EMBODIED = "embodied carbon of the hardware (M of ISO/IEC 21031) is not known: none was given"


@cache
def _table(name: str) -> dict[str, Any]:
    found = importlib.util.find_spec("codecarbon")  # does not import it: that takes most of a second
    if found is None or not found.submodule_search_locations:
        raise LlmopsError("carbon intensity: codecarbon is not installed, its table of countries is needed; "
                          "pip install codecarbon")
    path = Path(next(iter(found.submodule_search_locations))) / "data" / "private_infra" / name
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LlmopsError(f"carbon intensity: the table {path} of codecarbon cannot be read ({error}); "
                          "reinstall codecarbon") from error
    return table


def zones() -> dict[str, str]:
    """ISO 3166 alpha-3 codes that have an intensity -> name of the country."""
    # A grid of 0 g/kWh is a hole in the table (one country), not a grid: life-cycle figures of hydropower are about 20.
    return {code: row["country_name"] for code, row in _table("global_energy_mix.json").items()
            if row.get("carbon_intensity")}


def intensity(zone: str | None = None) -> Quantity:
    """gCO2e per kWh of the grid of `zone` (as "FRA"); None: the world average. Raises LlmopsError for another zone."""
    release = f"CodeCarbon {version('codecarbon')}"
    if zone is None:
        world = _table("carbon_intensity_per_source.json")
        return Quantity(float(world["world_average"]), INTENSITY_UNIT, "constant",
                        f"world average; no zone given ({release}, {world['world_average_source']})")
    known = zones()
    if zone not in known:
        meant = _likely(zone, known)
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise LlmopsError(f'zone "{zone}" has no carbon intensity; expected the ISO 3166 alpha-3 code of one of the '
                          f"{len(known)} countries in the table of {release}, as FRA{hint}; leave the zone out for the "
                          "world average")
    row = _table("global_energy_mix.json")[zone]
    return Quantity(float(row["carbon_intensity"]), INTENSITY_UNIT, "constant",
                    f"{known[zone]} ({zone}), annual average {row['year']}, location-based ({release}, "
                    "Our World in Data)")


def _likely(zone: str, known: Mapping[str, str]) -> list[str]:
    """`"FRA" (France)`: up to three countries that somebody who wrote `zone` may have meant, the likeliest first."""
    rank = {code: _likeness(zone.upper(), code, name.upper()) for code, name in known.items()}
    best = max(rank.values())
    found = sorted((code for code, likeness in rank.items() if likeness >= max(60, best - 20)),
                   key=lambda code: (-rank[code], code))
    return [f'"{code}" ({known[code]})' for code in found[:3]]


def _likeness(given: str, code: str, name: str) -> int:
    """How like what was given a country is, 0 to 100; 60 is worth saying. A code is known by its letters, a name by how
    it begins; ISO's codes of two letters mostly are the first of those of three and a later one."""
    area = given.replace("_", "-").partition("-")[0]  # a region of the country, as US-CAL
    initials = "".join(word[0] for word in name.split())
    if area == code or given in (name, initials):
        return 100
    if len(given) > 2 and name.startswith(given):
        return 95
    if len(area) == 2:
        return 90 if code.startswith(area) else 70 if area[0] == code[0] and area[1] in code[1:] else 0
    if len(given) == 3:
        same = sum(one == other for one, other in zip(given, code, strict=True))
        near = 60 if same == 2 else 55 if sorted(given) == sorted(code) else 0
        return near + (25 if name.startswith(given[:2]) else 5 if name[0] == given[0] else 0) if near else 0
    return 0


def _scaled(quantity: Quantity, factor: float, unit: str, other: Quantity, method: str) -> Quantity:
    assert quantity.value is not None
    ends = quantity.ci95
    return Quantity(quantity.value * factor, unit, weakest([quantity.provenance, other.provenance]), method,
                    (ends[0] * factor, ends[1] * factor) if ends else None, quantity.n)


def grams(energy: Quantity, grid: Quantity) -> Quantity:
    """Operational gCO2e of `energy` (J) on a grid of `grid` (gCO2e/kWh). The weakest provenance; null stays null."""
    for part in (energy, grid):
        if part.value is None:
            return Quantity.null("gCO2e", part.method)
    assert grid.value is not None
    return _scaled(energy, grid.value / JOULES_PER_KWH, "gCO2e", grid,
                   f"operational: energy ({energy.method}) x intensity ({grid.method})")


def sci_per_1k(joules_per_token: Quantity, grid: Quantity, embodied: Quantity | None = None) -> Quantity:
    """SCI of ISO/IEC 21031 for R = 1,000 output tokens, gCO2e. `embodied`: M, gCO2e per 1,000 output tokens.

    Null, with the reason, when M is not known; the operational part alone is `carbon(...)["per_1k_tokens_g"]`.
    """
    operational = _per_1k(joules_per_token, grid)
    for part in (operational, embodied or Quantity.null("gCO2e", NO_EMBODIED)):
        if part.value is None:
            return Quantity.null("gCO2e", f"no SCI: {part.method}")
    assert operational.value is not None and embodied is not None and embodied.value is not None
    ends = operational.ci95
    return Quantity(operational.value + embodied.value, "gCO2e",
                    weakest([operational.provenance, embodied.provenance]),
                    f"SCI (ISO/IEC 21031), R = 1,000 output tokens: {operational.method}; M: {embodied.method}",
                    (ends[0] + embodied.value, ends[1] + embodied.value) if ends else None, operational.n)


def _per_1k(joules_per_token: Quantity, grid: Quantity) -> Quantity:
    if joules_per_token.value is None:
        return Quantity.null("gCO2e", joules_per_token.method)
    ends = joules_per_token.ci95
    energy = Quantity(joules_per_token.value * TOKENS, "J", joules_per_token.provenance, joules_per_token.method,
                      (ends[0] * TOKENS, ends[1] * TOKENS) if ends else None, joules_per_token.n)
    return grams(energy, grid)


def embodied_per_1k(kg: float, lifetime_years: float, seconds_per_token: float | None) -> Quantity:
    """M of SCI for R = 1,000 output tokens, gCO2e: TE x TiR / EL, the hardware reserved whole (RR / ToR = 1).

    kg: TE, embodied kgCO2e of the hardware; lifetime_years: EL; seconds_per_token: of wall time, at the measured batch.
    """
    if seconds_per_token is None:
        return Quantity.null("gCO2e", "embodied carbon needs the time of a token, and none was measured")
    value = 1000 * kg * (seconds_per_token * TOKENS) / (lifetime_years * YEAR_S)
    return Quantity(value, "gCO2e", "estimated", f"declared {kg:g} kgCO2e over {lifetime_years:g} years x "
                                                 f"{seconds_per_token * TOKENS:.4g} s for 1,000 tokens")


def carbon(building_j: Quantity, joules_per_token: Quantity, grid: Quantity,
           embodied: Quantity | None = None) -> dict[str, Any]:
    """The row's group "carbon": intensity, grams of building, grams and SCI per 1,000 output tokens, as dicts.

    grid: `intensity(zone)`, or that of a file of hours; embodied: M per 1,000 output tokens.
    """
    known = embodied or Quantity.null("gCO2e", NO_EMBODIED)
    return {"intensity": grid.as_dict(), "building_g": grams(building_j, grid).as_dict(),
            "per_1k_tokens_g": _per_1k(joules_per_token, grid).as_dict(), "embodied_g": known.as_dict(),
            "sci_g_per_1k_tokens": sci_per_1k(joules_per_token, grid, embodied).as_dict()}

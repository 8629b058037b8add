"""A budget of energy or carbon: how many joules it is, and what earlier tries have used of it.

A budget in grams is one in joules at the grid's intensity: operational carbon alone, as it is the run that spends it.
"""

from __future__ import annotations

import json
from pathlib import Path

from llmops.errors import LlmopsError
from llmops.measure.options import Budget
from llmops.quantity import Quantity

__all__ = ["JOULES_PER_KWH", "limits", "noted", "spent_in_words"]

JOULES_PER_KWH = 3.6e6


def limits(budget: Budget, grid: Quantity | None) -> tuple[float, str]:
    """(J, in words) of the tighter bound. grid: g/kWh, for a budget in grams. Raises LlmopsError where it is null."""
    bounds = []
    if budget.energy_kwh is not None:
        bounds.append((budget.energy_kwh * JOULES_PER_KWH, f"budget.energy_kwh: {budget.energy_kwh:g}"))
    if budget.carbon_g is not None:
        if grid is None or not grid.value:
            why = grid.method if grid is not None else "no zone was given"
            raise LlmopsError(f"budget.carbon_g: {budget.carbon_g:g}, and the grid's intensity is not known: {why}; "
                              "expected measure.zone, or a measure.intensity that covers the run")
        bounds.append((budget.carbon_g / grid.value * JOULES_PER_KWH,
                       f"budget.carbon_g: {budget.carbon_g:g} (at {grid.value:.4g} gCO2e/kWh: {grid.method})"))
    return min(bounds)


def noted(folder: Path) -> float:
    """Joules that the attempts noted in `folder` have used; those that nobody knows count nothing."""
    found = 0.0
    for path in sorted(folder.glob("attempt-*.json")):
        try:
            found += json.loads(path.read_text(encoding="utf-8"))["energy_j"]["value"] or 0.0
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def spent_in_words(joules: float) -> str:
    """3600.0 -> "0.001 kWh (3600 J)"."""
    return f"{joules / JOULES_PER_KWH:.4g} kWh ({joules:.4g} J)"

"""The grid that a recipe names: a provider's hours, its own file of hours, else the annual average of its country or of
the world.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from llmops.errors import LlmopsError
from llmops.measure.carbon import intensity
from llmops.measure.grid import read_grid
from llmops.quantity import Quantity
from llmops.recipe.schema import Recipe

__all__ = ["answers", "grid_of", "known_grid"]


def grid_of(recipe: Recipe, began: float | None = None) -> Quantity:
    """g/kWh. began: when the run did, in seconds since the epoch: hours are averaged from then to now.

    With hours that do not cover the time, or that a provider does not tell, it is null with the reason: no other hour
    and no other zone is taken.
    """
    return known_grid(recipe, began)[0]


def known_grid(recipe: Recipe, began: float | None = None) -> tuple[Quantity, dict[str, Any]]:
    """`grid_of`, and for the row: source, zone, the time it is of (UTC), and whether average or marginal."""
    options = recipe.measure
    if options is None or (options.intensity is None and options.provider is None):
        zone = options.zone if options is not None else None
        found = intensity(zone)
        return found, {"source": "CodeCarbon's table", "zone": zone or "world", "valid_from": None, "valid_to": None,
                       "kind": "average"}
    now = time.time()
    start = now if began is None else began
    source = {"source": options.provider or options.intensity, "zone": options.zone, "valid_from": _utc(start),
              "valid_to": _utc(now), "kind": "not told"}
    if options.provider is None:
        assert options.intensity is not None
        grid = read_grid(recipe.base_dir / options.intensity)
        return grid.intensity(options.zone, start, now), source | {"zone": grid.zone(options.zone)}
    from llmops.measure.providers import history, provider_of

    assert options.zone is not None  # so it was validated
    source |= {"kind": provider_of(options.provider).kind}
    try:
        grid = history(options.provider, options.zone, start, now)
    except LlmopsError as error:
        return Quantity.null("gCO2e/kWh", str(error)), source
    return grid.intensity(options.zone, start, now), source


def answers(recipe: Recipe) -> None:
    """Make sure that the recipe's provider answers, before anything is built. Raises LlmopsError with what it says."""
    options = recipe.measure
    if options is not None and options.provider is not None:
        from llmops.measure.providers import history

        assert options.zone is not None
        now = time.time()
        history(options.provider, options.zone, now, now)


def _utc(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%dT%H:%MZ}"

"""The grid that a recipe names: its own file of hours, else the annual average of its country, else of the world."""

from __future__ import annotations

import time

from llmops.measure.carbon import intensity
from llmops.measure.grid import read_grid
from llmops.quantity import Quantity
from llmops.recipe.schema import Recipe

__all__ = ["grid_of"]


def grid_of(recipe: Recipe, began: float | None = None) -> Quantity:
    """g/kWh. began: when the run did, in seconds since the epoch: hours are averaged from then to now.

    With a file of hours that does not cover the time it is null with the reason: no other hour is taken.
    """
    options = recipe.measure
    if options is None or options.intensity is None:
        return intensity(options.zone if options is not None else None)
    now = time.time()
    return read_grid(recipe.base_dir / options.intensity).intensity(options.zone, now if began is None else began, now)

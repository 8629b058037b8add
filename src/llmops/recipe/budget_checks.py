"""Grids and budgets that can be used as the recipe wants them, found out before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmops.errors import LlmopsError
from llmops.measure.options import Budget, MeasureOptions
from llmops.recipe.blocks import read
from llmops.recipe.source import Problems

__all__ = ["check_grid", "read_budget"]

PROVIDER_ZONES = {"electricity_maps": "FR", "watttime": "CAISO_NORTH", "uk_carbon_intensity": "GB"}


def check_grid(problems: Problems, options: MeasureOptions, base_dir: Path) -> None:
    """A zone that has an intensity, in the recipe's own file or else in the table of countries. A provider's zones are
    not known here: it is asked before anything is built."""
    if options.provider is not None:
        if options.intensity is not None:
            problems.add(("measure", "provider"), f"given {options.provider} and the file {options.intensity}; "
                                                  "expected one of them")
        if options.zone is None:
            problems.add(("measure", "provider"), f"given {options.provider} without a zone; expected one as it names "
                                                  f"them, as zone: {PROVIDER_ZONES[options.provider]}")
        elif options.provider == "uk_carbon_intensity" and options.zone != "GB":
            problems.add(("measure", "zone"), f"given {options.zone} with uk_carbon_intensity, which covers Great "
                                              "Britain alone; expected GB")
    elif options.intensity is not None:
        from llmops.measure.grid import read_grid

        try:
            grid = read_grid(base_dir / options.intensity)
        except LlmopsError as error:
            problems.add(("measure", "intensity"), f"given {error}")
            return
        try:
            grid.zone(options.zone)
        except LlmopsError as error:
            problems.add(("measure", "zone" if options.zone is not None else "intensity"), f"given {error}")
    elif options.zone is not None:
        from llmops.measure.carbon import intensity

        try:
            intensity(options.zone)
        except LlmopsError as error:
            problems.add(("measure", "zone"), f"given {error}")


def read_budget(problems: Problems, value: Any, measure: MeasureOptions | None) -> Budget | None:
    """The recipe's budget, None without one."""
    if value is None:
        return None
    budget = read(problems, ("budget",), value, Budget, "budget")
    if budget is not None and budget.carbon_g is not None and (
            measure is None or (measure.zone is None and measure.intensity is None)):
        problems.add(("budget", "carbon_g"), f"given {budget.carbon_g:g} grams and no grid; expected measure.zone, as "
                                             "measure: {zone: FRA}, or measure.intensity")
    if budget is not None and measure is not None and measure.sensor == "none":
        problems.add(("budget",), "given a budget and measure.sensor: none; expected a sensor, as "
                                  "measure: {sensor: declared, watts: 65}", key=True)
    return budget

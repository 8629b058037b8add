"""Arguments that several commands take."""

from __future__ import annotations

from llmops.parser import Argument

__all__ = ["JSON", "QUIET", "RECIPE", "RUN", "RUNS", "SET", "STARTS", "WIDE"]

RECIPE: Argument = ("recipe",), {"metavar": "RECIPE", "help": "A recipe file, or the name of a packaged one."}
SET: Argument = ("--set",), {
    "dest": "sets", "metavar": "PATH=VALUE", "action": "append", "default": [],
    "help": "Override a value, as variants.tuned.finetune.rank=8; may be repeated."}
RUNS: Argument = ("--runs",), {"metavar": "DIR", "help": "Where runs lie (default: $LLMOPS_RUNS, or runs)."}
JSON: Argument = ("--json",), {"dest": "as_json", "action": "store_true", "help": "Print JSON for a machine to read."}
QUIET: Argument = ("-q", "--quiet"), {"action": "store_true", "help": "No progress on standard error."}
WIDE: Argument = ("--wide",), {"action": "store_true", "help": "Every column."}
RUN: Argument = ("run",), {"metavar": "RUN", "nargs": "?", "help": "Name of a run (default: the latest)."}
#: When `tune` may start, and what it shares the machine with.
STARTS: tuple[Argument, ...] = (
    (("--exclusive",), {"action": "store_true", "help": "Have the machine alone: refuse to start beside another llmops "
                                                        "at work, or to measure on a GPU that others use."}),
    (("--green",), {"action": "store_true", "help": "Wait for the cleanest window of a forecast; needs --deadline."}),
    (("--deadline",), {"metavar": "TIME", "help": "When a --green run is to be done: 90m, 12h or 2d from now."}),
    (("--forecast",), {"metavar": "CSV", "help": "Of utc,zone,g_per_kwh, or a provider by name (its key from the "
                                                 "environment): electricity_maps, watttime, uk_carbon_intensity "
                                                 "(default: measure.intensity or measure.provider of the recipe)."}),
    (("--zone",), {"help": "Zone of the --forecast, as it names it (default: measure.zone of the recipe)."}),
    (("--lasts",), {"metavar": "TIME", "help": "How long a --green run takes (default: as long as before, or 1h)."}))

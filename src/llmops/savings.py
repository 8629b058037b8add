"""What a challenger saves against a champion, figure by figure, and why a figure cannot be judged by.

A saving is shown where the whole interval of the ratio lies on the better side of 1. Energy and speed meet through the
base of each run, measured in turns with it (`report.compare`): joules per output token, and time per decoded token
(`decode_latency`, 1 / decode speed). Bytes are counted, so any difference is one. A figure is not judged by where it

    is not there                         nobody measured it, with the reason that the row gives
    is not comparable                    other prompts, another machine, sensor or power limit
    is an estimate or declared (energy)  a model of the machine saves what its assumptions say
    has too few repeats, or no interval  nothing can be shown by it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmops.errors import LlmopsError, unknown
from llmops.measure.intervals import LEAST_PAIRS
from llmops.quantity import Quantity
from llmops.report.compare import Compared, compare
from llmops.report.figures import show
from llmops.report.reading import COSTS, batches, cost, name_of

__all__ = ["SAVINGS", "Saving", "check_saving", "savings"]

DECODE = "decode_latency"
SAVINGS = ("joules_per_token", DECODE, *(name for name in COSTS if name != "joules_per_token"))
NO_INTERVAL = {"inter_token_ms": DECODE, "first_token_ms": DECODE, "peak_memory_bytes": "weights_bytes"}


@dataclass(frozen=True)
class Saving:
    """One figure of the two. ratio: challenger over champion; better: None where nothing is shown; problem: why it is
    not judged by."""

    figure: str
    ratio: Quantity
    better: bool | None
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        return {"better": self.better, "ratio": self.ratio.as_dict(), "not_comparable": self.problem}

    def told(self) -> str:
        """`x 0.81 [0.79, 0.83]`, or why it is not judged by."""
        return self.problem or f"x {show(self.ratio, with_interval=True)}"


def check_saving(name: str | None, batch: int | None) -> None:
    """Raises LlmopsError for a figure that nothing can be promoted by, and a batch size of what has none."""
    if name is not None and name not in SAVINGS:
        raise LlmopsError(unknown("cost", name, SAVINGS))
    if batch is not None and name is not None and name != DECODE and "*" not in COSTS[name].path:
        raise LlmopsError(f"--batch {batch} with --saving {name}, which no batch size changes; leave --batch out")


def savings(row: Mapping[str, Any], champion: Mapping[str, Any], wanted: str | None, batch: int | None) -> list[Saving]:
    """Every figure of `wanted` (default: any cost) at every batch size (or at `batch` alone)."""
    # the champion under a run of its own, so that two builds of one variant are told apart
    other = {**champion, "identity": {**champion["identity"], "run": "champion of before"}}
    mine, theirs = f"{row['identity']['run']}/{name_of(row)}", f"champion of before/{name_of(champion)}"
    found = []
    lines = compare([row, other], [mine, theirs], against=theirs)
    asked = "decode_tokens_per_s" if wanted == DECODE else wanted
    for line in lines:
        name, _, at = line.figure.partition(" (batch ")
        if line.kind != "ratio" or (asked and name != asked) or (batch is not None and at and at != f"{batch})"):
            continue
        shown = line.figure.replace("decode_tokens_per_s", DECODE) if wanted == DECODE else line.figure
        found.append(_saving(shown, name, line.cells[mine], line.cells[theirs], inverted=wanted == DECODE))
    return found or _missing(row, champion, wanted, asked, batch)


def _saving(shown: str, name: str, mine: Compared, theirs: Compared, *, inverted: bool) -> Saving:
    ratio = mine.difference or Quantity.null("ratio", mine.problem or _unmeasured(mine, theirs))
    problem = mine.problem or (ratio.method if ratio.value is None else None)
    if problem is None and name == "joules_per_token" and ratio.provenance != "measured":
        problem = (f"joules per token are {ratio.provenance}, not measured ({ratio.method}); expected a sensor of the "
                   f"hardware in both runs, or judge by {DECODE}")
    counted = name in ("disk_bytes", "weights_bytes")
    if problem is None and not counted and ratio.n is not None and ratio.n < LEAST_PAIRS:
        problem = (f"{ratio.n} repeats, too few: not shown; expected at least {LEAST_PAIRS} (measure.repeats)")
    if problem is None and not counted and ratio.ci95 is None:
        problem = (f"it has no interval, so nothing is shown by it ({show(ratio)}); judge by "
                   f"{NO_INTERVAL.get(name, 'another figure')}")
    if inverted and ratio.value:
        ends = (1 / ratio.ci95[1], 1 / ratio.ci95[0]) if ratio.ci95 and ratio.ci95[0] > 0 else None
        ratio = Quantity(1 / ratio.value, "ratio", ratio.provenance, f"1 / {ratio.method}", ends, ratio.n)
    return Saving(shown, ratio, None if problem else mine.better, problem)


def _unmeasured(mine: Compared, theirs: Compared) -> str:
    side, found = ("of the challenger", mine) if mine.value.value is None else ("of the champion", theirs)
    return f"not known {side}: {found.value.method}" if found.value.value is None else "it is not known of both"


def _missing(row: Mapping[str, Any], champion: Mapping[str, Any], wanted: str | None, asked: str | None,
             batch: int | None) -> list[Saving]:
    """What was asked for and neither of the two has."""
    if wanted is None or asked is None:
        return []
    sizes: Sequence[str] = [str(batch)] if batch is not None else batches([row, champion]) or ["1"]
    if batch is not None and str(batch) not in batches([row, champion]):
        why = f"batch {batch} was not measured; found {', '.join(batches([row, champion])) or 'none'}"
    else:
        why = cost(row, asked, sizes[0]).method
    return [Saving(wanted, Quantity.null("ratio", why), None, f"not measured: {why}")]

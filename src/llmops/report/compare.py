"""Chosen variants side by side, every figure against one of them.

Rows alone hold paired differences with a variant's parent, with base and with what the goals name. For any other pair
the items have to be paired again, by `paired` (the command line gives it the ledger's items); without it the
difference of two scores is shown with its unpaired interval, and says so. Rows of other prompts, another protocol or
another machine are never compared: the cell says why. Speed and energy were measured as ratios to base, so two
variants meet through base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmops.errors import LlmopsError, unknown
from llmops.measure.intervals import LEAST_PAIRS
from llmops.quantity import Quantity, weakest
from llmops.report.figures import NONE, show, told
from llmops.report.reading import (
    COSTS,
    Row,
    batches,
    cost,
    different_protocol,
    different_sensor,
    different_workload,
    figure,
    group,
    name_of,
    parent_of,
    quantity,
    rising,
    score,
    score_ids,
    state_of,
    status_text,
    versus,
)
from llmops.report.words import marked, zeros_note

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Compared", "Line", "Paired", "compare", "compare_as_json", "compare_table"]

#: (row, reference row, score id) -> what llmops.evaluate.statistics.paired returns; None when the items are not there
Paired = Callable[[Row, Row, str], Mapping[str, Any] | None]
Z = 1.959963984540054  # 97.5% quantile of the normal distribution
RATIOS = {"joules_per_token": ("energy", "ratio_to_base"), "decode_tokens_per_s": ("latency", "speed_ratio_to_base")}


@dataclass(frozen=True)
class Compared:
    """One variant's figure and how it stands against the reference; `problem` says why it cannot be compared."""

    value: Quantity
    difference: Quantity | None = None
    problem: str | None = None
    better: bool | None = None  # None: the interval does not tell, or there is none

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value.as_dict(), "difference": self.difference.as_dict() if self.difference else None,
                "not_comparable": self.problem, "better": self.better}


@dataclass(frozen=True)
class Line:
    """One figure of all the chosen variants. `kind` of its differences: "delta" (value - reference) or "ratio"."""

    figure: str
    kind: str
    cells: dict[str, Compared]


def compare(rows: Sequence[Row], names: Sequence[str] = (), *, against: str | None = None,
            paired: Paired | None = None) -> list[Line]:
    """Every score and cost of the chosen variants, each against `against`.

    names: variants, or `RUN/VARIANT` where rows of several runs are given (default: all). against: the reference
    (default: the parent of the first name when it is among the names, else the first name). Raises LlmopsError for an
    unknown name.
    """
    chosen, reference = _chosen(rows, names, against)
    everyone = list(chosen.values())
    lines = [Line(each, "delta", {label: _score(row, chosen[reference], each, rising(everyone, each), paired)
                                  for label, row in chosen.items()}) for each in score_ids(everyone)]
    for by in COSTS:
        for batch in batches(everyone) if "*" in COSTS[by].path else [""]:
            cells = {label: _cost(row, chosen[reference], by, batch) for label, row in chosen.items()}
            if any(cell.value.value is not None for cell in cells.values()):
                lines.append(Line(f"{by} (batch {batch})" if batch else by, "ratio", cells))
    return lines


def compare_as_json(rows: Sequence[Row], names: Sequence[str] = (), *, against: str | None = None,
                    paired: Paired | None = None) -> dict[str, Any]:
    """`compare` as plain values: {"against", "variants", "figures": [{"figure", "kind", "variants": {name: ...}}]}."""
    chosen, reference = _chosen(rows, names, against)
    lines = compare(rows, names, against=against, paired=paired)
    return {"against": reference, "variants": list(chosen), "figures": [
        {"figure": line.figure, "kind": line.kind,
         "variants": {label: cell.as_dict() for label, cell in line.cells.items()}} for line in lines]}


def compare_table(rows: Sequence[Row], names: Sequence[str] = (), *, against: str | None = None,
                  paired: Paired | None = None) -> Table:
    """`compare` as a rich table: a line a figure, a column a variant, the reference first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    chosen, reference = _chosen(rows, names, against)
    lines = compare(rows, names, against=against, paired=paired)
    problems = list(dict.fromkeys(cell.problem for line in lines for cell in line.cells.values() if cell.problem))
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption=Text("\n".join([
        f"differences against {reference}: scores as value - reference, costs as a factor; 95% intervals; ~ estimated",
        *zeros_note(chosen.values()),
        *(f"({number}) not comparable: {problem}" for number, problem in enumerate(problems, 1))]), style="dim"))
    made.add_column("")
    for label in chosen:
        made.add_column(Text(label if label != reference else f"{label} (reference)"), justify="right")
    made.add_row("what", *(Text(marked(row)) for row in chosen.values()))
    if any(state_of(row) != "ok" for row in chosen.values()):
        made.add_row("state", *(Text(status_text(row)) for row in chosen.values()))
    for line in lines:
        made.add_row(Text(line.figure), *(Text.assemble(*_words(cell, line.kind, label == reference, problems))
                                          for label, cell in line.cells.items()))
    return made


def _words(cell: Compared, kind: str, is_reference: bool, problems: list[str]) -> list[tuple[str, str]]:
    value = (show(cell.value, with_interval=kind == "delta"), "dim" if cell.value.value is None else "")
    if is_reference or cell.value.value is None:
        return [value]
    if cell.problem:
        return [value, (f"\nnot comparable ({problems.index(cell.problem) + 1})", "yellow")]
    if cell.difference is None or cell.difference.value is None:
        return [value, (f"\n{NONE}", "dim")]
    text = show(cell.difference, with_interval=True, difference=kind == "delta")
    style = "" if cell.better is None else ("green" if cell.better else "red")
    unpaired = " unpaired" if cell.difference.method.startswith("unpaired") else ""
    return [value, (f"\n{'x ' if kind == 'ratio' else ''}{text}{unpaired}", style)]


# ------------------------------------------------------------------------------------------------------------ choosing


def _chosen(rows: Sequence[Row], names: Sequence[str], against: str | None) -> tuple[dict[str, Row], str]:
    """(label -> row, the reference first; its label)."""
    labels = _labels(rows)
    if not labels:
        raise LlmopsError("there is nothing to compare: no row is given; expected a run that was scored; "
                          "run `llmops tune` first")
    wanted = [_label(name, labels) for name in names] or list(labels)
    if against is not None:
        reference = _label(against, labels)
    else:
        parent = parent_of(labels[wanted[0]])
        reference = parent if parent in wanted else wanted[0]
    return {label: labels[label] for label in dict.fromkeys([reference, *wanted])}, reference


def _labels(rows: Sequence[Row]) -> dict[str, Row]:
    """By variant; by RUN/VARIANT where rows of more than one run are given."""
    runs = {group(row, "identity").get("run") for row in rows}
    one = len(runs) < 2
    return {name_of(row) if one else f"{group(row, 'identity').get('run')}/{name_of(row)}": row for row in rows}


def _label(name: str, labels: Mapping[str, Row]) -> str:
    if name in labels:
        return name
    ends = [label for label in labels if label.endswith(f"/{name}")]
    if len(ends) == 1:
        return ends[0]
    raise LlmopsError(unknown("variant", name, ends or labels))


# ----------------------------------------------------------------------------------------------------------- differing


def _score(row: Row, reference: Row, score_id: str, up: bool, paired: Paired | None) -> Compared:
    value = score(row, score_id)
    if row is reference or value.value is None or score(reference, score_id).value is None:
        return Compared(value)
    problem = different_protocol(row, reference, score_id)
    if problem:
        return Compared(value, problem=problem)
    try:
        delta, p = _delta(row, reference, score_id, paired)
    except LlmopsError as error:
        return Compared(value, problem=str(error))
    agrees = not isinstance(p, int | float) or p <= 0.05
    return Compared(value, delta, better=_better(delta, 0.0, up) if agrees else None)


def _delta(row: Row, reference: Row, score_id: str, paired: Paired | None) -> tuple[Quantity, Any]:
    """(difference, p or None): paired as stored, else paired anew, else unpaired: sqrt(stderr_a^2 + stderr_b^2), too
    wide for shared items."""
    same_run = all(group(row, "identity").get(key) == group(reference, "identity").get(key) for key in ("run",))
    body: Mapping[str, Any] | None = versus(row, score_id, name_of(reference)) if same_run else None
    body = body or (paired(row, reference, score_id) if paired is not None else None)
    if body:
        found = body.get("delta")
        shown = found if isinstance(found, Quantity) else quantity(found, "the comparison holds no difference")
        return shown, body.get("p")
    a, b = score(row, score_id), score(reference, score_id)
    assert a.value is not None and b.value is not None
    stderrs = [group(each, "quality", score_id).get("stderr") for each in (row, reference)]
    errors = [float(error) for error in stderrs if isinstance(error, int | float)]
    delta = a.value - b.value
    worst = weakest([a.provenance, b.provenance])
    if len(errors) < 2:
        return Quantity(delta, a.unit, worst, "unpaired; no standard error is known"), None
    half = Z * math.hypot(*errors)
    how = "unpaired: the items are not at hand; interval from the two standard errors"
    return Quantity(delta, a.unit, worst, how, (delta - half, delta + half)), None


def _cost(row: Row, reference: Row, by: str, batch: str) -> Compared:
    value, other = cost(row, by, batch), cost(reference, by, batch)
    if row is reference or value.value is None or not other.value:
        return Compared(value)
    size = COSTS[by].path[0] == "size"
    problem = None if size and by != "peak_memory_bytes" else different_workload(row, reference)
    if problem is None and COSTS[by].path[0] == "energy":
        problem = different_sensor(row, reference)
    if problem:
        return Compared(value, problem=problem)
    ratio = Quantity(value.value / other.value, "ratio", weakest([value.provenance, other.provenance]),
                     f"one figure divided by the other: {told(value)}")
    if by in RATIOS:
        ratio = _through_base(row, reference, RATIOS[by], batch) or ratio
    if by in RATIOS and ratio.n is not None and ratio.n < LEAST_PAIRS:
        better = None  # too few repeats for a verdict
    elif by in ("disk_bytes", "weights_bytes"):  # counted, so any difference is one
        better = None if value.value == other.value else value.value < other.value
    else:
        better = _better(ratio, 1.0, not COSTS[by].less_is_better)
    return Compared(value, ratio, better=better)


def _through_base(row: Row, reference: Row, place: tuple[str, str], batch: str) -> Quantity | None:
    """The ratio of two ratios to base; log half-widths add as independent errors. None without both, or without one
    base. Of two runs each ratio is to the base in its own blocks, so what drifts between runs is out of both."""
    one, two = group(row, "identity"), group(reference, "identity")
    if any(one.get(key) != two.get(key) for key in ("base_model", "revision")):
        return None
    a, b = (figure(each, place[0], batch, place[1]) for each in (row, reference))
    if name_of(reference) == "base":
        return a if a.value is not None else None
    if name_of(row) == "base" and b.value:
        ends = (1 / b.ci95[1], 1 / b.ci95[0]) if b.ci95 and min(b.ci95) > 0 else None
        return Quantity(1 / b.value, "ratio", b.provenance, f"1 / ratio of the reference to base: {b.method}", ends,
                        b.n)
    if not a.value or not b.value:
        return None
    ratio = a.value / b.value
    ends = None
    if a.ci95 and b.ci95 and min(*a.ci95, *b.ci95) > 0:
        half = math.hypot(*(math.log(each.ci95[1] / each.ci95[0]) / 2 for each in (a, b) if each.ci95))
        ends = (ratio * math.exp(-half), ratio * math.exp(half))
    return Quantity(ratio, "ratio", weakest([a.provenance, b.provenance]), f"through base: {a.method}", ends,
                    min((each.n for each in (a, b) if each.n is not None), default=None))


def _better(difference: Quantity, zero: float, up: bool) -> bool | None:
    """Whether the difference is for the better; None where its interval does not tell."""
    if difference.value is None or difference.ci95 is None or difference.ci95[0] <= zero <= difference.ci95[1]:
        return None
    return (difference.value > zero) == up

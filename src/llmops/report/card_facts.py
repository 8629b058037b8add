"""Three parts of a model card: what the model is for, its scores by group, and its energy and compute as a record.

What it is for is not guessed: the card says what the recipe states (`card`), or that nobody stated it, then what it was
made and tested on, and that anything else is untested. The record holds what Annex XI of the EU AI Act (section 1,
point 2 d and e) asks of providers of general-purpose models: compute, time and the known or estimated energy of
training, with the method. Having the figures is not being compliant, and the card says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmops.quantity import Quantity, weakest
from llmops.report.figures import number, show, told
from llmops.report.groups import SMALL, columns_of, worst_group
from llmops.report.markdown import code, safe, section, table
from llmops.report.reading import Row, figure, group, kind_of, name_of, parent_of, quantity, score_ids, state_of

__all__ = ["by_group", "intended", "lineage", "record"]

RECORD = {"energy of this step": "energy_j", "energy of everything it stands on, this step included": "chain_energy_j",
          "energy of scoring it": "evaluate_energy_j", "energy of measuring it": "measure_energy_j"}


def lineage(row: Row, rows: Iterable[Row]) -> list[Row]:
    """The row and those it was made from, itself first."""
    by_name = {name_of(each): each for each in rows}
    path: list[Row] = []
    at: Row | None = row
    while at is not None and all(at is not one for one in path):
        path.append(at)
        at = by_name.get(parent_of(at) or "")
    return path


def intended(row: Row, rows: Sequence[Row]) -> str:
    """What the recipe states, in its words; what it was made and tested for, from the data; what that leaves out."""
    said = group(row, "card")
    stated = [f"Stated by who made it: {safe(said['intended_use'])}" if said.get("intended_use") else
              "What it is for: stated by nobody (`card: {intended_use: ...}` in the recipe)."]
    stated += [f"Not for, as stated: {safe(said['out_of_scope'])}"] if said.get("out_of_scope") else []
    trained = list(dict.fromkeys(
        name for each in reversed(lineage(row, rows)) if kind_of(each) in ("finetune", "distill")
        for name in group(each, "building", "data_sha256")))
    tested = score_ids([row])
    lines = ["Generating text" + (f" of the kind of its training data ({', '.join(map(code, trained))})." if trained
                                  else ", as its base model does; nothing was trained here.")]
    if state_of(row) != "ok":
        lines = ["None: it is not what was to be built."]
    lines.append(f"Tested for: {', '.join(map(code, tested))}." if tested else "Tested for nothing: it was not scored.")
    lines.append("Out of scope: whatever differs from that in task, domain or language; decisions about people without "
                 "a person. The terms of the base model hold on.")
    return section("Intended use", "\n".join(f"- {line}" for line in [*stated, *lines]))


# ------------------------------------------------------------------------------------------------------------ by group


def by_group(row: Row) -> str:
    """A table for every score and column of groups; empty where no score was sliced."""
    parts = [_groups(row, score_id, column) for score_id in score_ids([row])
             for column in group(row, "quality", score_id, "slices")]
    note = (f"Differences are paired and against {safe(parent_of(row) or 'the parent')}; p is corrected by Holm over a "
            f"column. Bold: lost most, where one lost, of the groups with at least {SMALL} items.")
    return section("Scores by group", "\n\n".join(parts), note) if parts else ""


def _groups(row: Row, score_id: str, column: str) -> str:
    worst = {each: name for each, name, _ in worst_group(row, score_id, "parent")}.get(column)
    compared = columns_of(row, score_id, "parent").get(column, {}).get("groups", {})
    lines = []
    for name, body in group(row, "quality", score_id, "slices", column).items():
        value, other = quantity(body.get("value"), "not in its items"), compared.get(name) or {}
        delta, p = quantity(other.get("delta"), ""), other.get("p_holm")
        label = safe(f"{column}={name}")
        lines.append([f"**{label}**" if name == worst else label, show(value, with_interval=True), str(value.n or ""),
                      show(delta, with_interval=True, difference=True) if delta.value is not None else "-",
                      number(p) if isinstance(p, int | float) else "-"])
    return table([safe(score_id), "value, 95% interval", "n", "difference", "p"], lines)


# -------------------------------------------------------------------------------------------------------------- record


def record(row: Row, rows: Sequence[Row]) -> str:
    """Energy in kWh, training compute in FLOP, time, grams; each with its provenance and method."""
    if not group(row, "transform").get("kind"):
        return ""
    entries = [(label, _kwh(figure(row, "building", name))) for label, name in RECORD.items()
               if name in group(row, "building")]
    entries += [("training compute of this step", figure(row, "building", "flops")),
                ("training compute of everything it stands on", _compute(lineage(row, rows))),
                ("time of this step", _hours(figure(row, "building", "wall_s"))),
                ("CO2e of everything it stands on", figure(row, "carbon", "building_g")),
                ("grid", figure(row, "carbon", "intensity"))]
    lines = [[label, _exact(found), found.provenance if found.value is not None else "not known",
              safe(found.method if found.value is None else told(found).removeprefix(f"{found.provenance}; "))]
             for label, found in entries]
    note = ("The base model's own training is in none of these. These are the figures that Annex XI, section 1 (2) d "
            "and e of the EU AI Act names (compute, time, known or estimated energy, method); they are a record, not a "
            "statement of compliance.")
    return section("Energy and compute, for the record", table(["", "value", "provenance", "method"], lines), note)


def _exact(found: Quantity) -> str:
    """Without scaling, so that a reader who adds up has one unit: `~0.00108 kWh`, `2.41e+15 FLOP`."""
    if found.value is None:
        return "-"
    mark = "~" if found.provenance == "estimated" else ""
    value = f"{found.value:.4g}" if found.value else "0"
    ends = f" [{found.ci95[0]:.4g}, {found.ci95[1]:.4g}]" if found.ci95 else ""
    return f"{mark}{value} {found.unit}{ends}"


def _scaled(found: Quantity, by: float, unit: str) -> Quantity:
    if found.value is None:
        return Quantity.null(unit, found.method)
    ends = (found.ci95[0] / by, found.ci95[1] / by) if found.ci95 else None
    return Quantity(found.value / by, unit, found.provenance, found.method, ends, found.n)


def _kwh(found: Quantity) -> Quantity:
    return _scaled(found, 3.6e6, "kWh")


def _hours(found: Quantity) -> Quantity:
    return _scaled(found, 3600.0, "h")


def _trained(path: Sequence[Row]) -> Iterator[Row]:
    return (each for each in path if kind_of(each) in ("finetune", "distill"))


def _compute(path: Sequence[Row]) -> Quantity:
    """FLOP of all trainings on the way; null as soon as that of one is not known."""
    found = [(each, figure(each, "building", "flops")) for each in _trained(path)]
    if not found:
        return Quantity.null("FLOP", "nothing was trained")
    missing: Mapping[str, Any] = {name_of(each): flops.method for each, flops in found if flops.value is None}
    if missing:
        name, reason = next(iter(missing.items()))
        return Quantity.null("FLOP", f"that of {name} is not known: {reason}")
    return Quantity(math.fsum(flops.value or 0.0 for _, flops in found), "FLOP",
                    weakest(flops.provenance for _, flops in found),
                    f"sum over {', '.join(name_of(each) for each, _ in reversed(found))}; {found[0][1].method}")

"""Where the energy of a run went: every stage of every variant, and the whole run.

A variant's own step, its teacher, tries that were cut off or failed, and its scoring are told apart; a build that two
variants of the run share by its key is counted once, and what an earlier run has built counts as well: it is what
having the variants took. What is not known is named and not counted, so with anything unknown a sum is "at least".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmops.quantity import Quantity, weakest
from llmops.report.figures import show, told
from llmops.report.markup import Markup, tag
from llmops.report.reading import Row, figure, group, kind_of, name_of
from llmops.report.sections import NOTHING, Page, scrolled

__all__ = ["Spent", "kwh", "section", "spent"]

TITLES = {"finetune": "fine-tuning", "prune": "pruning", "quantize": "quantizing", "distill": "distilling",
          "teacher": "teachers", "tries": "tries cut off or failed", "evaluate": "scoring", "measure": "measuring"}
WHOLE = {"energy_j", "chain_energy_j", "teacher_energy_j"}
NAMED = re.compile(r"(\w+)_energy_j")
WIDE = 240.0


@dataclass
class Spent:
    """J by stage, and the stages whose energy nobody knows with the reason."""

    parts: dict[str, Quantity] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def total(self) -> Quantity:
        """The sum of what is known; "at least" in its method when something is not."""
        if not self.parts:
            return Quantity.null("J", "; ".join(dict.fromkeys(self.unknown.values())) or "nothing was metered")
        least = f"at least: {', '.join(self.unknown)} not known; " if self.unknown else ""
        return Quantity(math.fsum(each.value or 0.0 for each in self.parts.values()), "J",
                        weakest(each.provenance for each in self.parts.values()), f"{least}sum of the stages")


def spent(row: Row) -> Spent:
    """What a variant took by itself, without what it stands on."""
    found, body = Spent(), group(row, "building")
    kind = kind_of(row)
    if kind != "base":
        _step(found, row, kind, body)
    for name in body:
        match = NAMED.fullmatch(name)
        if match and name not in WHOLE:
            _put(found, match[1], figure(row, "building", name))
    return found


def _step(found: Spent, row: Row, kind: str, body: Mapping[str, Any]) -> None:
    own, teacher = figure(row, "building", "energy_j"), figure(row, "building", "teacher_energy_j")
    tries = _lost(body)
    if own.value is None:
        found.unknown[kind] = own.method
        return
    taught = teacher.value or 0.0
    left = own.value - taught - tries
    found.parts[kind] = Quantity(max(left, 0.0), "J", own.provenance, own.method)
    if taught:
        found.parts["teacher"] = teacher
    if tries:
        found.parts["tries"] = Quantity(tries, "J", own.provenance, f"attempts that did not finish; {own.method}")


def _lost(body: Mapping[str, Any]) -> float:
    """J of all attempts but the one that finished, where they were seen."""
    every = body.get("attempts")
    tries = every[:-1] if isinstance(every, list) else []
    return math.fsum(float(one["energy_j"]) for one in tries
                     if isinstance(one, Mapping) and isinstance(one.get("energy_j"), int | float))


def _put(found: Spent, stage: str, quantity: Quantity) -> None:
    if quantity.value is None:
        found.unknown[stage] = quantity.method
    elif quantity.value > 0:
        found.parts[stage] = quantity


def _whole(rows: Sequence[Row]) -> Spent:
    """Over the run, each build once."""
    whole, seen = Spent(), set[str]()
    for row in rows:
        key = str(group(row, "identity").get("key") or name_of(row))
        mine = spent(row)
        for stage, quantity in mine.parts.items():
            if key in seen and stage in (kind_of(row), "teacher", "tries"):
                continue
            before = whole.parts.get(stage)
            whole.parts[stage] = quantity if before is None else Quantity(
                (before.value or 0.0) + (quantity.value or 0.0), "J", weakest([before.provenance, quantity.provenance]),
                quantity.method)
        whole.unknown.update(mine.unknown)
        seen.add(key)
    return whole


def kwh(joules: Quantity) -> str:
    """`0.00123 kWh`, with its mark; "-" where it is not known."""
    if joules.value is None:
        return show(joules)
    return show(Quantity(joules.value / 3.6e6, "kWh", joules.provenance, joules.method))


def section(page: Page) -> Markup:
    """The whole run as a bar and a table of stages, then a line a variant."""
    rows = [row for row in page.rows if spent(row).parts or spent(row).unknown]
    if not rows:
        return NOTHING
    whole = _whole(rows)
    stages = [*(stage for stage in TITLES if stage in whole.parts), *sorted(set(whole.parts) - set(TITLES))]
    most = max((spent(row).total().value or 0.0 for row in rows), default=0.0)
    titles = ["", "", *(TITLES.get(stage, stage.replace("_", " ")) for stage in stages), "together"]
    head = tag("tr", [tag("th", title, scope="col", class_="num" if place > 1 else None)
                      if title else tag("td", tag("span", "bar" if place else "variant", class_="unseen"))
                      for place, title in enumerate(titles)])
    lines = [_line("the whole run", whole, stages, whole.total().value or 0.0, first=True)]
    lines += [_line(page.link(row), spent(row), stages, most) for row in rows]
    unknown = [tag("li", f"{TITLES.get(stage, stage)}: {reason}") for stage, reason in whole.unknown.items()]
    return tag("section", tag("h2", "Where the energy went", id="spending"), _headline(whole), _legend(stages),
               scrolled("Energy by stage", tag(
                   "table", tag("caption", "Energy by stage", class_="unseen"), tag("thead", head),
                   tag("tbody", lines), class_="plain")),
               [tag("p", "Not known, so not in any sum:"), tag("ul", unknown)] if unknown else None,
               aria_labelledby="spending")


def _headline(whole: Spent) -> Markup:
    total = whole.total()
    if total.value is None:
        return tag("p", f"No energy of this run is known: {total.method}.", class_="dim")
    stage, most = max(whole.parts.items(), key=lambda each: each[1].value or 0.0)
    share = (most.value or 0.0) / total.value if total.value else 0.0
    least = "at least " if whole.unknown else ""
    apart = "" if "measure" in whole.parts else " Measuring speed and energy itself is not part of it."
    return tag("p", f"Having these variants and their scores took {least}", tag("b", show(total), title=told(total)),
               f" ({kwh(total)}); most of it, {share:.0%}, went into {TITLES.get(stage, stage)}.{apart}")


def _legend(stages: Sequence[str]) -> Markup:
    return tag("ul", [tag("li", tag("svg", tag("rect", x=1, y=1, width=14, height=14, class_=f"part p{place % 8}"),
                                    viewBox="0 0 16 16", class_="sign", aria_hidden="true"), " ",
                          TITLES.get(stage, stage.replace("_", " "))) for place, stage in enumerate(stages)],
               class_="key")


def _line(name: str | Markup, found: Spent, stages: Sequence[str], most: float, first: bool = False) -> Markup:
    cells = []
    for stage in stages:
        each = found.parts.get(stage)
        reason = found.unknown.get(stage)
        tip = told(each) if each else f"not known: {reason}" if reason else None
        cells.append(tag("td", show(each) if each else "?" if reason else "", class_="num", title=tip))
    total = found.total()
    return tag("tr", tag("th", name, scope="row"), tag("td", _bar(found, stages, most)), cells,
               tag("td", tag("b", show(total)), class_="num", title=f"{told(total)}; {kwh(total)}"),
               class_="won" if first else None)


def _bar(found: Spent, stages: Sequence[str], most: float) -> Markup:
    pieces, at = [], 0.0
    for place, stage in enumerate(stages):
        value = found.parts[stage].value or 0.0 if stage in found.parts else 0.0
        wide = WIDE * value / most if most else 0.0
        if wide >= 0.2:
            pieces.append(tag("rect", x=f"{at:.1f}", y=1, width=f"{max(wide - 0.6, 0.2):.1f}", height=12,
                              class_=f"part p{place % 8}"))
        at += wide
    return tag("svg", pieces, viewBox=f"0 0 {WIDE:g} 14", class_="bar long", aria_hidden="true")

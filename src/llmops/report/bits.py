"""Which layer costs accuracy: what fewer bits were found to cost each layer, as a heat map, with the choice marked.

Blocks from left to right; from top to bottom the kinds of layers that share a scheme, each with its candidates, the
smallest first. The darker a cell the dearer it is, on a logarithmic scale, because costs span many powers of ten; what
was chosen has a ring. In words below: the dearest layers, and what the whole choice was expected to cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmops.models.expert_names import expert_of
from llmops.report.figures import number
from llmops.report.markup import Markup, tag
from llmops.report.reading import Row, group, name_of
from llmops.report.sections import NOTHING, Page

__all__ = ["Allocation", "Group", "allocation_of", "bits", "heat_map", "in_words", "shades"]

LEFT, TOP, ROW, GAP, MOST = 176, 8, 17, 9, 560
SHADES = 8
NAMES = {"kl": "measured: mean KL of the next-token distribution with this layer swapped",
         "gradient": "estimated: second-order expansion of that KL, by the Fisher information"}


@dataclass(frozen=True)
class Group:
    """Layers that share a scheme. block: their number, None outside the blocks; bits and cost: one a candidate."""

    kind: str
    block: int | None
    layers: Sequence[str]
    bits: Sequence[float]
    cost: Sequence[float]
    chosen: int

    @property
    def name(self) -> str:
        return self.kind if self.block is None else f"block {self.block} {self.kind}"


@dataclass(frozen=True)
class Allocation:
    """What a row tells of its bits."""

    variant: str
    sensitivity: str
    unit: str
    crops: Sequence[int]
    judge: str | None
    counted: int
    average_bits: float
    predicted: float
    candidates: Sequence[str]
    groups: Sequence[Group]


def allocation_of(row: Row) -> Allocation | None:
    """None for a row without one, and for one that is not whole."""
    body = group(row, "building").get("allocation")
    try:
        return _read(name_of(row), body) if isinstance(body, Mapping) and body else None
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def _read(variant: str, body: Mapping[str, Any]) -> Allocation:
    candidates = [str(each) for each in body["candidates"]]
    groups = [_group(each) for each in body["groups"]]
    if not groups or any(not len(each.bits) == len(each.cost) == len(candidates) or each.chosen < 0
                         or each.chosen >= len(candidates) for each in groups):
        raise ValueError("not one bit and cost a candidate")
    crops = [int(each) for each in body["crops"]]
    return Allocation(variant, str(body["sensitivity"]), str(body["unit"]), crops, body.get("judge"),
                      int(body.get("counted") or math.prod(crops)), float(body["average_bits"]),
                      float(body["predicted"]), candidates, groups)


def _group(body: Mapping[str, Any]) -> Group:
    layers = [str(each) for each in body["layers"]]
    numbers = [part for part in layers[0].split(".") if part.isdigit()]
    lasts = [name.rpartition(".")[2].removesuffix("_proj") for name in layers]
    kind = "experts" if expert_of(layers[0]) is not None else ", ".join(lasts)
    return Group(kind, int(numbers[0]) if numbers else None, layers,
                 [float(each) for each in body["bits"]], [float(each) for each in body["cost"]], int(body["chosen"]))


# -------------------------------------------------------------------------------------------------------------- section


def bits(page: Page) -> Markup:
    """A heat map for each variant whose bits were chosen layer by layer."""
    found = [(row, seen) for row in page.rows if (seen := allocation_of(row)) is not None]
    if not found:
        return NOTHING
    note = ("Columns: blocks, the first at the left. Rows: layers that share a scheme, with each candidate. The "
            "darker, the more these layers alone cost in it (logarithmic); ring: the scheme they got.")
    maps = [tag("figure", tag("figcaption", page.link(row), f": {_headline(seen)}"), heat_map(seen),
                tag("p", in_words(seen))) for row, seen in found]
    return tag("section", tag("h2", "Bits by layer", id="bits"), tag("p", note, class_="dim"), maps,
               aria_labelledby="bits")


def _headline(seen: Allocation) -> str:
    counted = (f"{seen.counted:,} tokens of answers of {seen.judge}" if seen.judge
               else f"{seen.counted:,} calibration tokens")
    return (f"{number(seen.average_bits)} bits on average, scales counted; costs in {seen.unit}, "
            f"{NAMES.get(seen.sensitivity, seen.sensitivity)} (on {counted})")


def in_words(seen: Allocation) -> str:
    """The dearest layers in the smallest scheme, who got most and least, and the total that was expected."""
    dear = sorted(seen.groups, key=lambda each: -each.cost[0])[:3]
    most = max(each.bits[each.chosen] for each in seen.groups)
    rich = [each.name for each in seen.groups if each.bits[each.chosen] == most]
    total = sum(each.cost[0] for each in seen.groups)
    parts = [f"Dearest at {seen.candidates[0]}: " + ", ".join(f"{each.name} ({number(each.cost[0])})" for each in dear)]
    if total > 0:
        parts.append(f"together {sum(each.cost[0] for each in dear) / total:.0%} of what all layers cost in it")
    shown = ", ".join(rich[:4]) + (f" and {len(rich) - 4} more" if len(rich) > 4 else "")
    parts.append(f"most bits ({number(most)}): {shown}")
    return "; ".join(parts) + f". The whole choice was expected to cost {number(seen.predicted)} {seen.unit}."


# -------------------------------------------------------------------------------------------------------------- picture


def heat_map(seen: Allocation) -> Markup:
    """The picture alone."""
    kinds = list(dict.fromkeys(each.kind for each in seen.groups))
    blocks = sorted({each.block for each in seen.groups if each.block is not None}) or [0]
    wide = min(88.0, MOST / len(blocks))
    band = len(seen.candidates) * ROW + GAP
    shade = shades([cost for each in seen.groups for cost in each.cost])
    height = TOP + len(kinds) * band + 20
    cells = [_cell(seen, each, c, LEFT + wide * blocks.index(each.block or blocks[0]),
                   TOP + kinds.index(each.kind) * band + c * ROW, wide, shade)
             for each in seen.groups for c in range(len(seen.candidates))]
    text = f"what fewer bits cost each layer of {seen.variant}, and what was chosen"
    return tag("svg", tag("title", text), tag("desc", in_words(seen)), _labels(seen, kinds, blocks, wide, band), cells,
               viewBox=f"0 0 {LEFT + MOST + 24} {height}", role="img", aria_label=text, class_="small heat")


def _labels(seen: Allocation, kinds: Sequence[str], blocks: Sequence[int], wide: float, band: float) -> Markup:
    names = [[tag("text", kind, x=0, y=_px(TOP + place * band + 12), class_="title"),
              [tag("text", candidate.removesuffix(" symmetric"), x=LEFT - 8, y=_px(TOP + place * band + c * ROW + 12),
                   text_anchor="end") for c, candidate in enumerate(seen.candidates)]]
             for place, kind in enumerate(kinds)]
    every = max(1, math.ceil(22 / wide))
    below = [tag("text", str(block), x=_px(LEFT + wide * (place + 0.5)), y=_px(TOP + len(kinds) * band + 8),
                 text_anchor="middle") for place, block in enumerate(blocks) if place % every == 0]
    return tag("g", names, below, aria_hidden="true")


def _cell(seen: Allocation, each: Group, c: int, x: float, y: float, wide: float, shade: dict[float, int]) -> Markup:
    chosen = each.chosen == c
    said = (f"{each.name} in {seen.candidates[c]}: {number(each.cost[c])} {seen.unit}, {number(each.bits[c])} bits"
            + (", chosen" if chosen else ""))
    ring = tag("rect", x=_px(x + 2), y=_px(y + 2), width=_px(max(wide - 4, 2)), height=ROW - 4, class_="ring")
    return tag("g", tag("title", said),
               tag("rect", x=_px(x), y=_px(y), width=_px(max(wide - 1, 1)), height=ROW - 1,
                   class_=f"heat{shade[each.cost[c]]}"), ring if chosen else None)


def shades(costs: Sequence[float]) -> dict[float, int]:
    """Cost -> 0 (nothing, or the least) to SHADES - 1 (the most), in equal steps of its logarithm."""
    found = [cost for cost in costs if cost > 0 and math.isfinite(cost)]
    low, high = (math.log(min(found)), math.log(max(found))) if found else (0.0, 0.0)

    def place(cost: float) -> int:
        if not math.isfinite(cost):
            return SHADES - 1
        if cost <= 0 or high <= low:
            return 0
        return min(SHADES - 1, int(SHADES * (math.log(cost) - low) / (high - low)))

    return {cost: place(cost) for cost in costs}


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

"""What building a variant cost, and after how many tokens it has paid for itself.

N* = E_build / (e_base - e_variant) = E_build / (e_base (1 - r)), with r the paired ratio of joules per token. The
interval of r carries over, because 1 / (1 - r) rises with r. Where that interval reaches 1 no saving was shown, and a
break-even would be a number without a ground: null. So it would be of fewer than five pairs of blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmops.measure.intervals import LEAST_PAIRS
from llmops.quantity import Quantity, weakest

__all__ = ["break_even", "break_even_beside", "total"]


def break_even(build_j: Quantity, base_j_per_token: Quantity, ratio: Quantity) -> Quantity:
    """Output tokens after which the energy of building is won back.

    build_j: J; base_j_per_token: J per output token of the base; ratio: joules per token, variant over base, with its
    interval. The interval is that of the ratio alone; provenance is the weakest of the three.
    """
    for name, part in (("building energy", build_j), ("base energy per token", base_j_per_token), ("ratio", ratio)):
        if part.value is None:
            return Quantity.null("tokens", f"{name} is not known: {part.method}")
    assert build_j.value is not None and base_j_per_token.value is not None and ratio.value is not None
    if ratio.ci95 is None:
        return Quantity.null("tokens", "no saving shown: the ratio of joules per token has no interval")
    if ratio.n is not None and ratio.n < LEAST_PAIRS:
        return Quantity.null("tokens", f"no saving shown: the ratio of joules per token is of {ratio.n} repeats, at "
                                       f"least {LEAST_PAIRS} are needed (measure.repeats)")
    low, high = ratio.ci95
    if high >= 1:
        return Quantity.null("tokens", f"no saving shown: the interval of the ratio of joules per token, {low:.3g} to "
                                       f"{high:.3g}, reaches 1")
    whole = build_j.value / base_j_per_token.value
    return Quantity(whole / (1 - ratio.value), "tokens",
                    weakest([build_j.provenance, base_j_per_token.provenance, ratio.provenance]),
                    "E_build / (e_base - e_variant); interval of the ratio alone",
                    (whole / (1 - low), whole / (1 - high)), ratio.n)


def break_even_beside(build_j: Quantity, student: Mapping[str, Any], teacher: Mapping[str, Any], *,
                      teacher_is_base: bool = False) -> Quantity:
    """Output tokens after which a student has paid for what it took to make it out of its teacher.

    build_j: J of making it, the teacher's own building apart; student, teacher: what a row holds of one batch size
    (`joules_per_token`, `ratio_to_base`). Both were measured in turns with the base, not with each other, so the ratio
    of the two is r_student / r_teacher, and its interval is that of independent errors: relative half-widths as
    logarithms, added in squares.
    """
    for name, figures in (("student", student), ("teacher", teacher)):
        if "joules_per_token" not in figures:
            return Quantity.null("tokens", f"joules per token of the {name} were not measured")
    mine, per_token = (Quantity.from_dict(student[key]) for key in ("ratio_to_base", "joules_per_token"))
    theirs = (Quantity(1.0, mine.unit, "constant", "the teacher is the base", (1.0, 1.0)) if teacher_is_base
              else Quantity.from_dict(teacher["ratio_to_base"]))
    ratio = _quotient(mine, theirs)
    if per_token.value is None or not ratio.value:
        return break_even(build_j, per_token, ratio)
    return break_even(build_j, Quantity(per_token.value / ratio.value, "J/token", per_token.provenance,
                                        "student / ratio to teacher"), ratio)


def _quotient(a: Quantity, b: Quantity) -> Quantity:
    """a / b of two positive ratios with independent errors."""
    for part in (a, b):
        if not part.value or part.value < 0:
            return Quantity.null(a.unit, part.method)
    assert a.value is not None and b.value is not None
    value, method = a.value / b.value, "ratio of two ratios to base"
    n = min((part.n for part in (a, b) if part.n is not None), default=None)
    if a.ci95 is None or b.ci95 is None or min(a.ci95[0], b.ci95[0]) <= 0:
        return Quantity(value, a.unit, weakest([a.provenance, b.provenance]), method, None, n)
    below = math.hypot(math.log(a.value / a.ci95[0]), math.log(b.ci95[1] / b.value))
    above = math.hypot(math.log(a.ci95[1] / a.value), math.log(b.value / b.ci95[0]))
    return Quantity(value, a.unit, weakest([a.provenance, b.provenance]), method,
                    (value * math.exp(-below), value * math.exp(above)), n)


def total(quantities: Sequence[Quantity]) -> Quantity:
    """The sum, with the weakest provenance; null as soon as one part is. Intervals add as of independent errors.

    Raises ValueError for no quantities or for different units.
    """
    units = {quantity.unit for quantity in quantities}
    if len(units) != 1:
        raise ValueError(f"a total needs quantities of one unit, not of {sorted(units) or 'none'}")
    unit = units.pop()
    unknown = [quantity.method for quantity in quantities if quantity.value is None]
    if unknown:
        return Quantity.null(unit, f"{len(unknown)} of {len(quantities)} parts not known: "
                                   + "; ".join(dict.fromkeys(unknown)))
    value = math.fsum(quantity.value for quantity in quantities if quantity.value is not None)
    method = "sum of " + "; ".join(dict.fromkeys(quantity.method for quantity in quantities))
    return Quantity(value, unit, weakest([quantity.provenance for quantity in quantities]),
                    method, _spread(quantities, value))


def _spread(quantities: Sequence[Quantity], value: float) -> tuple[float, float] | None:
    below = above = 0.0
    for quantity in quantities:
        if quantity.ci95 is None or quantity.value is None:
            return None
        below += (quantity.value - quantity.ci95[0]) ** 2
        above += (quantity.ci95[1] - quantity.value) ** 2
    return value - math.sqrt(below), value + math.sqrt(above)

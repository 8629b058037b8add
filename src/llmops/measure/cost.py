"""What building a variant cost, and after how many tokens it has paid for itself.

N* = E_build / (e_base - e_variant) = E_build / (e_base (1 - r)), with r the paired ratio of joules per token. The
interval of r carries over, because 1 / (1 - r) rises with r. Where that interval reaches 1 no saving was shown, and a
break-even would be a number without a ground: null.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmops.quantity import Quantity, weakest

__all__ = ["break_even", "total"]


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
    low, high = ratio.ci95
    if high >= 1:
        return Quantity.null("tokens", f"no saving shown: the interval of the ratio of joules per token, {low:.3g} to "
                                       f"{high:.3g}, reaches 1")
    whole = build_j.value / base_j_per_token.value
    return Quantity(whole / (1 - ratio.value), "tokens",
                    weakest([build_j.provenance, base_j_per_token.provenance, ratio.provenance]),
                    "E_build / (e_base - e_variant); interval of the ratio alone",
                    (whole / (1 - low), whole / (1 - high)), ratio.n)


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

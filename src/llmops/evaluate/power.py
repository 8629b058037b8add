"""How many items a margin needs, before anything is scored.

A variant that is truly as good as its reference is shown to be so, within a margin m, with the power asked when

    n >= ((z_{1-alpha/2} + z_power) sd / m)^2        sd: of one item's paired difference, sqrt(share that flips)

at the two-sided level alpha = 5% (one-sided 2.5%, as for any interval of 95%). Normal approximation (Connor 1987 for
paired proportions, with no true difference). Nothing heavy is imported: a plan says this.
"""

from __future__ import annotations

import math

__all__ = ["ASSUMED", "POWER", "needed", "smallest_margin"]

ALPHA_AND_POWER = 1.959963984540054 + 0.8416212335729143  # z of 97.5% and of 80%
POWER = 0.8
ASSUMED = 0.1  # share of answers that flip either way, where no earlier run tells


def needed(margin: float, sd: float, drop: float = 0.0) -> int | None:
    """Items that show a drop of less than `margin` in 80% of tries, if it truly is `drop`; None if it is no less."""
    if drop >= margin:
        return None
    return max(2, math.ceil((ALPHA_AND_POWER * sd / (margin - drop)) ** 2))


def smallest_margin(items: int, sd: float) -> float:
    """The margin that so many items show in 80% of tries, if there is no drop."""
    return ALPHA_AND_POWER * sd / math.sqrt(items)

"""How many items a margin needs, before anything is scored.

A variant that is truly as good as its reference is shown to be so, within a margin m, with the power asked when

    n >= ((z_{1-alpha/2} sd_0 + z_power sd) / m)^2

at the two-sided level alpha = 5% (one-sided 2.5%, as for any interval of 95%). sd: of one item's paired difference; for
right/wrong items sqrt(share that flips). sd_0: the same if the drop were m, which for right/wrong items is larger, and
is what the score test divides by: 2q + delta (1 - delta), q as in `paired_tests.tango` (Tang, Tang and Chan 2003);
for other scores sd itself. Normal approximation. Nothing heavy is imported: a plan says this.
"""

from __future__ import annotations

import math

__all__ = ["ASSUMED", "POWER", "needed", "smallest_margin"]

Z_LEVEL, Z_POWER = 1.959963984540054, 0.8416212335729143  # of 97.5% and of 80%
POWER = 0.8
ASSUMED = 0.1  # share of answers that flip either way, where no earlier run tells


def needed(margin: float, sd: float, drop: float = 0.0, *, share: bool = False) -> int | None:
    """Items that show a drop of less than `margin` in 80% of tries, if it truly is `drop`; None if it is no less.

    share: the items are right or wrong.
    """
    if drop >= margin:
        return None
    return max(2, math.ceil(((Z_LEVEL * _under_margin(margin, sd, share) + Z_POWER * sd) / (margin - drop)) ** 2))


def smallest_margin(items: int, sd: float, *, share: bool = False) -> float:
    """The margin that so many items show in 80% of tries, if there is no drop."""
    low, high = 0.0, 1.0 if share else (Z_LEVEL + Z_POWER) * sd
    for _ in range(60):
        half = (low + high) / 2
        enough = ((Z_LEVEL * _under_margin(half, sd, share) + Z_POWER * sd) / half) ** 2 <= items
        low, high = (low, half) if enough else (half, high)
    return high


def _under_margin(margin: float, sd: float, share: bool) -> float:
    """Standard deviation of a right/wrong item's difference under the hypothesis that the drop is `margin`."""
    if not share or margin >= 1:
        return sd
    flips, delta = min(1.0, sd * sd), -margin
    b = -flips + 2 * delta
    c = -flips / 2 * delta * (1 - delta)
    q = (math.sqrt(max(0.0, b * b - 8 * c)) - b) / 4
    return math.sqrt(max(0.0, 2 * q + delta * (1 - delta)))

"""A Quantity as text: three significant digits, a scaled unit, its interval, and a mark for where it came from.

`~` stands before whatever was estimated, `-` for whatever is not known (the reason is in `told`). Fractions are shown
as per cent, their differences as percentage points. Bytes are decimal: 1 kB is 1,000 B.
"""

from __future__ import annotations

import math

from llmops.quantity import Quantity

__all__ = ["NONE", "interval", "number", "scaled", "show", "told"]

NONE = "-"
SI = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u")]
UPWARD = {"B", "tokens", "parameters", "FLOP", "requests"}  # never shown in thousandths
SCALED = UPWARD | {"J", "J/token", "J/request", "W", "gCO2e", "g"}
TIMES = [(3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us")]
BARE = {"fraction": "%", "ratio": "", "perplexity": "", "tokens": "", "parameters": "", "probability": ""}


def scaled(value: float, unit: str, *, difference: bool = False) -> tuple[float, str]:
    """(what one shown unit is worth in `unit`, the shown unit): scaled(2.1e6, "B") is (1e6, "MB")."""
    size = abs(value)
    if unit == "fraction":
        return 0.01, "pp" if difference else "%"
    if unit == "s":
        return next(((worth, name) for worth, name in TIMES if size >= worth), TIMES[-1]) if size else (1.0, "s")
    if unit in SCALED and size:
        steps = [step for step in SI if step[0] >= 1] if unit in UPWARD else SI
        worth, prefix = next((step for step in steps if size >= step[0] * 0.9995), steps[-1])
        return worth, prefix + BARE.get(unit, unit)
    return 1.0, BARE.get(unit, unit)


def number(value: float, *, decimals: int | None = None, signed: bool = False) -> str:
    """Three significant digits, or so many decimals; thousands apart; no exponent between 1e-4 and 1e7."""
    if not math.isfinite(value):
        return str(value)
    sign = "+" if signed else ""
    if (decimals is None and 0 < abs(value) < 1e-4) or abs(value) >= 1e7:
        return f"{value:{sign}.2e}"
    places = _decimals(value) if decimals is None else decimals
    return f"{round(value, places) + 0.0:{sign},.{places}f}"  # + 0.0: no minus zero


def interval(low: float, high: float, *, decimals: int, signed: bool = False) -> str:
    """`[0.9, 1.2]`, both ends with the same decimals."""
    return f"[{number(low, decimals=decimals, signed=signed)}, {number(high, decimals=decimals, signed=signed)}]"


def show(quantity: Quantity, *, with_interval: bool = False, difference: bool = False, unit: bool = True) -> str:
    """`~1.32 kJ [1.20, 1.44]`. difference: signed, and in percentage points for a fraction. unit: false drops it."""
    if quantity.value is None:
        return NONE
    ends: tuple[float, ...] = quantity.ci95 or ()
    worth, name = scaled(quantity.value or max(map(abs, ends), default=0.0), quantity.unit, difference=difference)
    value, ends = quantity.value / worth, tuple(end / worth for end in ends)
    decimals = 1 if quantity.unit == "fraction" else _decimals(value or max(map(abs, ends), default=0.0))
    text = number(value, decimals=decimals, signed=difference)
    if unit and name:
        text += name if name == "%" else f" {name}"
    if quantity.provenance == "estimated":
        text = f"~{text}"
    if with_interval and ends:
        text += f" {interval(ends[0], ends[1], decimals=_places(ends[1] - ends[0], decimals), signed=difference)}"
    return text


def told(quantity: Quantity) -> str:
    """Where the figure came from, in one sentence: provenance, method, interval, n; or why there is none."""
    if quantity.value is None:
        return f"not known: {quantity.method}"
    parts: list[str] = [quantity.provenance]
    if quantity.method:
        parts.append(quantity.method)
    if quantity.ci95 is not None:
        parts.append(f"95% interval {number(quantity.ci95[0])} to {number(quantity.ci95[1])} {quantity.unit}".rstrip())
    if quantity.n is not None:
        parts.append(f"n = {quantity.n:,}")
    return "; ".join(parts)


def _places(width: float, decimals: int) -> int:
    """Decimals for the ends of an interval: those of its value, up to two more where the interval is very narrow."""
    return next((places for places in (decimals, decimals + 1) if width >= 3 * 10.0 ** -places), decimals + 2)


def _decimals(value: float) -> int:
    """Decimals that leave three significant digits, between 0 and 6."""
    if not math.isfinite(value) or value == 0:
        return 0 if value == 0 else 2
    return min(6, max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9)))

"""Contenders in turns, so that a machine that slows down slows all of them, and what their times come to.

Every second turn goes the other way round: what drifts within a turn (heat, another's load) favours nobody. A ratio is
of two contenders over the same turns, its interval Student's on the logarithm (`llmops.measure.intervals`); where
turns are many and short, and one is hit by something else now and then, it is that of the medians, with a bootstrap's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

__all__ = ["in_turn", "median_ratio", "order", "ratio", "shown", "timed"]

T = TypeVar("T")
Call = Callable[[int], Any]


def order(contenders: Sequence[T], turn: int) -> Sequence[T]:
    """The contenders as they are called in this turn."""
    return contenders if turn % 2 == 0 else contenders[::-1]


def in_turn(contenders: Sequence[T], turns: int) -> Iterator[tuple[int, T]]:
    """(turn, contender), every contender in every turn."""
    for turn in range(turns):
        for contender in order(contenders, turn):
            yield turn, contender


def timed(calls: Mapping[str, Call], *, turns: int, seconds: float = 0.0, each: int = 1,
          clock: Callable[[], float] = time.perf_counter, synchronize: Callable[[], Any] = lambda: None,
          warm_up: bool = True) -> dict[str, list[float]]:
    """Contender -> its times, those of the same place of the same turns.

    calls: contender -> what is timed; it is given a number that goes up with every call of it (one that rotates over
    copies of its data takes it). turns, seconds: at least so many, and as many as fit in the seconds of the clock.
    each: calls in a row within a turn, each timed for itself. The clock is `time.process_time` where a shared machine
    has to be seen through.
    """
    if warm_up:
        for call in calls.values():
            call(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    synchronize()
    began, turn = clock(), 0
    while turn < turns or clock() - began < seconds:
        for name in order(list(calls), turn):
            for again in range(each):
                start = clock()
                calls[name](turn * each + again)
                synchronize()
                times[name].append(clock() - start)
        turn += 1
    return times


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """{median of over/under, ratio, ci95}: `ratio` is exp of the mean log, `ci95` its interval, None for one pair."""
    from llmops.measure.intervals import log_ratio

    pairs = [a / b for a, b in zip(over, under, strict=True)]
    if len(pairs) < 2:
        return {"median": pairs[0], "ratio": pairs[0], "ci95": None, "n": 1}
    value, interval = log_ratio(over, under)
    return {"median": median(pairs), "ratio": value, "ci95": list(interval), "n": len(pairs)}


def median_ratio(over: Sequence[float], under: Sequence[float], resamples: int = 4000, seed: int = 0) -> dict[str, Any]:
    """{ratio, ci95, n}: median of `over` over the median of `under`, its interval by drawing whole turns again."""
    import numpy as np

    pair = np.array([over, under], dtype=float)
    drawn = np.random.default_rng(seed).integers(pair.shape[1], size=(resamples, pair.shape[1]))
    again = np.median(pair[:, drawn], axis=2)
    low, high = np.quantile(again[0] / again[1], (0.025, 0.975))
    return {"ratio": median(over) / median(under), "ci95": [float(low), float(high)], "n": pair.shape[1]}


def shown(found: Mapping[str, Any], digits: int = 2) -> str:
    """`0.93 (0.91 to 0.95)`."""
    interval = found["ci95"]
    between = "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
    return f"{found['ratio']:.{digits}f}{between}"

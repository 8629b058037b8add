"""Do the intervals hold what they say? Simulated pairs whose true difference is known, judged as real ones are.

    python benchmarks/bench_statistics.py [--runs 2000] [--json FILE]

Coverage: how often a 95 % interval holds the true difference (aim: 93 to 97 %). False claims: how often a difference,
a saving or non-inferiority is "shown" where there is none (aim: at most 5 %, for non-inferiority 2.5 % and a point for
the chance of the simulation). Every figure is of `--runs` simulated comparisons, so it has a standard error of its own,
which is printed. Accuracy goes through `llmops.evaluate.statistics.compare`, energy through
`llmops.measure.intervals.log_ratio`: the functions that fill a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from _runner.machine import about, said
from _runner.results import Results, parser
from llmops.evaluate.noninferiority import LEVEL, noninferiority_p
from llmops.evaluate.paired_tests import holm
from llmops.evaluate.statistics import compare
from llmops.measure.intervals import log_ratio

RIGHT = 0.8  # share of answers that base has right
MARGIN = 0.03


@dataclass(frozen=True)
class Line:
    """One simulated situation: a share of runs, what it is a share of, and where it should lie."""

    what: str
    case: str
    share: float
    low: float
    high: float
    runs: int

    @property
    def ok(self) -> bool:
        return self.low <= self.share <= self.high

    @property
    def stderr(self) -> float:
        return math.sqrt(self.share * (1 - self.share) / self.runs)


def flips(rng: np.random.Generator, gain: Any, loss: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(variant, base) of n right/wrong items; gain and loss: chance of each flip, numbers or one for each item."""
    u, right = rng.random(n), rng.random(n) < RIGHT
    base = np.where(u < gain, False, np.where(u < gain + loss, True, right)).astype(float)
    variant = np.where(u < gain, True, np.where(u < gain + loss, False, base)).astype(float)
    return variant, base


def documents(rng: np.random.Generator, count: int, size: int, gain: float, loss: float,
              ) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The same with documents whose chances of flips differ (beta, as variable as the mean allows at 1 and 4)."""
    gains, losses = (np.repeat(rng.beta(0.5, 0.5 * (1 - mean) / mean, count), size) / 2 for mean in
                     (2 * gain, 2 * loss))
    variant, base = flips(rng, gains, losses, count * size)
    return variant, base, [str(k // size) for k in range(count * size)]


def judged(variant: np.ndarray, base: np.ndarray, seed: int, clusters: list[str] | None = None, **more: Any,
           ) -> dict[str, Any]:
    options = {"unit": "fraction", "aggregation": "mean", "rising": True, **more}
    found = compare(variant, base, np.ones(len(base)), seed, clusters=clusters, **options)
    return {**found, "delta": found["delta"].as_dict()}


def holds(found: dict[str, Any], truth: float) -> bool:
    low, high = found["delta"]["ci95"]
    return low - 1e-12 <= truth <= high + 1e-12


# ------------------------------------------------------------------------------------------------------------ accuracy


def independent(runs: int) -> Iterator[Line]:
    for n, gain, loss in ((200, 0.02, 0.05), (200, 0.05, 0.10), (600, 0.01, 0.01), (600, 0.02, 0.05),
                          (1000, 0.01, 0.03), (1000, 0.10, 0.10), (200, 0.97, 0.01), (600, 0.97, 0.01)):
        rng = np.random.default_rng([n, round(1000 * loss)])
        held = sum(holds(judged(*flips(rng, gain, loss, n), run), gain - loss) for run in range(runs))
        yield Line("coverage", f"{n} items, {gain:.0%} gained, {loss:.0%} lost", held / runs, 0.93, 0.97, runs)


def clustered(runs: int) -> Iterator[Line]:
    for count, size, gain, loss in ((40, 15, 0.05, 0.10), (100, 6, 0.03, 0.06), (200, 5, 0.02, 0.02)):
        rng = np.random.default_rng([count, size])
        held = naive = 0
        for run in range(runs):
            variant, base, names = documents(rng, count, size, gain, loss)
            held += holds(judged(variant, base, run, names), gain - loss)
            naive += holds(judged(variant, base, run), gain - loss)
        case = f"{count} documents of {size} items, {gain:.0%} gained, {loss:.0%} lost"
        yield Line("coverage", f"{case}, clustered", held / runs, 0.93, 0.97, runs)
        yield Line("(for comparison)", f"{case}, documents ignored", naive / runs, 0.0, 1.0, runs)


def windows(runs: int) -> Iterator[Line]:
    for n in (20, 60):
        rng = np.random.default_rng(n)
        truth, held = math.exp(3.02) - math.exp(3.0), 0
        for run in range(runs):
            base = rng.normal(3.0, 0.3, n)
            variant = base + rng.normal(0.02, 0.03, n)
            held += holds(judged(variant, base, run, unit="perplexity", aggregation="exp_mean", rising=False), truth)
        yield Line("coverage", f"perplexity over {n} windows", held / runs, 0.93, 0.97, runs)


def same(runs: int) -> Iterator[Line]:
    """A/A: both sides equally good, answers flip all the same. Shown: the interval leaves 0 out, and p <= .05."""
    for n, rate in ((200, 0.05), (600, 0.02)):
        rng = np.random.default_rng([n, 7])
        found = [judged(*flips(rng, rate, rate, n), run) for run in range(runs)]
        shown = sum(not holds(each, 0.0) and each["p"] <= 0.05 for each in found)
        apart = sum(not holds(each, 0.0) for each in found)
        case = f"A/A, {n} items, {2 * rate:.0%} flip"
        yield Line("false difference", case, shown / runs, 0.0, 0.05, runs)
        yield Line("(for comparison)", f"{case}, by the interval alone", apart / runs, 0.0, 1.0, runs)
    rng = np.random.default_rng(11)
    names = tested = 0
    for run in range(runs):
        variant, base, clusters = documents(rng, 60, 10, 0.05, 0.05)
        found_one = judged(variant, base, run, clusters)
        tested += not holds(found_one, 0.0) and found_one["p"] <= 0.05
        several = {str(k): judged(*flips(rng, 0.03, 0.03, 400), run)["p"] for k in range(5)}
        names += min(holm(several).values()) <= 0.05
    yield Line("false difference", "A/A, 60 documents of 10 items", tested / runs, 0.0, 0.05, runs)
    yield Line("false difference", "A/A, any of 5 variants, Holm <= .05", names / runs, 0.0, 0.05, runs)


def margins(runs: int) -> Iterator[Line]:
    """A variant that is worse by exactly the margin must not be called non-inferior."""
    for n, gain in ((300, 0.02), (1000, 0.05)):
        rng = np.random.default_rng([n, 3])
        shown = sum(noninferiority_p(judged(*flips(rng, gain, gain + MARGIN, n), run), MARGIN, True) <= LEVEL
                    for run in range(runs))
        yield Line("false non-inferiority", f"drop of {MARGIN:.0%}, margin {MARGIN:.0%}, {n} items", shown / runs, 0.0,
                   0.035, runs)
    rng, shown = np.random.default_rng(5), 0
    for run in range(runs):
        variant, base, names = documents(rng, 80, 8, 0.04, 0.04 + MARGIN)
        p = noninferiority_p(judged(variant, base, run, names), MARGIN, True)
        shown += p is not None and p <= LEVEL
    yield Line("false non-inferiority", f"the same, 80 documents of 8 items, {MARGIN:.0%}", shown / runs, 0.0, 0.035,
               runs)


# -------------------------------------------------------------------------------------------------------------- energy


def energy(runs: int) -> Iterator[Line]:
    """Blocks of base and variant side by side: a drift that both share, and noise of each."""
    for n, noise, ratio in ((5, 0.02, 0.9), (5, 0.10, 1.05), (10, 0.03, 0.97), (20, 0.05, 0.5)):
        rng = np.random.default_rng([n, round(100 * noise)])
        held = 0
        for _ in range(runs):
            drift = np.cumsum(rng.normal(0, 0.05, n))
            base = np.exp(drift + rng.normal(0, noise, n))
            variant = ratio * np.exp(drift + rng.normal(0, noise, n))
            low, high = log_ratio(list(variant), list(base))[1]
            held += low <= ratio <= high
        yield Line("coverage", f"energy ratio {ratio:g}, {n} pairs of blocks, noise {noise:.0%}", held / runs, 0.93,
                   0.97, runs)
    for n in (5, 10):
        rng, saved, moved = np.random.default_rng([n, 99]), 0, 0
        for _ in range(runs):
            drift = np.cumsum(rng.normal(0, 0.05, n))
            low, high = log_ratio(*(list(np.exp(drift + rng.normal(0, 0.03, n))) for _ in range(2)))[1]
            saved, moved = saved + (high < 1), moved + (high < 1 or low > 1)
        yield Line("false saving", f"A/A, {n} pairs of blocks, saving shown", saved / runs, 0.0, 0.05, runs)
        yield Line("coverage", f"A/A, {n} pairs of blocks, ratio 1", 1 - moved / runs, 0.93, 0.97, runs)


PARTS: dict[str, Callable[[int], Iterator[Line]]] = {
    "independent": independent, "clustered": clustered, "windows": windows, "same": same, "margins": margins,
    "energy": energy}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--runs", type=int, default=2000)
    options.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    asked = options.parse_args()
    record = about(asked, ("numpy", "scipy"))
    results, lines = Results(asked.out, {**record, "runs": asked.runs}), []
    print(f"{said(record)}; {asked.runs:,} runs each")
    for part in asked.parts:
        for line in PARTS[part](asked.runs):
            lines.append(line)
            results.keep(lines=[{**asdict(each), "ok": each.ok} for each in lines])
            aim = "" if line.high == 1.0 else f"  aim {line.low:.1%} to {line.high:.2%}"
            print(f"{'  ' if line.ok else '! '}{line.what:22} {line.share:7.2%} +- {line.stderr:.2%}{aim}  {line.case}",
                  flush=True)
    results.end()
    return 0 if all(line.ok for line in lines) else 1


if __name__ == "__main__":
    raise SystemExit(main())

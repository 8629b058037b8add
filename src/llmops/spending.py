"""What a run has spent over all its tries, and the stop when its budget is used up.

A recipe with a `budget` is metered as a whole: one window around everything, beside those of the single stages, noted
every two seconds in `runs/NAME/spent/` as a build's attempts are (`build/attempts.py`). So tries that failed or were
killed count, scoring counts, and a second call of the same command goes on with what is left.

The stop comes from inside the work, at the next sign of progress: BudgetReached, after which finished variants, rows
and the last checkpoint are kept as after an interrupt (a training writes one before it stops). What one sign of
progress takes may be spent beyond the budget. A budget that nobody can hold to is refused: without a sensor nothing is
started, and when the sensor dies midway the run stops.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from types import TracebackType

from llmops.build.attempts import Attempts, summed
from llmops.errors import BudgetReached, LlmopsError
from llmops.measure.budget import limits, spent_in_words
from llmops.measure.meter import Meter
from llmops.measure.options import Budget
from llmops.quantity import Quantity
from llmops.recipe.plan import Plan
from llmops.store import Store
from llmops.train import Progress

__all__ = ["Spending"]

EVERY_S = 2.0  # between two looks at the sensor
BLIND_S = 30.0  # how long a run may go on without a reading: a counter that was not seen to move yet


class Spending:
    """Of one run; metered while the `with` block lasts. grid: intensity for a budget in grams."""

    def __init__(self, plan: Plan, store: Store, meter: Meter, budget: Budget, grid: Quantity | None) -> None:
        if meter.sensor.provenance == "null":
            raise LlmopsError(f"the recipe has a budget, and energy cannot be known here: {meter.sensor.method}; "
                              "expected a sensor: declare what the machine draws (measure: {sensor: declared, watts: "
                              "65}), or take the budget out")
        self.most_j, self.said = limits(budget, grid)
        self._meter, self._label, self._open = meter, plan.recipe.name, ExitStack()
        self._folder = store.folder(plan.recipe.name) / "spent"
        self._attempts: Attempts | None = None
        self._looked = self._seen = float("-inf")

    def __enter__(self) -> Spending:
        window = self._open.enter_context(self._meter.window(f"run {self._label}"))
        self._attempts = self._open.enter_context(Attempts(self._folder, window))
        self._seen = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def spent(self) -> Quantity:
        """Joules of all tries up to now."""
        assert self._attempts is not None
        wall_s, energy = self._attempts.window.so_far()
        known = [each for each in self._attempts.before if each[1].value is not None]
        if energy.value is None and known and wall_s < BLIND_S:  # this try has seen nothing yet
            return summed(known)
        return summed([*self._attempts.before, (wall_s, energy)])

    def check(self) -> None:
        """Raises BudgetReached when the budget is used up, or can no longer be held to."""
        now = time.monotonic()
        if now - self._looked < EVERY_S:
            return
        self._looked = now
        assert self._attempts is not None
        self._attempts.note()
        found = self.spent()
        if found.value is None:
            if now - self._seen > BLIND_S:
                raise BudgetReached(f"energy is no longer known ({found.method}), so the budget cannot be held to; "
                                    "what was finished is kept: mend the sensor, or declare watts, and run the same "
                                    "command again")
            return
        self._seen = now
        if found.value >= self.most_j:
            raise BudgetReached(f"budget reached: {spent_in_words(found.value)} of {self.said} are spent "
                                f"({found.provenance}: {found.method}); finished variants and the last checkpoint are "
                                "kept: raise the budget and run the same command again, it goes on from there")

    def watching(self, progress: Progress) -> Progress:
        """`progress`, with a look at the budget on the way."""

        def watched(done: int, total: int, text: str = "") -> None:
            progress(done, total, text)
            self.check()

        return watched

"""When going on is no longer worth it: early stopping on the held-out loss, and on what a gain in it costs.

After every so many steps the held-out loss L is taken. The training stops when `patience` such looks in a row have

    brought no gain                     best L before - L  <=  min_gain
    or a gain that cost too much       (best L before - L) / energy since the last look  <  min_gain_per_kilojoule

in nats per token, and nats per token per kilojoule. What is kept is the state with the lowest L, not the last one.
(Prechelt 1998, "Early Stopping - But When?", for the first; the second prices the same curve in energy.)

Energy is the run's own meter. Where nothing is measured the meter's estimate, which is time multiplied by a power, or
time at a nominal power stands in, and the row says so. A counter moves in steps, of seconds with some; a look that
comes before it has moved has no price and settles nothing, and the next step pays for all looks since the last.

The look itself must not eat the run: it reads as many held-out rows as a fixed share of the training pays for at every
look, counted in tokens (a forward pass costs half of a training pass through frozen weights, a third of one
through trained weights), so that the same rows are looked at whatever the machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["NOMINAL_WATTS", "Look", "Stopping"]

NOMINAL_WATTS = 100.0  # what a second counts as where no sensor and no estimate is at hand


@dataclass(frozen=True)
class Look:
    """One look at the held-out loss. energy_j: spent by the training so far."""

    step: int
    loss: float
    energy_j: float
    gain_per_kilojoule: float | None = None


@dataclass
class Stopping:
    """The rule and what it has seen. every: steps between two looks. share: of the training's cost, for looking."""

    patience: int = 3
    min_gain: float = 0.0
    min_gain_per_kilojoule: float | None = None
    every: int = 50
    share: float = 0.1
    looks: list[Look] = field(default_factory=list)
    poor: int = 0  # looks in a row that brought too little

    @property
    def best(self) -> Look | None:
        return min(self.looks, key=lambda look: look.loss, default=None)

    def due(self, step: int, steps: int) -> bool:
        """Whether a look follows step `step` of `steps`."""
        return step % self.every == 0 or step == steps

    def see(self, step: int, loss: float, energy_j: float) -> bool:
        """Take a look into account; returns whether the training should stop here."""
        best, last = self.best, self.looks[-1] if self.looks else None
        worth: float | None = None
        if best is not None and last is not None:
            gain, spent = best.loss - loss, energy_j - last.energy_j
            if spent > 0:  # it paid for all that was gained since the reading before it was first seen
                before = sum(look.energy_j < last.energy_j for look in self.looks) + 1
                worth = 1000.0 * (min(look.loss for look in self.looks[:before]) - loss) / spent
            priced = self.min_gain_per_kilojoule is not None
            if gain <= self.min_gain or (priced and worth is not None and worth < (self.min_gain_per_kilojoule or 0)):
                self.poor += 1
            elif worth is not None or not priced:
                self.poor = 0
        self.looks.append(Look(step, loss, energy_j, worth))
        return self.poor >= self.patience

    def reason(self) -> str:
        """Why it stopped, for the row."""
        assert self.best is not None
        text = (f"stopped early at step {self.looks[-1].step}: {self.poor} looks in a row gained too little; "
                f"the held-out loss was lowest, {self.best.loss:.4f}, after step {self.best.step}")
        if self.min_gain_per_kilojoule is not None and self.looks[-1].gain_per_kilojoule is not None:
            text += (f"; the last gained {self.looks[-1].gain_per_kilojoule:.3g} nats a token per kilojoule, "
                     f"{self.min_gain_per_kilojoule:g} was asked for")
        return text

    def as_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"looks": [asdict(look) for look in self.looks], "poor": self.poor}

    def restore(self, state: dict[str, Any]) -> None:
        self.looks, self.poor = [Look(**look) for look in state["looks"]], state["poor"]

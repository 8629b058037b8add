"""A learning rate from a range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3).

A short training whose rate grows exponentially from far too small to too large. The loss first stands still, then
falls, then rises; the useful rates lie on the fall. Taken here is the rate of the lowest smoothed loss divided by ten,
the rule that practice has kept for Adam: the lowest point itself is already on the verge of diverging, and a peak rate
is used for a long time. The weights, the optimizer and the random numbers are put back afterwards.

The test stops as soon as the smoothed loss is far above its lowest, and costs at most `steps` optimizer steps; it is
noted with its curve, so that the choice can be doubted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from llmops.errors import StepError
from llmops.models.token_loss import next_token_loss
from llmops.train.loop import Hooks, Loss, fit
from llmops.train.rows import TrainingSet
from llmops.train.schedule import Schedule

__all__ = ["Found", "choose_rate", "find_rate"]

SMOOTHING = 0.8
DIVERGED = 1.5  # a smoothed loss this many times the lowest one ends the test


class _Diverged(Exception):
    """The rate has become too large; the test is over."""


@dataclass(frozen=True)
class Found:
    """The rate, and the curve it was read from: (rate, loss) of every step."""

    rate: float
    curve: list[tuple[float, float]]

    def describe(self) -> str:
        """The event for the row."""
        return (f"learning rate {self.rate:.2g}, from a range test of {len(self.curve)} steps between "
                f"{self.curve[0][0]:.1g} and {self.curve[-1][0]:.1g}")


def choose_rate(curve: list[tuple[float, float]]) -> float:
    """A tenth of the rate at which the exponentially smoothed loss (bias-corrected) is lowest. curve: (rate, loss)."""
    best, low, mean = curve[0][0], math.inf, 0.0
    for count, (rate, loss) in enumerate(curve, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth = mean / (1 - SMOOTHING**count)
        if smooth < low:
            best, low = rate, smooth
    return best / 10


def find_rate(model: nn.Module, rows: TrainingSet, schedule: Schedule, *, seed: int, loss: Loss = next_token_loss,
              rate_scale: Callable[[str], float] | None = None, low: float = 1e-6, high: float = 1.0,
              steps: int = 60) -> Found:
    """Run the test on copies of the trained parameters. Raises StepError when the loss never falls."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    kept = {name: value.detach().cpu().clone() for name, value in trained.items()}
    random = torch.get_rng_state()
    curve: list[tuple[float, float]] = []
    grow = (high / low) ** (1 / max(1, steps - 1))

    def log(step: int, figures: Mapping[str, float]) -> None:
        value = figures["loss"]
        curve.append((low * grow ** (step - 1), value))
        if value > 3 * curve[0][1] or (len(curve) > 10 and value > DIVERGED * min(loss for _, loss in curve) + 1):
            raise _Diverged

    try:
        fit(model, rows, replace(schedule, learning_rate=low, schedule="exponential", warmup=0.0, max_steps=steps,
                                 growth=grow), seed=seed, loss=loss,
            hooks=Hooks(log=log), rate_scale=rate_scale)
    except _Diverged:
        pass
    except StepError as error:
        if "became" not in str(error) or len(curve) < 2:
            raise
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                trained[name].copy_(value)
        for value in trained.values():
            value.grad = None
        torch.set_rng_state(random)
    if min(value for _, value in curve) >= curve[0][1]:
        raise StepError(f"no learning rate between {curve[0][0]:.1g} and {curve[-1][0]:.1g} lowered the loss "
                        f"({curve[0][1]:.3f} at the start); expected a fall: give learning_rate as a number, or look "
                        "at the data with `llmops data show`")
    return Found(choose_rate(curve), curve)

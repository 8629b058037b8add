"""How long, how fast and how much at once; the learning-rate curve; the optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmops.errors import StepError

__all__ = ["OPTIMIZERS", "Schedule", "make_optimizer", "rate_factor"]


@dataclass(frozen=True)
class Schedule:
    """`warmup` is a fraction of the optimizer steps. `batch_tokens`, where given, replaces `batch_size`.

    schedule: "cosine" and "linear" fall to 0, "constant" stays, "exponential" multiplies by `growth` every step.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    batch_size: int = 8
    batch_tokens: int | None = None
    accumulate: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    growth: float = 1.0


def rate_factor(step: int, steps: int, schedule: Schedule) -> float:
    """The learning rate of a step (counted from 0) as a share of its peak: linear warm-up, then the named curve."""
    if schedule.schedule == "exponential":
        return schedule.growth**step
    warm = math.ceil(schedule.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    left = (steps - step) / max(1, steps - warm)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[schedule.schedule]


def _adamw(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def _sgd(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=rate, momentum=0.9)


def _bitsandbytes(name: str, devices: tuple[str, ...]) -> Callable[[list[dict[str, Any]], float],
                                                                   torch.optim.Optimizer]:
    """A maker of one of bitsandbytes' optimizers. devices: those it runs on."""

    def make(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
        device = groups[0]["params"][0].device.type
        if device not in devices:
            small = "adamw_8bit or adamw" if device in EIGHT_BIT else "adamw"
            raise StepError(f"given an optimizer ({name}) that does not run on {device}; expected a device of "
                            f"{', '.join(devices)}: use optimizer: {small}")
        try:
            import bitsandbytes
        except ImportError as error:
            raise StepError(f"the optimizer {name} needs bitsandbytes ({error}); pip install bitsandbytes, or "
                            "optimizer: adamw") from error
        made: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(groups, lr=rate)
        return made

    return make


EIGHT_BIT = ("cpu", "cuda", "xpu")  # devices that bitsandbytes has 8-bit optimizers for
PAGED = ("cuda", "xpu")  # and those with memory that can leave them
#: name in a recipe -> (parameter groups, peak learning rate) -> optimizer. The 8-bit ones keep their two moments in
#: blocks of 8 bits (Dettmers et al. 2021, arXiv 2110.02861); paged: they may leave the GPU when it is full.
OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]] = {
    "adamw": _adamw, "sgd": _sgd, "adamw_8bit": _bitsandbytes("AdamW8bit", EIGHT_BIT),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit", PAGED), "lion_8bit": _bitsandbytes("Lion8bit", EIGHT_BIT)}


def make_optimizer(named: Iterable[tuple[str, Tensor]], schedule: Schedule, rate: float,
                   rate_scale: Callable[[str], float] | None = None) -> torch.optim.Optimizer:
    """An optimizer over parameters grouped by learning rate and decay; vectors (norms, biases) are not decayed.

    rate_scale: parameter name -> factor on the learning rate (LoRA+). Each group keeps its factor as `scale`.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in named:
        decay = schedule.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate_scale(name) if rate_scale else 1.0, decay), []).append(parameter)
    return OPTIMIZERS[schedule.optimizer](
        [{"params": parameters, "weight_decay": decay, "scale": scale, "lr": rate * scale}
         for (scale, decay), parameters in groups.items()], rate)

"""What a candidate costs beside its parent on this machine: decode time or energy, in turns, medians.

Parent and candidate decode the same prompts, one after the other, `repeats` times in alternating order, so that what
drifts meets both; the figure is the ratio of the medians. A turn that is metered for energy lasts three updates of the
sensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmops.build.job import Job
from llmops.errors import LlmopsError
from llmops.measure.meter import Meter
from llmops.measure.options import MeasureOptions
from llmops.measure.sensors import probe
from llmops.measure.workload import Runner, check_fits, make_prompts
from llmops.methods.prune.options.targets import Targets

__all__ = ["Cost", "cost_of", "largest_within", "ratio_to"]

T = TypeVar("T")

Opened = Callable[[], AbstractContextManager[Any]]  # a model, for as long as the block lasts


@dataclass(frozen=True)
class Cost:
    """A ratio and the two medians behind it. unit: s or J a request."""

    ratio: float
    candidate: float
    parent: float
    unit: str
    method: str

    def as_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "candidate": self.candidate, "parent": self.parent, "unit": self.unit,
                "method": self.method}


def cost_of(options: Targets) -> str | None:
    """What is measured: "latency", "joules", or None where no target asks for it. Raises LlmopsError for both."""
    asked = [name for name in ("latency", "joules") if getattr(options, name) is not None]
    if len(asked) > 1:
        raise LlmopsError("both latency and joules; expected one target")
    return asked[0] if asked else None


def largest_within(candidates: Sequence[T], cost: Callable[[T], float], limit: float) -> T | None:
    """The largest of ascending candidates whose cost is within the limit, costs taken to rise with size; None where the
    smallest is beyond it. A bisection: about log2 of their number are measured."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(candidates[middle]) <= limit else (low, middle)
    return candidates[low] if low >= 0 else None


def ratio_to(parent: Opened, candidate: Opened, job: Job, options: Targets) -> Cost:
    """Cost of the candidate over that of its parent. Raises LlmopsError when prompts do not fit, or no sensor of energy
    is there and joules are asked for."""
    joules = cost_of(options) == "joules"
    meter = _meter(job) if joules else None
    found: dict[str, list[float]] = {"parent": [], "candidate": []}
    prompts: Tensor | None = None
    for turn in range(-1, options.repeats):  # the first warms up
        for name, opened in (("parent", parent), ("candidate", candidate))[::1 if turn % 2 else -1]:
            with opened() as model, torch.inference_mode():
                if prompts is None:
                    check_fits(model, options.prompt_tokens, options.new_tokens, "the model")
                    prompts = make_prompts([model], job.tokenizer, options.batch_size, options.prompt_tokens, job.seed)
                value = _turn(Runner(model.eval()), prompts, options.new_tokens, meter if turn >= 0 else None)
            if turn >= 0:
                found[name].append(value)
    mine, other = median(found["candidate"]), median(found["parent"])
    how = (f"medians of {options.repeats} interleaved turns, {options.prompt_tokens} tokens of prompt, "
           f"{options.new_tokens} decoded, batch {options.batch_size}")
    return Cost(mine / other, mine, other, "J/request" if joules else "s",
                how + (f", {meter.sensor.name}: {meter.sensor.provenance}" if meter is not None else ""))


def _turn(runner: Runner, prompts: Tensor, new_tokens: int, meter: Meter | None) -> float:
    """Seconds of decoding of one request, or joules a request."""
    prompts = prompts.to(runner.device)
    if meter is None:
        return runner.request(prompts, new_tokens).decode_s
    lasting, requests = 3 * (meter.sensor.update_period_s or 0.0), 0
    with meter.window("candidate") as window:
        until = time.perf_counter() + lasting
        while not requests or time.perf_counter() < until:
            runner.request(prompts, new_tokens)
            requests += 1
    if window.energy.value is None:
        raise LlmopsError(f"joules cannot be measured: {window.energy.method}; expected a sensor, or target: latency")
    return window.energy.value / requests


def _meter(job: Job) -> Meter:
    device = next(iter(job.model.parameters())).device
    meter = job.meter if job.meter is not None else Meter(probe(MeasureOptions(), device), device)
    if meter.sensor.provenance == "null":
        raise LlmopsError(f"joules: {meter.sensor.method}; expected a sensor of energy: give latency as the target")
    return meter

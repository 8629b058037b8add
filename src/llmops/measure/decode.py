"""Speed and energy of a variant beside its base, in interleaved blocks.

A machine drifts: it warms up, its clock falls, other work comes and goes. Measuring all of the base and then all of
the variant would put that drift into the comparison. So the two take turns: `repeats` pairs of blocks, in each pair
base and variant in random (seeded) order, and the comparison is the mean log ratio within pairs, with its t interval.
With `base=None` the model runs against itself: its ratio should be 1, and how far its interval reaches is the noise
floor of the machine (`aa_ratio`).

A block is (1) prefills alone, metered, and (2) whole requests, metered: joules per output token and per request come
straight from (2), prefill included; prefill from (1); decode is what remains of (2) after (1). Both repeat until they
last `window_s`, and at least 200 updates of a hardware counter (three of an estimate). A window is idle-subtracted
where idle power was read. The device's clocks, temperature and power limit are kept from before and after, and who
else was at work there (`beside.py`).

What the verdict says. `saving` is "shown" only if the whole interval of the energy ratio lies below 1 and there are at
least five pairs of blocks (fewer can be asked for, and the row warns), "not shown" if not, "unmeasured" where there is
no energy to compare. It does not say how energy was known: the ratio's provenance does, and a "shown" on an estimate is
an estimated saving.

Left out: batching over time as a server does it, sampling, speculative decoding, prompts of natural length.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmops.measure import memory
from llmops.measure.beside import beside
from llmops.measure.environment import conditions
from llmops.measure.intervals import LEAST_PAIRS
from llmops.measure.meter import Meter
from llmops.measure.options import MeasureOptions
from llmops.measure.summary import energy_group, latency_group
from llmops.measure.workload import Runner, Timing, check_fits, make_prompts, prompts_sha256
from llmops.quantity import Quantity

__all__ = ["Block", "Measurement", "block", "measure", "peak_memory"]

WARM_TOKENS = 16
UPDATES_WANTED = 100  # of the sensor in every window: one more or less is 1 %; with less the row warns
UPDATES_SIZED = 200  # what windows of a hardware counter are made to last: two updates of waiting are then at most 1 %
UPDATES_LEAST = 3  # of an estimate, whose ticks are not its largest error
IDLE_S = 10.0  # idle power of a hardware counter, where the options don't say how long


@dataclass(frozen=True)
class Block:
    """One arm's turn: its timings, and the joules of its two windows."""

    arm: str
    batch: int
    repeat: int
    requests: list[Timing]
    wall_s: float
    energy: Quantity
    prefills: int
    prefill_wall_s: float
    prefill_energy: Quantity
    parts: dict[str, Quantity] = field(default_factory=dict)  # of `energy`, by GPU, CPU or memory


@dataclass
class Measurement:
    """Groups of a row (`latency`, `energy`, `workload`), what a reader must know, and the blocks behind them."""

    latency: dict[str, Any] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


def measure(variant: Any, base: Any | None, tokenizer: Any, options: MeasureOptions, meter: Meter, seed: int,
            progress: Callable[[int, int], None] | None = None) -> Measurement:
    """Measure `variant` against `base` (both loaded, on the meter's device); base None: the variant against itself.

    Raises LlmopsError when prompt and new tokens do not fit the context of either model, or when somebody else measures
    here and `exclusive` was asked for. Neither model is changed.
    `progress(done, total)` is called after every block.
    """
    arms = {"variant": variant, "base": variant if base is None else base}
    for name, model in arms.items():
        check_fits(model, options.prompt_tokens, options.new_tokens, f"the {name} model")
    prompts = make_prompts(list(arms.values()), tokenizer, max(options.batch_sizes), options.prompt_tokens, seed)
    idle_s = options.idle_s if options.idle_s is not None else IDLE_S * (meter.sensor.provenance == "measured")
    result = Measurement(workload={
        "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens,
        "batch_sizes": list(options.batch_sizes), "repeats": options.repeats, "order_seed": seed,
        "prompts_sha256": prompts_sha256(prompts), "window_s": _lasting(options, meter), "idle_s": idle_s,
        "decoding": "greedy, no stop token", "compared_with": "itself (A/A)" if base is None else "base"})
    before = conditions(meter.device)
    with beside(options.exclusive, before.get("gpus")) as others:
        idle_before = _idle_watts(meter, idle_s)
        _blocks(result, arms, prompts, options, meter, seed, progress)
        idle = _mean_watts(idle_before, _idle_watts(meter, idle_s))
    result.workload |= {"conditions": {"before": before, "after": conditions(meter.device)}, "beside": others.found}
    result.warnings += [f"not alone on this machine: {line}" for line in others.found]
    _summarize(result, options, meter, idle, against_itself=base is None)
    return result


def _blocks(result: Measurement, arms: dict[str, Any], prompts: Tensor, options: MeasureOptions, meter: Meter,
            seed: int, progress: Callable[[int, int], None] | None) -> None:
    """Warm up, then the interleaved blocks of every batch size, into `result`."""
    order = random.Random(seed)
    done, whole = 0, 2 * options.repeats * len(options.batch_sizes)
    with _evaluating(arms.values()), torch.inference_mode():
        runners = {name: Runner(model, options.new_tokens) for name, model in arms.items()}
        for batch in options.batch_sizes:
            for runner in runners.values():
                runner.request(prompts[:batch].to(runner.device), min(options.new_tokens, WARM_TOKENS))
            for repeat in range(options.repeats):
                for name in order.sample(["base", "variant"], 2):
                    prompt = prompts[:batch].to(runners[name].device)
                    result.blocks.append(block(runners[name], prompt, options, meter, name, repeat))
                    done += 1
                    if progress is not None:
                        progress(done, whole)


def peak_memory(model: Any, tokenizer: Any, options: MeasureOptions, seed: int) -> Quantity:
    """Peak memory in bytes of one request at the largest batch size, of this model alone (see `memory.peak`)."""
    check_fits(model, options.prompt_tokens, options.new_tokens, "the model")
    prompts = make_prompts([model], tokenizer, max(options.batch_sizes), options.prompt_tokens, seed)
    with _evaluating([model]), torch.inference_mode():
        runner = Runner(model, options.new_tokens)
        prompt = prompts.to(runner.device)
        with memory.peak(model) as found:
            runner.request(prompt, options.new_tokens)
    return found.quantity


@contextmanager
def _evaluating(models: Any) -> Iterator[None]:
    """Dropout off for the time being."""
    modes = [(model, model.training) for model in models]
    for model, _ in modes:
        model.eval()
    try:
        yield
    finally:
        for model, training in modes:
            model.train(training)


def _lasting(options: MeasureOptions, meter: Meter) -> float:
    """Seconds that a window lasts at least."""
    updates = UPDATES_SIZED if meter.sensor.provenance == "measured" else UPDATES_LEAST
    return max(options.window_s, updates * (meter.sensor.update_period_s or 0.0))


def block(runner: Any, prompt: Tensor, options: MeasureOptions, meter: Meter, arm: str, repeat: int) -> Block:
    """One arm's turn. runner: a `workload.Runner`, or what has its `prefill`, `sync` and `request`."""
    lasting = _lasting(options, meter)
    batch = int(prompt.shape[0])
    prefills = 0
    with meter.window(f"{arm} prefill {batch}", aligned=True) as before:
        if meter.sensor.provenance != "null":  # without energy, prefills alone would tell nothing new
            until = time.perf_counter() + lasting
            while prefills == 0 or time.perf_counter() < until:
                runner.prefill(prompt)
                runner.sync()
                prefills += 1
    requests: list[Timing] = []
    with meter.window(f"{arm} requests {batch}", aligned=True) as window:
        until = time.perf_counter() + lasting
        while not requests or time.perf_counter() < until:
            requests.append(runner.request(prompt, options.new_tokens))
    return Block(arm, batch, repeat, requests, window.wall_s, window.energy, prefills, before.wall_s, before.energy,
                 window.parts)


def _idle_watts(meter: Meter, seconds: float) -> Quantity:
    if seconds <= 0:
        return Quantity.null("W", "idle power was not read (measure.idle_s: 0)")
    with meter.window("idle", aligned=True) as window:
        time.sleep(seconds)
    joules = window.energy
    if joules.value is None:
        return Quantity.null("W", f"idle power: {joules.method}")
    return Quantity(joules.value / window.wall_s, "W", joules.provenance, f"idle for {seconds:g} s: {joules.method}")


def _mean_watts(before: Quantity, after: Quantity) -> Quantity:
    for reading in (before, after):
        if reading.value is None:
            return reading
    assert before.value is not None and after.value is not None
    return Quantity((before.value + after.value) / 2, "W", before.provenance,
                    f"mean of before and after, {before.method}", None, 2)


def _summarize(result: Measurement, options: MeasureOptions, meter: Meter, idle: Quantity,
               against_itself: bool) -> None:
    for batch in options.batch_sizes:
        mine, other = ([block for block in result.blocks if (block.arm, block.batch) == (arm, batch)]
                       for arm in ("variant", "base"))
        tokens = (options.prompt_tokens, options.new_tokens)
        result.latency[str(batch)] = latency_group(mine, other, tokens, against_itself)
        result.energy[str(batch)] = energy_group(mine, other, tokens, idle, against_itself)
        result.warnings += _resolution(mine + other, meter, batch)
    if options.repeats < LEAST_PAIRS:
        result.warnings.append(f"{options.repeats} repeats: with fewer than {LEAST_PAIRS} no difference of speed or "
                               "energy is said to be shown; set measure.repeats")
    result.energy["idle_watts"] = idle.as_dict()


def _resolution(blocks: Sequence[Block], meter: Meter, batch: int) -> list[str]:
    period = meter.sensor.update_period_s
    if meter.sensor.provenance == "null" or period is None:
        return []
    shortest = min(min(block.wall_s, block.prefill_wall_s) for block in blocks)
    if shortest >= UPDATES_WANTED * period:
        return []
    return [f"batch {batch}: the shortest energy window lasted {shortest:.2g} s, {shortest / period:.0f} updates of "
            f"{meter.sensor.name} (one each {period:g} s); set measure.window_s to {UPDATES_WANTED * period:g} or more"]

"""The steps that zero single weights: a statistic from the calibration walk, a mask for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from llmops import calibrate
from llmops.build.block_ratios import Ratios, block_ratios
from llmops.build.job import Job, Work, bar, calibrated, calibration
from llmops.errors import LlmopsError
from llmops.methods.prune.magnitude import global_threshold, magnitude_mask
from llmops.methods.prune.options import Magnitude, Masks, Sparsegpt, Wanda
from llmops.methods.prune.patterns import MOST_SILENCED, silenced_rows
from llmops.methods.prune.sparsegpt import Factor, Pruned, factorize, sparsegpt
from llmops.methods.prune.wanda import wanda_mask
from llmops.models import parity
from llmops.models.expert_names import expert_of
from llmops.models.experts import Routing, fuse_experts
from llmops.models.save import save_dense

__all__ = ["magnitude_step", "sparsegpt_step", "wanda_step"]

BY_SIZE = "pruned by size alone"  # what becomes of experts that saw too little


def magnitude_step(job: Job, options: Magnitude) -> Work:
    """By size alone: within each layer, or over all of them."""
    before = parity.sparsity(job.model)[0]
    mask: Callable[[Tensor], Tensor] = partial(magnitude_mask, sparsity=options.sparsity, pattern=options.pattern)
    events = []
    if options.scope == "global":
        if options.pattern != "unstructured":
            raise LlmopsError(f"scope: global with pattern {options.pattern}, which fixes every layer's sparsity; "
                              "expected pattern: unstructured, or scope: layer")
        mask, edge = _global_mask(job, options)
        events = [f"weights up to {edge:.3g} were dropped, in whatever layer"]

    zeroed = _Zeroing()

    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        return zeroed(name, layer.weight, mask(layer.weight))

    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=bar(job))
    return _pruned(job, options, before, [*events, *zeroed.events()])


def _global_mask(job: Job, options: Magnitude) -> tuple[Callable[[Tensor], Tensor], float]:
    """(mask of a layer, in the order of the walk, the size up to which weights go)."""
    layers: list[nn.Linear] = []

    def note(name: str, layer: nn.Linear, _: Tensor | None) -> None:
        layers.append(layer)

    calibrate.walk(job.model, None, "none", note, ignore=options.ignore)

    def weights() -> Iterable[Tensor]:
        return (layer.weight for layer in layers)

    edge, left = global_threshold(weights, options.sparsity)

    def mask(W: Tensor) -> Tensor:
        nonlocal left
        size = W.abs().float()
        ties = (size == edge).flatten()
        dropped = ties & (ties.cumsum(0) <= left)
        left -= int(dropped.sum())
        return (size >= edge) & ~dropped.view(W.shape)

    return mask, edge


def wanda_step(job: Job, options: Wanda) -> Work:
    """By |weight| x activation norm within each row; activations are those that what was pruned before gives."""
    before = parity.sparsity(job.model)[0]
    tokens, routing = calibration(job, options.data, options.length), Routing(options.experts == "all")
    ratios = block_ratios(job, options, tokens)
    zeroed = _Zeroing(most=0)  # each row is ranked by itself: one without weights is a sparsity that rounds to all

    def update(name: str, layer: nn.Linear, x_norm: Tensor | None) -> Tensor:
        share = ratios(name)
        mask = (magnitude_mask(layer.weight, share, options.pattern) if x_norm is None
                else wanda_mask(layer.weight, x_norm, share, options.pattern))
        return zeroed(name, layer.weight, mask)

    calibrate.walk(job.model, tokens, "x_norm", update, ignore=options.ignore, sequential=bool(options.sequential),
                   progress=bar(job), routing=routing)
    return _pruned(job, options, before, [calibrated(tokens), *ratios.events, *routing.events(BY_SIZE)], tokens, ratios)


def sparsegpt_step(job: Job, options: Sparsegpt) -> Work:
    """By what zeroing costs once the others have made up for it, which they do."""
    before = parity.sparsity(job.model)[0]
    tokens, routing = calibration(job, options.data, options.length), Routing(options.experts == "all")
    ratios = block_ratios(job, options, tokens)
    solved: dict[str, Pruned] = {}

    def update(name: str, layer: nn.Linear, H: Factor | None) -> Tensor:
        share = ratios(name)
        if H is None:
            return _Zeroing()(name, layer.weight, magnitude_mask(layer.weight, share, options.pattern))
        weight, solved[name] = sparsegpt(layer.weight, H, share, options.pattern, block=options.block)
        return weight

    def once(H: Tensor) -> Factor:
        """Layers that share an input (q, k and v; gate and up) share its factorisation."""
        return factorize(H, options.pattern, damping=options.damping, order=options.order)

    compute = torch.float32 if job.model.device.type == "cpu" else None
    turns = any(expert_of(name) is not None for name, _ in job.model.named_modules()) \
        if options.sequential is None else options.sequential
    calibrate.walk(job.model, tokens, "hessian", update, ignore=options.ignore, sequential=turns,
                   compute=compute, once=once, progress=bar(job), routing=routing)
    events = [calibrated(tokens), *ratios.events, *_troubles(solved), *routing.events(BY_SIZE)]
    return _pruned(job, options, before, events, tokens, ratios)


def _troubles(solved: dict[str, Pruned]) -> list[str]:
    """One event for each layer whose damping had to be raised, one for all that have inputs never seen."""
    events = _silenced({name: each.silenced for name, each in solved.items()})
    events += [f"{name}: not positive definite with damping {', '.join(f'{value:g}' for value in each.failed)}; solved "
              f"with {each.damping:g}" for name, each in solved.items() if each.failed]
    dead = {name: each.dead for name, each in solved.items() if each.dead}
    if dead:
        events.append(f"{sum(dead.values())} input features of {len(dead)} layers were always zero in the calibration "
                      "data; their weights went first")
    return events


@dataclass
class _Zeroing:
    """Zeroes weights, and counts the rows that it leaves without one. most: share of a layer's rows that may be."""

    most: float = MOST_SILENCED
    silenced: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str, W: Tensor, mask: Tensor) -> Tensor:
        """The weight with plain zeros where the mask is False. Raises LlmopsError as `silenced_rows` does."""
        self.silenced[name] = silenced_rows(W, mask, self.most)
        return W.masked_fill(~mask, 0.0)

    def events(self) -> list[str]:
        return _silenced(self.silenced)


def _silenced(by_layer: Mapping[str, int]) -> list[str]:
    found = {name: count for name, count in by_layer.items() if count}
    worst = sorted(found, key=lambda name: -found[name])[:3]
    return [f"{sum(found.values())} rows of {len(found)} layers kept no weight, so that their outputs are silent: "
            + ", ".join(f"{name} {found[name]}" for name in worst)] if found else []


def _pruned(job: Job, options: Masks, before: int, events: list[str], tokens: Tensor | None = None,
            ratios: Ratios | None = None) -> Work:
    """before: zeros of the parent. Raises LlmopsError where there are no more now."""
    fuse_experts(job.model)
    zeros, total = parity.sparsity(job.model)
    if zeros == before:
        raise LlmopsError(f"sparsity is {options.sparsity:g}, and no weight became zero: {before:,} of {total:,} were "
                          "zero before, and are now; expected a sparsity above the parent's")
    events = [*events, f"{zeros:,} of {total:,} linear weights are zero"]
    pattern = None if options.pattern == "unstructured" else options.pattern
    work = Work(job.model, partial(save_dense, job.model, job.tokenizer, dtype=job.storage),
                parity.Expected(sparsity=min(options.sparsity, zeros / max(1, total)), pattern=pattern,
                                ignore=tuple(options.ignore)), events=events,
                tokens=0 if tokens is None else tokens.numel())
    if ratios is not None:
        work.tokens += ratios.tokens
        work.search = ratios.record
    return work

"""The steps that prune: a statistic from the calibration walk, an update per layer."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from llmops import calibrate
from llmops.build.job import Job, Work, bar, calibrated, calibration
from llmops.methods.prune.depth import even_layers, influential_layers
from llmops.methods.prune.magnitude import magnitude_mask
from llmops.methods.prune.options import Depth, Magnitude, Wanda
from llmops.methods.prune.wanda import wanda_mask
from llmops.models import parity
from llmops.models.arch import decoder_layers, renumber_layers
from llmops.models.experts import Routing, fuse_experts
from llmops.models.save import save_dense

__all__ = ["depth_step", "magnitude_step", "wanda_step"]


def magnitude_step(job: Job, options: Magnitude) -> Work:
    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        return layer.weight * magnitude_mask(layer.weight, options.sparsity, options.pattern)

    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=bar(job))
    return _pruned(job, options.sparsity, [])


def wanda_step(job: Job, options: Wanda) -> Work:
    def update(name: str, layer: nn.Linear, x_norm: Tensor | None) -> Tensor:
        if x_norm is None:
            return layer.weight * magnitude_mask(layer.weight, options.sparsity, options.pattern)
        return layer.weight * wanda_mask(layer.weight, x_norm, options.sparsity, options.pattern)

    tokens, routing = calibration(job, options.data, options.length), Routing(options.experts == "all")
    calibrate.walk(job.model, tokens, "x_norm", update, ignore=options.ignore, progress=bar(job), routing=routing)
    work = _pruned(job, options.sparsity, [calibrated(tokens), *routing.events("pruned by size alone")])
    work.tokens = tokens.numel()
    return work


def _pruned(job: Job, sparsity: float, events: list[str]) -> Work:
    fuse_experts(job.model)
    zeros, total = parity.sparsity(job.model)
    events = [*events, f"{zeros:,} of {total:,} linear weights are zero"]
    return Work(job.model, partial(save_dense, job.model, job.tokenizer, dtype=job.storage),
                parity.Expected(sparsity=min(sparsity, zeros / max(1, total))), events=events)


def depth_step(job: Job, options: Depth) -> Work:
    _, layers = decoder_layers(job.model)
    events, tokens = [], 0
    if isinstance(options.layers, list):
        keep = sorted(options.layers)
    elif options.choose == "block_influence":
        crops = calibration(job, str(options.data), options.length)
        scores = calibrate.block_influence(job.model, crops, progress=bar(job))
        keep, tokens = influential_layers(scores, options.layers), crops.numel()
        events = [calibrated(crops), "block influence: " + ", ".join(f"{score:.3f}" for score in scores)]
    else:
        keep = even_layers(len(layers), options.layers)
    model = renumber_layers(job.model, keep)
    events.append(f"kept layers {', '.join(map(str, keep))} of {len(layers)}")
    return Work(model, partial(save_dense, model, job.tokenizer, dtype=job.storage),
                parity.Expected(layers=len(keep)), tokens=tokens, events=events)

"""The sparsity of each decoder block of a step: the same, by its outliers, or by what pruning it alone was found to do.

Both measurements look at the unpruned model, once: the norms of what every linear layer sees. The sensitivity of a
block is then measured with Wanda's masks, whatever the step's own method: one swap a block and sparsity, each mask made
when it is needed and let go, so that no copies of weights are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmops import calibrate, swaps
from llmops.build.job import Job, bar
from llmops.errors import LlmopsError
from llmops.methods.prune.magnitude import magnitude_mask
from llmops.methods.prune.options import MeasuredMasks
from llmops.methods.prune.ratios import grid_around, outlier_share, owl_ratios, solve_ratios
from llmops.methods.prune.wanda import wanda_mask
from llmops.methods.quantize.sensitivity import divergence
from llmops.models.arch import decoder_layers
from llmops.models.experts import Routing

__all__ = ["Ratios", "block_ratios"]

CROPS = 16  # that divergences are measured on: one forward pass a block and sparsity


@dataclass(frozen=True)
class Ratios:
    """Sparsity by layer name. blocks: by the path of a decoder block; record: for the row; tokens: run to measure."""

    average: float
    blocks: Mapping[str, float] = field(default_factory=dict)
    events: Sequence[str] = ()
    record: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0

    def __call__(self, name: str) -> float:
        return next((share for block, share in self.blocks.items() if name.startswith(f"{block}.")), self.average)


@dataclass(frozen=True)
class _Masked:
    """What a layer would become, made when asked for."""

    layer: nn.Linear
    x_norm: Tensor | None
    sparsity: float

    def dequantize(self) -> Tensor:
        W = self.layer.weight.detach()
        mask = (magnitude_mask(W, self.sparsity) if self.x_norm is None
                else wanda_mask(W, self.x_norm.to(W.device), self.sparsity))
        return W.masked_fill(~mask, 0.0)


def block_ratios(job: Job, options: MeasuredMasks, tokens: Tensor) -> Ratios:
    """Raises LlmopsError for ratios with a pattern, whose sparsity is fixed."""
    if options.ratios == "uniform":
        return Ratios(options.sparsity)
    if options.pattern != "unstructured":
        raise LlmopsError(f"ratios: {options.ratios} with pattern {options.pattern}, which fixes every block's "
                          "sparsity; expected pattern: unstructured, or ratios: uniform")
    layers, norms = _seen(job, options, tokens)
    path, blocks = decoder_layers(job.model)
    inside = {f"{path}.{i}": [name for name in layers if name.startswith(f"{path}.{i}.")] for i in range(len(blocks))}
    inside = {block: names for block, names in inside.items() if names}
    sizes = [sum(layers[name].weight.numel() for name in names) for names in inside.values()]
    make: Callable[..., tuple[list[float], dict[str, Any], int]] = {"owl": _owl, "sensitivity": _measured}[
        options.ratios]
    found, record, run = make(job, options, tokens, layers, norms, list(inside.values()), sizes)
    chosen = dict(zip(inside, found, strict=True))
    told = f"sparsity by block ({options.ratios}): " + " ".join(f"{share:.3f}" for share in found)
    return Ratios(options.sparsity, chosen, [told], {"ratios": options.ratios, "blocks": chosen, **record},
                  tokens.numel() + run)


def _seen(job: Job, options: MeasuredMasks,
          tokens: Tensor) -> tuple[dict[str, nn.Linear], dict[str, Tensor | None]]:
    """(layer, norm of each of its inputs) by name, in the unpruned model."""
    layers: dict[str, nn.Linear] = {}
    norms: dict[str, Tensor | None] = {}

    def note(name: str, layer: nn.Linear, x_norm: Tensor | None) -> None:
        layers[name], norms[name] = layer, x_norm

    calibrate.walk(job.model, tokens, "x_norm", note, ignore=options.ignore, progress=bar(job),
                   routing=Routing(options.experts == "all"))
    return layers, norms


def _owl(job: Job, options: MeasuredMasks, tokens: Tensor, layers: Mapping[str, nn.Linear],
         norms: Mapping[str, Tensor | None], blocks: Sequence[Sequence[str]],
         sizes: Sequence[int]) -> tuple[list[float], dict[str, Any], int]:
    shares = [outlier_share([_scores(layers[name].weight, norms[name]) for name in names], options.outliers)
              for names in blocks]
    return owl_ratios(shares, sizes, options.sparsity, options.reach), {"outlier_share": shares}, 0


def _scores(W: Tensor, x_norm: Tensor | None) -> Tensor:
    return W.detach().abs().float() * (1.0 if x_norm is None else x_norm.to(W.device))


def _measured(job: Job, options: MeasuredMasks, tokens: Tensor, layers: Mapping[str, nn.Linear],
              norms: Mapping[str, Tensor | None], blocks: Sequence[Sequence[str]],
              sizes: Sequence[int]) -> tuple[list[float], dict[str, Any], int]:
    grid = grid_around(options.sparsity, options.reach)
    tried = [{name: _Masked(layers[name], norms[name], share) for name in names} for names in blocks for share in grid]
    crops = tokens[:CROPS]
    compute = torch.float32 if job.model.device.type == "cpu" else None
    scores = swaps.swap_scores(job.model, crops, tried, divergence, compute=compute, progress=bar(job))
    costs = [scores[first:first + len(grid)] for first in range(0, len(scores), len(grid))]
    return (solve_ratios(costs, grid, sizes, options.sparsity),
            {"grid": grid, "divergence": costs, "unit": "nats a token", "crops": list(crops.shape)}, crops.numel())

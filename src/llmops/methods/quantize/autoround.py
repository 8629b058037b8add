"""AutoRound: learn which way to round by signed gradient descent (Cheng et al. 2023, arXiv 2309.05516).

To the nearest code is not the best way to round once the errors of many weights meet in one output. Every weight gets
an offset that can turn its rounding, every group a factor for its range, and both follow the sign of the gradient of
what the whole decoder block gets wrong (eqs. 3 to 5):

    W~ = s (clamp(round(W / s + V) + z) - z)        V in [-1/2, 1/2], one a weight
    s from the range [beta min W, alpha max W]      alpha, beta in [0, 1], one a group (one for both if symmetric)
    theta <- theta - lr_t sign(dL / d theta)        lr_t = (1 - t / T) / T, so that no V can travel farther than 1/2

The gradient passes `round` as if it were not there. Many iterates are noise, so the best is kept, not the last.

    paper   here             paper          here
    V       V                alpha, beta    high, low
    T       iterations       L              loss(weights, batch)

Deliberate differences: the ranges start where a search over each group leaves the least squared error, not at the
whole range: at 3 and 2 bits alpha would have far to go. What is tuned is what is stored, to the bit (scales rounded to
their dtype inside the iteration, integer zero points); iterates are judged on all calibration batches, the first
(`rtn` with its clip searched) included, so the result is never worse than that on them. A weight of zero stays zero,
whatever its V.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmops.errors import LlmopsError, StepError
from llmops.methods.quantize.grid import Grid, check, fit, grid_between, grouped
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["Tuned", "autoround"]

Loss = Callable[[Mapping[str, Tensor], int], Tensor]


@dataclass(frozen=True)
class Tuned:
    """What happened. start, best: mean loss over all batches of the first iterate and the one kept; iterate: which."""

    start: float
    best: float
    iterate: int


def autoround(weights: Mapping[str, Tensor], loss: Loss, batches: int, *, bits: int, group_size: int = -1,
              symmetric: bool = True, iterations: int = 200, looks: int = 5, seed: int = 0,
              dtype: torch.dtype | None = None,
              schemes: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[dict[str, QuantizedWeight], Tuned]:
    """Quantize all `weights` (out, in) of a block together.

    loss: (weights by name, float32; which of the `batches`) -> scalar that can be differentiated by the weights;
    schemes: bits, group_size and symmetric of single weights, by name, in place of the ones for all;
    looks: how often the mean over all batches is taken on the way; dtype: of the stored scale.
    Cost: `iterations` forward and backward passes, and looks x batches forward ones. Raises LlmopsError as `rtn` does,
    StepError when the loss is NaN.
    """
    if not weights or batches < 1 or iterations < 0:
        raise LlmopsError(f"given {len(weights)} weights, {batches} batches and {iterations} iterations; expected at "
                          "least one weight and one batch, and 0 iterations or more")
    for_all = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    layers = {name: _Layer(W, dtype=dtype or W.dtype, **{**for_all, **(schemes or {}).get(name, {})})
              for name, W in weights.items()}

    def mean() -> float:
        with torch.no_grad():
            rounded = {name: layer.rounded() for name, layer in layers.items()}
            value = sum(float(loss(rounded, batch)) for batch in range(batches)) / batches
        if value != value:
            raise StepError("the loss of the block is NaN; expected finite calibration activations")
        return value

    start = best = mean()
    kept, iterate = {name: layer.stored() for name, layer in layers.items()}, 0
    draw = random.Random(seed)
    every = max(1, iterations // max(1, looks))
    for t in range(iterations):
        _move(layers, loss, draw.randrange(batches), (1 - t / iterations) / iterations)
        if (t + 1) % every == 0 or t + 1 == iterations:
            value = mean()
            if value < best:
                best, iterate = value, t + 1
                kept = {name: layer.stored() for name, layer in layers.items()}
    return kept, Tuned(start, best, iterate)


def _move(layers: Mapping[str, _Layer], loss: Loss, batch: int, rate: float) -> None:
    """One signed step of every offset and range."""
    with torch.enable_grad():
        value = loss({name: layer.rounded() for name, layer in layers.items()}, batch)
        learned = [tensor for layer in layers.values() for tensor in layer.learned]
        gradients = torch.autograd.grad(value, learned, allow_unused=True)
    with torch.no_grad():
        for tensor, gradient in zip(learned, gradients, strict=True):
            if gradient is not None:
                tensor -= rate * gradient.sign()
        for layer in layers.values():
            layer.V.clamp_(-0.5, 0.5)
            for factor in layer.learned[1:]:
                factor.clamp_(0, 1)


class _Rounded(torch.autograd.Function):  # type: ignore[misc]
    """s clamp(round(W / s + V)), with the gradients of eqs. 3 and 4: `round` passes them, `clamp` where it is idle.

    V, W: (out, groups, group); s: (out, groups, 1). Written out because autograd would keep six tensors of W's size for
    each layer; this keeps one, and the mask.
    """

    @staticmethod
    def forward(ctx: Any, V: Tensor, s: Tensor, W: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
        free = torch.div(W, s).add_(V).round_()
        steps = torch.maximum(torch.minimum(free, top), bottom)
        ctx.save_for_backward(steps, steps == free, s, W)
        return steps * s

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        steps, idle, s, W = ctx.saved_tensors
        passed = gradient * idle
        to_s = (gradient * steps).sum(-1, keepdim=True).sub_((passed * W).sum(-1, keepdim=True).div_(s))
        return passed.mul_(s), to_s, None, None, None


class _Layer:
    """One weight, its offsets V and the factors of its range."""

    def __init__(self, W: Tensor, *, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
        check(W, bits)
        self.G = grouped(W.detach(), group_size).float()
        self.bits, self.group_size, self.symmetric, self.dtype = bits, group_size, symmetric, dtype
        low, high = self.G.amin(-1).clamp(max=0), self.G.amax(-1).clamp(min=0)
        self.low, self.high = (-torch.maximum(-low, high), torch.maximum(-low, high)) if symmetric else (low, high)
        self.V = torch.zeros_like(self.G, requires_grad=True)
        first, whole = (fit(self.G, bits, symmetric, dtype, clip).scale.float() for clip in ("mse", "absmax"))
        self.sign = first.sign()  # of a scale; see `both_ways` of grid.py
        start = (first / whole).abs().clamp(max=1)
        factors = [start.clone().requires_grad_() for _ in range(1 if symmetric else 2)]
        self.learned = [self.V, *factors]  # V, then alpha, then beta

    def grid(self) -> Grid:
        """The grid of the range as it stands."""
        high, low = self._range()
        grid = grid_between(low.detach(), high.detach(), self.bits, self.symmetric, self.dtype)
        return Grid(grid.scale * self.sign.to(self.dtype), grid.zero, grid.bits)

    def _range(self) -> tuple[Tensor, Tensor]:
        high = self.high * self.learned[1]
        return high, -high if self.symmetric else self.low * self.learned[2]

    def rounded(self) -> Tensor:
        """(out, in) float32, exactly what `stored` stands for; gradients pass as if nothing were rounded."""
        grid = self.grid()
        high, low = self._range()
        s = self.sign * (high - low) / ((1 << self.bits) - 1)
        s = (s + (grid.scale.float() - s).detach()).unsqueeze(-1)
        bottom, top = (b.unsqueeze(-1) if isinstance(b, Tensor) else torch.tensor(b) for b in grid.bounds())
        made: Tensor = _Rounded.apply(self.V, s, self.G, bottom, top)
        return made.flatten(1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def stored(self) -> QuantizedWeight:
        """The codes and scales of the iterate as it stands."""
        grid = self.grid()
        bottom, top = (b.unsqueeze(-1) if isinstance(b, Tensor) else torch.tensor(b) for b in grid.bounds())
        exact = self.G / grid.scale.float().unsqueeze(-1) + self.V
        return grid.weight(torch.maximum(torch.minimum(torch.round(exact), top), bottom), self.group_size)

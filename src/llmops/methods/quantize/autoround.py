"""AutoRound: learn which way to round by signed gradient descent (Cheng et al. 2023, arXiv 2309.05516).

To the nearest code is not the best way to round once the errors of many weights meet in one output. Every weight gets
an offset that can turn its rounding, every group a factor for its range, and both follow the sign of the gradient of
what the whole decoder block gets wrong (eqs. 3 to 5):

    W~ = s (clamp(round(W / s + V) + z) - z)        V in [-1/2, 1/2], one a weight
    s from the range [beta min W, alpha max W]      alpha, beta in [0, 1], one a group (one for both if symmetric)
    theta <- theta - lr_t sign(dL / d theta)        lr_t = (1 - t / T) / T, so that no V can travel farther than 1/2

The gradient passes `round` as if it were not there. Many iterates are noise, so the best is kept, not the last.

    paper   here             paper          here
    V       V / UNITS        alpha, beta    high, low
    T       iterations       L              loss(product, batch)

A layer's W~ lives only while it is multiplied with: the backward pass rounds again, which is nothing beside a product,
and takes the signed step there and then, so that neither W~ nor a gradient of more than one layer is ever held; its
products are in bfloat16 where the CPU has instructions for that, since of a gradient only the sign is used. All
that a weight needs is V, which is kept in 16 bits: its steps are counted in 65534ths, rounded so that their sum is that
of the schedule.

Deliberate differences: the ranges start where a search over each group leaves the least squared error, not at the
whole range: at 3 and 2 bits alpha would have far to go. What is tuned is what is stored, to the bit (scales rounded to
their dtype inside the iteration, integer zero points); iterates are judged on all calibration batches, the first
(`rtn` with its clip searched) included, so the result is never worse than that on them. A weight of zero stays zero,
whatever its V.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmops.errors import LlmopsError, StepError
from llmops.methods.quantize.grid import Grid, check, fit, grid_between, grouped
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.ops.float32 import Products, narrower

__all__ = ["UNITS", "Loss", "Product", "Tuned", "autoround", "inputs_of"]

#: (name of a weight, its inputs (..., in)) -> what it makes of them, x W~^T (..., out)
Product = Callable[[str, Tensor], Tensor]
Loss = Callable[[Product, int], Tensor]
AT_ONCE = 1 << 16  # weights that are rounded at once: they stay in a cache
UNITS = 65534  # of V in a step of the grid, from the lower end of its range to the upper one


@dataclass(frozen=True)
class Tuned:
    """What happened. start, best: mean loss over all batches of the first iterate and the one kept; iterate: which."""

    start: float
    best: float
    iterate: int


def autoround(weights: Mapping[str, Tensor], loss: Loss, batches: int, *, bits: int, group_size: int = -1,
              symmetric: bool = True, iterations: int = 200, looks: int = 2, seed: int = 0,
              dtype: torch.dtype | None = None,
              schemes: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[dict[str, QuantizedWeight], Tuned]:
    """Quantize all `weights` (out, in) of a block together.

    loss: (what computes the products of `weights`, by name; which of the `batches`) -> scalar, differentiable;
    schemes: bits, group_size and symmetric of single weights, by name, in place of the ones for all;
    looks: how often the mean over all batches is taken on the way; dtype: of the stored scale.
    Cost: `iterations` forward and backward passes, and looks x batches forward ones; memory beside `weights`: 3 bytes a
    weight, and a few times the largest of them in float32. Raises LlmopsError as `rtn` does, StepError when the loss is
    NaN.
    """
    if not weights or batches < 1 or iterations < 0:
        raise LlmopsError(f"given {len(weights)} weights, {batches} batches and {iterations} iterations; expected at "
                          "least one weight and one batch, and 0 iterations or more")
    for_all = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    layers = {name: _Layer(W, dtype=dtype or W.dtype, **{**for_all, **(schemes or {}).get(name, {})})
              for name, W in weights.items()}

    def product(name: str, x: Tensor) -> Tensor:
        return layers[name].product(x)

    def mean() -> float:
        with torch.no_grad():
            value = sum(float(loss(product, batch)) for batch in range(batches)) / batches
        if value != value:
            raise StepError("the loss of the block is NaN; expected finite calibration activations")
        return value

    start = best = mean()
    kept, iterate = {name: layer.stored() for name, layer in layers.items()}, 0
    draw = random.Random(seed)
    every = max(1, iterations // max(1, looks))
    for t in range(iterations):
        _move(layers, loss, draw.randrange(batches), t, iterations)
        if (t + 1) % every == 0 or t + 1 == iterations:
            value = mean()
            if value < best:
                best, iterate = value, t + 1
                for name, layer in layers.items():  # one by one: the codes before go
                    kept[name] = layer.stored()
    return kept, Tuned(start, best, iterate)


def inputs_of(H: Tensor) -> Tensor:
    """R (in, in) with R^T R = H: inputs that a layer's squared output error has the same mean on as behind H.

    Where H has no full rank, a millionth of its mean diagonal is added, ten times as much until it can be factorised.
    Raises StepError when it cannot.
    """
    H = H.float()
    mean = H.diagonal().mean()
    for power in range(-6, 0):
        A = H.clone()
        A.diagonal().add_(mean * 10.0**power)
        R, info = torch.linalg.cholesky_ex(A, upper=True)
        if int(info) == 0 and bool(R.isfinite().all()):
            return R
    raise StepError("the Hessian of the layer's inputs could not be factorised; expected finite activations")


def _move(layers: Mapping[str, _Layer], loss: Loss, batch: int, t: int, iterations: int) -> None:
    """One signed step of every offset and range whose weight the loss depends on."""
    rate = (1 - t / iterations) / iterations
    units = _travelled(t + 1, iterations) - _travelled(t, iterations)
    with torch.enable_grad():
        anchor = torch.zeros((), requires_grad=True)  # so that the first layers, whose inputs need none, run backward
        loss(lambda name, x: _Rounded.apply(x, anchor.to(x.device), layers[name], rate, units), batch).backward()
    for layer in layers.values():
        layer.settle(rate, units)


def _travelled(t: int, iterations: int) -> int:
    """How far V may be after t steps, in units: their sum, which is just above half of `UNITS` after all of them."""
    return round(UNITS * t * (2 * iterations - t + 1) / (2 * iterations**2))


class _Rounded(torch.autograd.Function):  # type: ignore[misc]
    """x W~^T; the backward pass moves V, alpha and beta of the layer once it was there for all forward ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: _Layer, rate: float, units: int) -> Tensor:
        ctx.save_for_backward(x.bfloat16() if _narrow(x) else x)
        ctx.layer, ctx.rate, ctx.units = layer, rate, units
        layer.waiting += 1
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        layer: _Layer = ctx.layer
        thin = g.to(x.dtype)
        with Products():
            back = (thin @ layer.rounded().to(x.dtype)).to(g.dtype) if ctx.needs_input_grad[0] else None
            forth = (thin.flatten(0, -2).t() @ x.flatten(0, -2)).float()
        layer.gradient = forth if layer.gradient is None else layer.gradient.add_(forth)
        del forth
        layer.waiting -= 1
        if not layer.waiting:
            layer.settle(ctx.rate, ctx.units)
        return back, None, None, None, None


def _narrow(x: Tensor) -> bool:
    """Whether backward products are in bfloat16: only signs count there, and this CPU does twice as many of them."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and narrower()


class _Layer:
    """One weight, its offsets V and the factors of its range."""

    def __init__(self, W: Tensor, *, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
        check(W, bits)
        self.G = grouped(W.detach(), group_size).float()
        self.bits, self.group_size, self.symmetric, self.dtype = bits, group_size, symmetric, dtype
        low, high = self.G.amin(-1).clamp(max=0), self.G.amax(-1).clamp(min=0)
        self.low, self.high = (-torch.maximum(-low, high), torch.maximum(-low, high)) if symmetric else (low, high)
        self.V = torch.zeros_like(self.G, dtype=torch.int16)  # in units: +-32767 are +-1/2
        first = fit(self.G, bits, symmetric, dtype, "mse").scale.float()
        whole = grid_between(self.low, self.high, bits, symmetric, dtype).scale.float()
        self.sign = first.sign()  # of a scale, never 0; see `both_ways` of grid.py
        start = (first / whole).abs().clamp(max=1)
        self.factors = [start.clone() for _ in range(1 if symmetric else 2)]  # alpha, beta
        self.gradient: Tensor | None = None  # dL / dW~ of this step so far
        self.waiting = 0  # forward passes whose backward ones are to come

    def grid(self) -> Grid:
        """The grid of the range as it stands."""
        high = self.high * self.factors[0]
        low = -high if self.symmetric else self.low * self.factors[1]
        grid = grid_between(low, high, self.bits, self.symmetric, self.dtype)
        return Grid(grid.scale * self.sign.to(self.dtype), grid.zero, grid.bits)

    def product(self, x: Tensor) -> Tensor:
        """x W~^T (..., out)."""
        made = self.rounded().to(x.dtype)
        with Products():
            return torch.nn.functional.linear(x, made)

    def pieces(self) -> Iterator[tuple[slice, Tensor, Any, Any]]:
        """(rows, their scales (rows, groups, 1), least and largest step) for a few rows at a time."""
        grid = self.grid()
        s, ends = grid.scale.float().unsqueeze(-1), grid.bounds()
        rows = max(1, AT_ONCE // self.G[0].numel())
        for first in range(0, len(s), rows):
            piece = slice(first, first + rows)
            low, high = (end[piece].unsqueeze(-1) if isinstance(end, Tensor) else end for end in ends)
            yield piece, s[piece], low, high

    def nearest(self, rows: slice, s: Tensor, out: Tensor | None = None) -> Tensor:
        """round(W / s + V) of some rows (rows, groups, group), not clamped."""
        return torch.div(self.G[rows], s, out=out).add_(self.V[rows], alpha=1 / UNITS).round_()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def rounded(self) -> Tensor:
        """(out, in) float32, exactly what `stored` stands for."""
        made = torch.empty_like(self.G)
        for rows, s, low, high in self.pieces():
            self.nearest(rows, s, made[rows]).clamp_(low, high).mul_(s)
        return made.flatten(1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def settle(self, rate: float, units: int) -> None:
        """Move V, alpha and beta against the gradient of W~, if there is one, and drop it.

        With `round` passed as if it were not there (eqs. 3 and 4) dL/dV = s g where nothing was clamped, and dL/ds is
        the sum of g times what a unit of s is worth there: W~ / s, less W / s where nothing was clamped. Of both, and
        of the ranges' gradients, which are dL/ds times high and -low, only the sign counts: |s| may be left out.
        """
        self.waiting = 0
        if self.gradient is None:
            return
        G, self.gradient = self.gradient.view_as(self.G), None
        total = torch.empty_like(self.high)  # dL/ds times |s|
        for rows, s, low, high in self.pieces():
            g, free = G[rows], self.nearest(rows, s)
            steps = free.clamp(low, high)
            free.sub_(steps).abs_().clamp_(max=1)  # 1 where it was clamped: several times faster than a mask
            total[rows] = steps.mul_(g).sum(-1).mul_(s.squeeze(-1))
            g.addcmul_(g, free, value=-1)
            total[rows] -= torch.mul(g, self.G[rows], out=free).sum(-1)
            g.sign_().mul_(-units * self.sign[rows].unsqueeze(-1)).add_(self.V[rows]).clamp_(-(UNITS // 2), UNITS // 2)
            self.V[rows] = g
        for factor, reach in zip(self.factors, (self.high, -self.low), strict=False):
            factor.sub_((total * reach).sign_(), alpha=rate).clamp_(0, 1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def stored(self) -> QuantizedWeight:
        """The codes and scales of the iterate as it stands."""
        grid, codes = self.grid(), torch.empty_like(self.G, dtype=torch.int8)
        for rows, s, low, high in self.pieces():
            steps = self.nearest(rows, s).clamp_(low, high)
            codes[rows] = steps if grid.zero is None else steps.add_(grid.zero[rows].unsqueeze(-1))
        return QuantizedWeight(codes.flatten(1), grid.scale, grid.zero, self.bits, self.group_size)

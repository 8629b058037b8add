"""Fake quantization for training: a latent float weight, seen by the network as its codes will be.

    v = W / s         q = clamp(round(v), low, high)         What = q s

What is what the stored codes dequantize to, bit for bit, so the loss is that of the quantized model. Rounding has a
derivative of zero almost everywhere; training needs another (the straight-through estimator, Bengio et al. 2013, arXiv
1308.3432), and a scale is trained by what rounding and clipping leave over (LSQ, Esser et al. 2019, arXiv 1902.08153,
eq. 3 and 5):

    dWhat/dW  =  1  where round(v) lies within [low, high], else 0
    dWhat/ds  =  q - v  there,  and q (the end of the range) where W is clipped

    paper -> here: v -> W, v_bar -> steps, v_hat -> the result, s -> scale, -Q_N and Q_P -> Grid.bounds()

For language models: LLM-QAT (Liu et al. 2023, arXiv 2305.17888) trains all latent weights with a teacher's logits,
EfficientQAT (Chen et al. 2024, arXiv 2407.11062) trains the scales of all layers end to end.

Deliberate differences. A group has its scale, not a layer. The range ends half a step further out than LSQ's, where
rounding still finds the end code: a latent weight that begins at the last code, as after `quantize` a large part does
at 2 bits, would otherwise be frozen there by the last bit of W / s. The scale is learned as s0 exp(t) with t = 0 at
first (`learned_scale`), so that it keeps its sign and a step of Adam is relative to its size, which is what the factor
1 / sqrt(N Q_P) on LSQ's gradient is for. It is rounded to the type in which it will be stored before it is used, with
the gradient straight through. Zero points stay as they are.

Cost: three passes over W forward, four backward. Kept for backward: W and s, no tensor that is as large as W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmops.methods.quantize.grid import Grid, grouped
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["fake_quantize", "latent_start", "learned_scale", "settle"]

EDGE = 0.499  # of a step: how far from its code a latent weight may begin


def latent_start(weight: QuantizedWeight, near: Tensor | None = None, draw: torch.Generator | None = None) -> Tensor:
    """(out, in) float32: latent weights whose codes are those of `weight`.

    near: (out, in), what was quantized, where it is known: a latent weight begins there if that lies in its cell, and
    else in the middle of the cell (GPTQ rounds against the nearest code with a reason; next to the edge, the first
    updates would undo it). draw: without `near` it begins anywhere in its cell, by a generator on the CPU. With neither
    it begins in the middle, half a step from every other code.
    """
    steps = weight.codes.view(*weight.scale.shape, -1).float()
    if weight.zero_point is not None:
        steps = steps - weight.zero_point.float().unsqueeze(-1)
    scale = weight.scale.float().unsqueeze(-1)
    if near is not None:
        v = near.to(scale.device).float().view_as(steps) / scale
        steps = torch.where((v - steps).abs() <= EDGE, v, steps)
    elif draw is not None:
        steps = steps + EDGE * (2 * torch.rand(steps.shape, generator=draw) - 1).to(steps.device)
    return (steps * scale).view(weight.shape)


def learned_scale(start: Tensor, t: Tensor) -> Tensor:
    """s0 exp(t), (out, groups); exactly s0 at t = 0."""
    return start * torch.exp(t)


def fake_quantize(W: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int,
                  dtype: torch.dtype) -> Tensor:
    """(out, in) float32: what the codes of W will dequantize to. Differentiable once, in W and scale.

    W: (out, in) float32; scale: (out, groups) float32; zero: (out, groups) int8, or None when symmetric; dtype: that
    scales are stored in and weights computed in. Raises LlmopsError when the groups do not come out even.
    """
    grouped(W, group_size)
    return _FakeQuantize.apply(W, scale, zero, bits, dtype)  # type: ignore[no-any-return]


def settle(W: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int,
           dtype: torch.dtype) -> QuantizedWeight:
    """The codes and scales that `fake_quantize` of the same arguments computes with, to be stored."""
    grid = Grid(scale.detach().to(dtype), zero, bits)
    return grid.weight(grid.steps(grouped(W.detach(), group_size)), group_size)


class _FakeQuantize(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, W: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(W, scale, zero)
        ctx.bits, ctx.dtype = bits, dtype
        grid = Grid(scale.to(dtype), zero, bits)
        steps = grid.steps(W.view(*scale.shape, -1))  # (out, groups, group)
        seen = steps.mul_(grid.scale.float().unsqueeze(-1))  # two short significands: exact in float32 until ...
        return seen.to(dtype).float().view_as(W)  # ... this rounding, which is that of the product in `dtype`

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        W, scale, zero = ctx.saved_tensors
        grid = Grid(scale.to(ctx.dtype), zero, ctx.bits)
        low, high = (bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound for bound in grid.bounds())
        v = W.view(*scale.shape, -1) / grid.scale.float().unsqueeze(-1)
        rounded = torch.round(v)
        q = rounded.clamp(low, high)
        inside = q == rounded
        G = G.reshape(v.shape)
        by_scale = None
        if ctx.needs_input_grad[1]:
            by_scale = (G * torch.where(inside, q - v, q)).sum(-1)
        by_weight = (G * inside).view_as(W) if ctx.needs_input_grad[0] else None
        return by_weight, by_scale, None, None, None

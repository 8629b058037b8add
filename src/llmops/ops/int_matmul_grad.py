"""y = x @ dequantize(W).T + bias with a gradient to x, for adapters trained on top of a packed layer.

    forward    y = x W^T           backward    dL/dx = (dL/dy) W          W made from the codes in each, then let go

`int_matmul` has no derivative: torch's packed kernels are not differentiable, and its reference would have autograd
keep the dense weight of every layer until the backward pass. Here nothing but the codes outlives a call, so a model
trains in its packed size, plus one dense layer while it is worked on. W itself has no gradient.

In training x has hundreds of rows, where dequantizing once and one dense product beat the packed kernels, which are
made for a few rows; so both directions compute so whatever kernel the codes are laid out for. That is also exact in
x's precision, where the kernels round x to bfloat16. Cost: one dequantization more than a dense layer, each way.

Shapes: x (..., in); W (out, in); y (..., out).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmops.ops.int_matmul import IntWeight, Prepared, dense

__all__ = ["int_matmul_grad"]


def int_matmul_grad(x: Tensor, prepared: Prepared, weight: IntWeight, name: str, bias: Tensor | None = None) -> Tensor:
    """y (..., out) in x's dtype. name: the kernel that `prepared` is laid out for. Differentiable once, in x."""
    if x.shape[-1] != weight.columns:
        raise ValueError(f"x is {tuple(x.shape)}; expected (..., {weight.columns})")
    return _IntMatmul.apply(x, prepared, weight, name, bias)  # type: ignore[no-any-return]


class _IntMatmul(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, prepared: Prepared, weight: IntWeight, name: str, bias: Tensor | None) -> Tensor:
        ctx.prepared, ctx.weight, ctx.name = prepared, weight, name  # buffers of the layer, held by it anyway
        W, device = dense(prepared, weight, name), x.device.type
        wide = torch.promote_types(x.dtype, W.dtype)
        if torch.is_autocast_enabled(device):
            wide = torch.get_autocast_dtype(device)
        ctx.wide = wide
        return F.linear(x.to(wide), W.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        W = dense(ctx.prepared, ctx.weight, ctx.name)
        return (G.to(ctx.wide) @ W.to(ctx.wide)).to(G.dtype), None, None, None, None

"""The forward and backward pass of LoRA layers as one operation each, to the same gradient.

PEFT computes y = W x + s B (A x) from five operations, with a tensor as large as y between each of the last three, and
autograd mirrors them. With X: (N, in), Y: (N, out), T = X A^T: (N, r), and G = dL/dY, all there is to it is

    Y = X W^T + s T B^T                       dL/dX = G W + s (G B) A
    dL/dB = s G^T T                           dL/dA = s (G B)^T X

The products with r columns are small in FLOPs and slow, since every one of them walks over all of X or G. In float32,
where W + s B A loses nothing that the sum would have kept, the adapter is folded into a passing copy of W instead,

    Y = X W'^T    dL/dX = G W'                W' = W + s B A, made anew in each pass

which leaves T, G B and the two gradients, four thin products of seven, and no pass over Y or G for the addition and
the scale. It costs out x in x r once a pass, which is less than what it saves from about min(in, out) tokens on. In 16
bits W' would round the adapter away; there the sum is taken, in place. Kept for the backward pass: X alone.

`fuse` lays this over PEFT's layers and leaves everything else with PEFT: merging, saving, adapters that are switched
off. What it leaves alone in training too: dropout, DoRA and other variants, masked adapters, quantized bases, layers
with hooks, types that differ between W and A.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llmops.methods.finetune.peft_library import is_lora_layer, library

__all__ = ["fuse", "fused_lora_linear"]


def fused_lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W x + bias + scaling * B A x. x: (..., in); W: (out, in), frozen; A: (r, in); B: (out, r) -> (..., out).

    All of one type. Differentiable once, in x, A and B.
    """
    y: Tensor = _FusedLora.apply(x.reshape(-1, x.shape[-1]), W, bias, A, B, scaling)
    return y.view(*x.shape[:-1], y.shape[-1])


def _folds(X: Tensor, W: Tensor) -> bool:
    return bool(X.dtype == torch.float32 and len(X) >= min(W.shape))


class _FusedLora(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(X, W, A, B)
        ctx.scaling = scaling
        if _folds(X, W):
            return F.linear(X, torch.addmm(W, B, A, alpha=scaling), bias)
        return F.linear(X, W, bias).addmm_(X @ A.t(), B.t(), alpha=scaling)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        X, W, A, B = ctx.saved_tensors
        GB = (G @ B).mul_(ctx.scaling)  # (N, r)
        dX = None
        if ctx.needs_input_grad[0]:
            dX = G @ torch.addmm(W, B, A, alpha=ctx.scaling) if _folds(X, W) else (G @ W).addmm_(GB, A)
        dA = GB.t() @ X if ctx.needs_input_grad[3] else None
        dB = (G.t() @ (X @ A.t())).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return dX, None, None, dA, dB, None


def fuse(adapted: nn.Module) -> int:
    """Let the LoRA layers of a `peft.PeftModel` that can be fused compute by `fused_lora_linear`; how many they are.

    Call it once the adapters are as they will be trained (masks and variants set). Nothing that is saved changes.
    """
    layers = [module for module in adapted.modules() if is_lora_layer(module) and _can_fuse(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _plain() -> Any:
    """PEFT's LoRA on a plain linear layer."""
    return library().tuners.lora.layer.Linear


def _can_fuse(layer: Any) -> bool:
    """A plain LoRA with one adapter on a plain frozen linear layer, whose forward nobody has replaced."""
    base = layer.get_base_layer()
    if type(layer) is not _plain() or type(base) is not nn.Linear or "forward" in {**vars(layer), **vars(base)}:
        return False
    if len(layer.lora_A) != 1 or layer.lora_variant or layer.fan_in_fan_out:
        return False
    name, = layer.lora_A
    plain = type(layer.lora_A[name]) is nn.Linear and type(layer.lora_B[name]) is nn.Linear
    return plain and layer.lora_B[name].bias is None and isinstance(layer.lora_dropout[name], nn.Identity)


def _forward(self: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """The layer's forward: fused where this call is the plain case, PEFT's own otherwise."""
    base, device = self.base_layer, x.device.type
    switched = arguments or named or self.disable_adapters or self.merged or self.active_adapters != [*self.lora_A]
    if switched or any(p.requires_grad for p in base.parameters()) or base._forward_hooks or base._forward_pre_hooks:
        return _plain().forward(self, x, *arguments, **named)  # type: ignore[no-any-return]
    name, = self.lora_A
    given: list[Any] = [x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight]
    if torch.is_autocast_enabled(device):
        given = [None if one is None else one.to(torch.get_autocast_dtype(device)) for one in given]
    if len({one.dtype for one in given if one is not None}) > 1:
        return _plain().forward(self, x)  # type: ignore[no-any-return]
    with torch.autocast(device, enabled=False):
        x, W, bias, A, B = given
        return fused_lora_linear(x, W, bias, A, B, self.scaling[name])

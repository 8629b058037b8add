"""A dense model that rounds the inputs of its layers as their formats will: what a step built, before it is packed.

The parity check holds what was read back against the model in memory. Where a format rounds activations, too, that
model has to do so, or the check would measure the rounding and not the storing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmops.methods.quantize.floats import AnyWeight
from llmops.models.number_formats import activations
from llmops.models.schemes import LayerScheme
from llmops.ops.fp8_matmul import BLOCK, quantize_tokens, widened
from llmops.ops.int8_matmul import quantize_rows

__all__ = ["round_inputs", "rounded"]


def round_inputs(model: nn.Module, weights: Mapping[str, AnyWeight]) -> None:
    """Let each linear layer that `weights` names round its input as the format of its weight says, from now on."""
    for name, weight in weights.items():
        kind = LayerScheme.of(weight).kind
        if kind != "int" and activations(kind) is not None:
            model.get_submodule(name).register_forward_pre_hook(_hook(partial(rounded, kind=kind)))


def rounded(x: Tensor, kind: str) -> Tensor:
    """x (..., in) rounded to int8 or E4M3 and multiplied out again, in its own type."""
    flat = x.reshape(-1, x.shape[-1])
    if kind == "w8a8":
        codes, scale = quantize_rows(flat)
        return (codes.float() * scale).to(x.dtype).view(x.shape)
    codes, scale = quantize_tokens(flat, BLOCK if kind == "fp8-block" else None)
    groups = widened(codes).view(len(flat), scale.shape[1], -1)
    return (groups * scale.unsqueeze(-1)).to(x.dtype).view(x.shape)


def _hook(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (change(args[0]), *args[1:])

"""A dense model whose layers compute as their formats will: what a step built, before it is packed.

The parity check holds what was read back against the model in memory. Where a format rounds activations, too, that
model has to do so as exactly, or the check would measure the rounding: half a bfloat16 step turns codes of 8 bits, and
a turned code is a whole step of them. So here the codes of inputs and weights are multiplied and scaled in the order
that `ops/int8_matmul.py` and `ops/fp8_matmul.py` describe, straight from what the solver returned: nothing is packed,
read or laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmops.methods.quantize.floats import AnyWeight
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models.number_formats import activations
from llmops.ops.fp8_matmul import BLOCK, quantize_tokens
from llmops.ops.int8_matmul import quantize_rows

__all__ = ["imitate", "product"]


def imitate(model: nn.Module, weights: Mapping[str, AnyWeight]) -> None:
    """From now on each linear layer whose format rounds activations computes with rounded ones; others as before."""
    for name, weight in weights.items():
        if weight.kind != "int" and activations(weight.kind) is not None:
            model.get_submodule(name).register_forward_hook(_hook(weight))


def product(x: Tensor, weight: AnyWeight) -> Tensor:
    """(tokens, out) float32: x (tokens, in) rounded as the format of the weight says, times the weight."""
    if isinstance(weight, QuantizedWeight):
        codes, scale = quantize_rows(x)
        y = (codes.double() @ weight.codes.to(x.device).double().t()).float()
    elif weight.format == "fp8-block":  # its scales do not leave the sum
        codes, scale = quantize_tokens(x, BLOCK)
        wide = (codes.float().view(len(x), -1, BLOCK) * scale.unsqueeze(-1)).view(x.shape)
        return nn.functional.linear(wide, weight.dequantize(torch.float32).to(x.device))
    else:
        codes, scale = quantize_tokens(x)
        y = nn.functional.linear(codes.float(), weight.codes.to(x.device).float())
    return y * scale * weight.scale.to(x.device).float().view(1, -1)


def _hook(weight: AnyWeight) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        found = product(args[0].reshape(-1, args[0].shape[-1]), weight)
        found = found if layer.bias is None else found + layer.bias.float()
        return found.to(y.dtype).view(y.shape)

    return hook

"""The zeros of a pruned model: where they are, and whether another model still has them.

What was zeroed has to stay zero through training, merging and quantizing, or the pruning was for nothing. A share of
zeros does not show it (rounding makes zeros of its own), so the places are compared: one bit a weight, of every linear
layer by its name. Packed layers count by what their codes stand for, fused experts one by one under the names that they
have when taken apart (`experts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmops.models.arch import is_ignored, routers
from llmops.models.experts import PARTS

__all__ = ["keep_masks", "linear_weights", "lost_zeros", "off_pattern", "zero_bits"]


def linear_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, (out, in)) of every linear layer, packed ones written out, one at a time; neither head nor routers."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside = set(routers(model))
    for name, module in model.named_modules():
        if module is head or name in outside:
            continue
        weight = getattr(module, "weight", None)
        if hasattr(module, "dequantized") and hasattr(module, "in_features"):
            yield name, module.dequantized()
        elif hasattr(weight, "quant_state"):
            from llmops.models.nf4 import dequantized

            yield name, dequantized(module)
        elif isinstance(module, nn.Linear) and weight is not None:
            yield name, weight.detach()
        elif all(getattr(module._parameters.get(part), "ndim", 0) == 3 for part in PARTS):
            yield from _fused(name, module)


def _fused(path: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    for part, names in PARTS.items():
        for number, weight in enumerate(getattr(module, part).detach()):
            for name, piece in zip(names, weight.chunk(len(names)), strict=True):
                yield f"{path}.{number}.{name}", piece


def zero_bits(model: nn.Module) -> dict[str, Tensor]:
    """{name: bits, packed into bytes, 1 where a weight is zero} of every linear layer that has zeros, on the CPU."""
    found = {}
    for name, weight in linear_weights(model):
        zero = weight == 0
        if bool(zero.any()):
            found[name] = torch.from_numpy(np.packbits(zero.cpu().numpy()))
    return found


def keep_masks(held: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """{name: (out, in) bool, False where a weight has to stay zero} of those layers of `shapes` that hold zeros."""
    return {name: ~_unpacked(held[name], shape) for name, shape in shapes.items() if name in held}


def _unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().view(*shape)


def lost_zeros(model: nn.Module, held: Mapping[str, Tensor]) -> tuple[int, int, str]:
    """(zeros of `held` that the model lacks, all of `held`, the first layer that lacks some). held: of `zero_bits`.

    A layer that the model does not have any more counts as lost.
    """
    lost, total, first = 0, 0, ""
    left = dict(held)
    for name, weight in linear_weights(model):
        bits = left.pop(name, None)
        if bits is None:
            continue
        zero = _unpacked(bits, weight.shape)
        gone = int((weight[zero.to(weight.device)] != 0).sum())
        total, lost, first = total + int(zero.sum()), lost + gone, first or (name if gone else "")
    for name, bits in left.items():
        count = int(np.unpackbits(bits.numpy()).sum())
        total, lost, first = total + count, lost + count, first or name
    return lost, total, first


def off_pattern(model: nn.Module, pattern: str, ignore: Sequence[str]) -> str:
    """The first layer, but those to ignore, that has fewer than N zeros in some M neighbours; empty when all have."""
    zeros, every = (int(part) for part in pattern.split(":"))
    for name, weight in linear_weights(model):
        if is_ignored(name, ignore):
            continue
        if weight.shape[1] % every or bool(((weight == 0).view(-1, every).sum(1) < zeros).any()):
            return name
    return ""

"""A quantized weight as the four tensors that compressed-tensors' ``pack-quantized`` format stores, and back.

    weight_packed      int32 (out, ceil(in * bits / 32))      codes, a dense bit stream along the input
    weight_scale       dtype of the model (out, groups)
    weight_shape       int64 (2,)                             (out, in): padding bits make the packed width ambiguous
    weight_zero_point  int32 (ceil(out * bits / 32), groups)  asymmetric only; packed along the OUTPUT

The bit stream itself is `llmops.ops.bitstream`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmops.errors import ModelError
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.ops.bitstream import pack_bits, unpack_bits, words

__all__ = ["PARTS", "pack", "unpack"]

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors to store, by the last part of their name."""
    parts = {
        "weight_packed": pack_bits(weight.codes, weight.bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        parts["weight_zero_point"] = pack_bits(weight.zero_point.t().contiguous(), weight.bits).t().contiguous()
    return parts


def unpack(parts: Mapping[str, Tensor], *, bits: int, group_size: int, name: str = "weight") -> QuantizedWeight:
    """The inverse of `pack`. Raises ModelError, naming the layer, when the tensors do not fit together."""
    rows, columns = (int(n) for n in parts["weight_shape"].tolist())
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    groups = 1 if group_size == -1 else columns // group_size
    if packed.shape != (rows, words(columns, bits)) or scale.shape != (rows, groups):
        raise ModelError(f"{name}: packed {tuple(packed.shape)}, scale {tuple(scale.shape)}; expected "
                         f"{(rows, words(columns, bits))} and {(rows, groups)} for {rows} x {columns} weights of "
                         f"{bits} bits in groups of {group_size}. (Old packers padded every word at 3, 5, 6 and 7 "
                         f"bits: quantize such a folder again)")
    zero_point = None
    if "weight_zero_point" in parts:
        zero_point = unpack_bits(parts["weight_zero_point"].t().contiguous(), bits, rows).t().contiguous()
    return QuantizedWeight(unpack_bits(packed, bits, columns), scale, zero_point, bits, group_size)

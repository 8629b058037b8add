"""Weights of 4- and 8-bit floats, and int8 weights for int8 activations, as compressed-tensors stores them, and back.

    int-quantized         weight int8 (out, in); weight_scale (out, 1) in the model's type
    float-quantized       weight float8_e4m3fn (out, in); weight_scale (1,), (out, 1) or (ceil(out / 128), in / 128)
    mxfp4-pack-quantized  weight_packed uint8 (out, in / 2), the even column in the low half of a byte;
                          weight_scale uint8 (out, in / 32), exponents + 127
    nvfp4-pack-quantized  the same bytes; weight_scale float8_e4m3fn (out, in / 16); weight_global_scale float32 (1,)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llmops.errors import ModelError
from llmops.methods.quantize.floats import FLOATS, FloatWeight, scale_shape
from llmops.methods.quantize.weight import QuantizedWeight

__all__ = ["PARTS", "pack_floats", "pack_int8", "unpack_floats", "unpack_int8"]

#: Last parts of the names of a layer's tensors, by the kind of its numbers.
PARTS = {"w8a8": ("weight", "weight_scale"), "mxfp4": ("weight_packed", "weight_scale"),
         "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
         **{f"fp8-{scales}": ("weight", "weight_scale") for scales in ("tensor", "channel", "block")}}


def pack_int8(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors to store of a symmetric 8-bit weight with a scale a row."""
    return {"weight": weight.codes.contiguous(), "weight_scale": weight.scale.contiguous()}


def unpack_int8(parts: Mapping[str, Tensor], name: str = "weight") -> QuantizedWeight:
    """The inverse of `pack_int8`. Raises ModelError, naming the layer, when the tensors do not fit together."""
    codes, scale = parts["weight"], parts["weight_scale"]
    if codes.dtype != torch.int8 or codes.dim() != 2 or scale.shape != (codes.shape[0], 1):
        raise ModelError(f"{name}: weight {codes.dtype} {tuple(codes.shape)}, scale {tuple(scale.shape)}; expected "
                         "int8 (out, in) with a scale (out, 1)")
    return QuantizedWeight(codes, scale, None, 8, -1, activation_bits=8)


def pack_floats(weight: FloatWeight) -> dict[str, Tensor]:
    """The tensors to store, by the last part of their name."""
    if weight.bits == 8:
        return {"weight": weight.codes.contiguous(), "weight_scale": weight.scale.contiguous()}
    parts = {"weight_packed": weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4),
             "weight_scale": weight.scale.contiguous()}
    return parts if weight.global_scale is None else parts | {"weight_global_scale": weight.global_scale}


def unpack_floats(parts: Mapping[str, Tensor], kind: str, name: str = "weight") -> FloatWeight:
    """The inverse of `pack_floats`. kind: one of FLOATS. Raises ModelError when the tensors do not fit together."""
    four = FLOATS[kind].bits == 4
    held = parts["weight_packed" if four else "weight"]
    wanted = torch.uint8 if four else torch.float8_e4m3fn
    if held.dim() != 2 or held.dtype != wanted:
        raise ModelError(f"{name}: {held.dtype} {tuple(held.shape)}; expected {wanted} of 2 dimensions for {kind}")
    rows, columns = held.shape[0], held.shape[1] * (2 if four else 1)
    scale = parts["weight_scale"]
    scale = scale.reshape(1) if kind == "fp8-tensor" and scale.numel() == 1 else scale
    if tuple(scale.shape) != scale_shape(kind, rows, columns):
        raise ModelError(f"{name}: scale {tuple(scale.shape)}; expected {scale_shape(kind, rows, columns)} for "
                         f"{rows} x {columns} weights of {kind}")
    codes = torch.stack((held & 15, held >> 4), -1).view(rows, columns) if four else held
    return FloatWeight(codes, scale, parts.get("weight_global_scale"), kind)

"""The layouts in which integer weights come from and go to other tools, and the one that this toolkit computes with.

A packed layer is kept as compressed-tensors' ``pack-quantized`` stores it (`methods/quantize/packing.py`). Here is how
the others say the same; W is (out, in), b its bits, g the group of an input feature, all codes unsigned:

    gptq       qweight int32 (in*b/32, out): codes, a bit stream along the INPUT; qzeros int32 (groups, out*b/32):
               zero points - 1, packed along the output; scales float16 (groups, out); g_idx int32 (in): the group of
               each input feature. W = scales[g] * (q - (z + 1))
    gptq_v2    the same with the zero points as they are
    awq        4 bits only. qweight int32 (in, out/8), qzeros int32 (groups, out/8): eight codes a word along the
               OUTPUT, nibble k holding column ORDER[k] of the eight; scales float16 (groups, out).
               W = scales[g] * (q - z)
    int-quantized   weight int8 (out, in), weight_scale (out, groups), weight_zero_point int8, all signed

Everything is moved, nothing rounded: codes, zero points and scales are the same integers and floats on both sides.
A zero point in the middle of the range (2^(b-1)) is what "symmetric" means; a layer that has no other gets none.

Two traps. The first layout stores a zero point of 0 as -1, which wraps to the largest code: readers disagree on what
that is (some add without a mask), so it is written as gptq_v2 and refused when read. And a g_idx in another order than
the columns' (dynamic act-order) costs every kernel a gather: such a checkpoint is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmops.errors import LlmopsError, ModelError
from llmops.methods.quantize.float_packing import PARTS as FLOAT_PARTS
from llmops.models.schemes import LayerScheme
from llmops.ops.bitstream import pack_bits, unpack_bits

__all__ = ["COMPRESSED", "GPTQ_BITS", "INTEGERS", "LAYOUTS", "Layout", "as_stored", "foreign_scheme",
           "foreign_schemes", "layout_of", "to_awq", "to_gptq", "zeros_fit_v1"]

Parts = Mapping[str, Tensor]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_BITS = (2, 3, 4, 8)
#: Formats of compressed-tensors, whose config tells the scheme of each layer.
INTEGERS = ("pack-quantized", "int-quantized")
COMPRESSED = (*INTEGERS, "float-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mixed-precision")


# ----------------------------------------------------------------------------------------------- what a config says


def layout_of(block: Mapping[str, Any]) -> str:
    """The name in LAYOUTS of what a `quantization_config` describes. Raises ModelError for what cannot be read."""
    method = str(block.get("quant_method", ""))
    if method == "gptq":
        _gptq_can_be_read(block)
        return "gptq_v2" if block.get("checkpoint_format") == "gptq_v2" else "gptq"
    if method == "awq":
        if block.get("version", "gemm") != "gemm" or int(block.get("bits", 4)) != 4:
            raise ModelError(f"an AWQ checkpoint of version {block.get('version')!r} at {block.get('bits')} bits; "
                             "expected version gemm at 4 bits: the other versions order their words differently")
        return "awq"
    if method == "compressed-tensors" and block.get("format") in COMPRESSED:
        return str(block["format"])
    raise ModelError(f"quantization {method or 'without quant_method'} in format {block.get('format')!r}; expected "
                     f"{', '.join(COMPRESSED)} of compressed-tensors, gptq, or awq: start from the 16-bit model")


def _gptq_can_be_read(block: Mapping[str, Any]) -> None:
    written, bits = block.get("checkpoint_format") or "gptq", int(block.get("bits", 0))
    if written not in ("gptq", "gptq_v2") or bits not in GPTQ_BITS or block.get("pack_dtype", "int32") != "int32":
        raise ModelError(f"a GPTQ checkpoint of format {written!r}, {bits} bits, packed in "
                         f"{block.get('pack_dtype', 'int32')}; expected gptq or gptq_v2 at 2, 3, 4 or 8 bits in int32")


def foreign_schemes(block: Mapping[str, Any], names: Iterable[str]) -> dict[str, LayerScheme]:
    """The scheme of each layer of `names` as the `quantization_config` of a GPTQ or AWQ checkpoint tells it.

    GPTQModel's `dynamic` maps patterns to what differs, the first that matches counts; `-:` before one: those layers
    are dense. Raises ModelError for bits that no kernel here has, and for a packed layer that is said to be dense.
    """
    usual = foreign_scheme(block)
    dynamic: dict[str, dict[str, Any]] = block.get("dynamic") or {}
    found = {}
    for name in names:
        pattern = next((each for each in dynamic if re.match(each.removeprefix("+:").removeprefix("-:"), name)), "")
        said = dynamic.get(pattern) or {}
        scheme = LayerScheme(int(said.get("bits", usual.bits)), int(said.get("group_size") or usual.group_size),
                             bool(said.get("sym", usual.symmetric)))
        if pattern.startswith("-:") or scheme.bits not in GPTQ_BITS:
            raise ModelError(f"{name} is stored packed, and {pattern!r} of `dynamic` in config.json says "
                             f"{'that it is dense' if pattern.startswith('-:') else f'{scheme.bits} bits'}; expected "
                             "2, 3, 4 or 8 bits for it")
        found[name] = scheme
    return found


def foreign_scheme(block: Mapping[str, Any]) -> LayerScheme:
    """The scheme that the `quantization_config` of a GPTQ or AWQ checkpoint gives to its layers unless told."""
    layout = layout_of(block)
    if layout in ("gptq", "gptq_v2"):
        return LayerScheme(int(block["bits"]), int(block.get("group_size") or -1), bool(block.get("sym", True)))
    return LayerScheme(4, int(block.get("group_size") or -1), not block.get("zero_point", True))


# --------------------------------------------------------------------------------------------------------- reading


def _from_gptq(parts: Parts, scheme: LayerScheme, name: str, offset: int = 1) -> dict[str, Tensor]:
    bits, group_size = scheme.bits, scheme.group_size
    rows, columns = parts["qweight"].shape[1], parts["qweight"].shape[0] * 32 // bits
    _plain_groups(parts.get("g_idx"), columns, group_size, name)
    zero = unpack_bits(parts["qzeros"].contiguous(), bits, rows).t()  # (out, groups), signed: stored - 2^(bits-1)
    if offset and zero.numel() and int(zero.max()) == (1 << (bits - 1)) - 1:
        raise ModelError(f"{name}: a zero point of 0 in the first GPTQ layout, where it is stored as -1 and readers "
                         "disagree; expected checkpoint_format gptq_v2, or a symmetric checkpoint")
    return _stored(parts["qweight"].t().contiguous(), parts["scales"], zero + offset, bits, (rows, columns))


def _from_gptq_v2(parts: Parts, scheme: LayerScheme, name: str) -> dict[str, Tensor]:
    return _from_gptq(parts, scheme, name, offset=0)


def _from_awq(parts: Parts, scheme: LayerScheme, name: str) -> dict[str, Tensor]:
    codes = _nibbles(parts["qweight"]).t().contiguous()  # (out, in)
    zero = _nibbles(parts["qzeros"]).t()
    return _stored(pack_bits(codes, 4), parts["scales"], zero, 4, (codes.shape[0], codes.shape[1]))


def _from_int(parts: Parts, scheme: LayerScheme, name: str) -> dict[str, Tensor]:
    weight, scale = parts["weight"], parts["weight_scale"]
    if weight.dtype != torch.int8 or scale.dim() != 2:
        raise ModelError(f"{name}: weight {weight.dtype}, scale {tuple(scale.shape)}; expected int8 with (out, groups)")
    zero = parts.get("weight_zero_point")
    middle = torch.zeros_like(scale, dtype=torch.int8) if zero is None else zero
    return _stored(pack_bits(weight, scheme.bits), scale.t(), middle, scheme.bits, (weight.shape[0], weight.shape[1]))


def _stored(packed: Tensor, scales: Tensor, zero: Tensor, bits: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Parts as they are computed with. scales: (groups, out); zero: (out, groups) int8, signed."""
    parts = {"weight_packed": packed, "weight_scale": scales.t().contiguous(), "weight_shape": torch.tensor(shape)}
    if bool((zero != 0).any()):
        parts["weight_zero_point"] = pack_bits(zero.t().contiguous(), bits).t().contiguous()
    return parts


def _plain_groups(g_idx: Tensor | None, columns: int, group_size: int, name: str) -> None:
    size = columns if group_size == -1 else group_size
    if g_idx is not None and not torch.equal(g_idx.cpu().long(), torch.arange(columns) // size):
        raise ModelError(f"{name}: its g_idx puts input features into groups out of their order (desc_act: true, "
                         "dynamic act-order), which needs a gather at every product; expected groups in the order of "
                         "the columns: quantize again with static groups (desc_act: false), or take the 16-bit model")


def _nibbles(words: Tensor) -> Tensor:
    """int32 (n, out/8) -> int8 (n, out), signed: stored - 8."""
    found = torch.empty(words.shape[0], words.shape[1], 8, dtype=torch.int8)
    for place, column in enumerate(ORDER):
        found[:, :, column] = ((words >> (4 * place)) & 15).to(torch.int8) - 8
    return found.view(words.shape[0], -1)


# --------------------------------------------------------------------------------------------------------- writing


def zeros_fit_v1(zero_point: Tensor, bits: int, rows: int) -> bool:
    """Whether no zero point is 0, the one value that the first GPTQ layout has no place for."""
    return int(unpack_bits(zero_point.t().contiguous(), bits, rows).min()) > -(1 << (bits - 1))


def to_gptq(parts: Parts, scheme: LayerScheme, name: str, *, v2: bool = False) -> dict[str, Tensor]:
    """qweight, qzeros, scales and g_idx of a layer that is stored as `parts`.

    Raises LlmopsError when the bits have no GPTQ layout, or a side of the layer does not fill whole words.
    """
    bits = scheme.bits
    rows, columns = (int(n) for n in parts["weight_shape"].tolist())
    if bits not in GPTQ_BITS:
        raise LlmopsError(f"{bits} bits; GPTQ's layout holds {', '.join(map(str, GPTQ_BITS))}: export to "
                          "compressed-tensors, which holds 2 to 8")
    if rows * bits % 32 or columns * bits % 32:
        raise LlmopsError(f"{name} is {rows} x {columns}, whose {bits}-bit codes do not fill whole 32-bit words, as "
                          "GPTQ's layout wants on both sides: export to compressed-tensors, which pads")
    groups = parts["weight_scale"].shape[1]
    zero = parts.get("weight_zero_point")
    signed = (torch.zeros(groups, rows, dtype=torch.int8) if zero is None
              else unpack_bits(zero.t().contiguous(), bits, rows))
    return {"qweight": parts["weight_packed"].t().contiguous(),
            "qzeros": pack_bits(signed - (0 if v2 else 1), bits),
            "scales": parts["weight_scale"].t().contiguous().to(torch.float16),
            "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups)}


def to_awq(parts: Parts, scheme: LayerScheme, name: str) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a layer that is stored as `parts`. Raises LlmopsError when AWQ cannot hold it."""
    rows, columns = (int(n) for n in parts["weight_shape"].tolist())
    if scheme.bits != 4:
        raise LlmopsError(f"{scheme.bits} bits; AWQ's layout holds 4 alone: export to gptq or compressed-tensors, or "
                          "quantize with scheme: w4a16")
    if rows % 8:
        raise LlmopsError(f"{name} has {rows} outputs; AWQ's layout takes them by eights: export to "
                          "compressed-tensors, which pads")
    zero = parts.get("weight_zero_point")
    signed = (torch.zeros(parts["weight_scale"].shape[1], rows, dtype=torch.int8) if zero is None
              else unpack_bits(zero.t().contiguous(), 4, rows))
    return {"qweight": _words(unpack_bits(parts["weight_packed"], 4, columns).t().contiguous()),
            "qzeros": _words(signed), "scales": parts["weight_scale"].t().contiguous().to(torch.float16)}


def _words(codes: Tensor) -> Tensor:
    """int8 (n, out), signed -> int32 (n, out/8)."""
    eights = (codes.to(torch.int32) + 8).view(codes.shape[0], -1, 8)
    words = torch.zeros(eights.shape[:2], dtype=torch.int32)
    for place, column in enumerate(ORDER):
        words |= eights[:, :, column] << (4 * place)  # the last nibble lands on the sign bit, which is just a bit
    return words


# ------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Layout:
    """How a layer lies in a folder: the part whose name marks it, what may lie beside it, and how to read it.

    needed, optional: last parts of the names of its tensors. read: (parts, scheme, name) -> parts as stored here; None
    when they are that already.
    """

    mark: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Parts, LayerScheme, str], dict[str, Tensor]] | None


LAYOUTS = {
    "pack-quantized": Layout("weight_packed", ("weight_packed", "weight_scale", "weight_shape"), ("weight_zero_point",),
                             None),
    "int-quantized": Layout("weight_scale", ("weight", "weight_scale"), ("weight_zero_point",), _from_int),
    "gptq": Layout("qweight", ("qweight", "qzeros", "scales"), ("g_idx",), _from_gptq),
    "gptq_v2": Layout("qweight", ("qweight", "qzeros", "scales"), ("g_idx",), _from_gptq_v2),
    "awq": Layout("qweight", ("qweight", "qzeros", "scales"), (), _from_awq),
    **{kind: Layout("weight_scale", needed, ("input_global_scale",) if "weight_packed" in needed else (), None)
       for kind, needed in FLOAT_PARTS.items()},  # the scale of 4-bit activations, which are not run, is taken and left
}


def as_stored(parts: Parts, layout: str, scheme: LayerScheme, name: str,
              dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A layer read from any layout, as it is computed with. Scales go to `dtype` where that changes none of them."""
    read = LAYOUTS[layout].read
    if read is None:
        return {part: tensor for part, tensor in parts.items() if part != "input_global_scale"}
    stored = read(parts, scheme, name)
    scale = stored["weight_scale"]
    if dtype is not None and torch.equal(scale.to(dtype).to(torch.float64), scale.to(torch.float64)):
        stored["weight_scale"] = scale.to(dtype)
    return stored

"""y = x @ dequantize(W).T with W kept as packed integers: the op of every weight-only quantized layer, and its choices.

One layer's weight arrives as it is stored: a bit stream of codes, and an `IntWeight` with scales and zero points.
`choose` picks how it will be run, `prepare` lays the codes out for that choice once, and `int_matmul` runs it.

    reference        any bits, groups, device and dtype: unpack and dequantize on the fly, then a plain matmul. Exactly
                     what a runtime computes that dequantizes at load; the dense weight lives only during the call.
    torch:int8pack   CPU, 5 to 8 bits, one symmetric scale a row: torch's own kernel on int8 codes.
    torch:int4pack   CPU, 2 to 4 bits: torch's own kernel on 4-bit slots; groups of 32, 64, 128 or 256.
    triton           CUDA (package `llmops_kernels`): 2 to 8 bits, rows or groups of 32, 64, 128, zero points.
    triton:general   the same for groups of any other size, slower.
    ops, ops:general the same two ops on a device without the kernels: their PyTorch reference, for comparison.

Both CPU kernels want bfloat16 activations. They also accept float32 and float16, correctly and ten to fifty times more
slowly, so x is always cast to bfloat16 first and y back to x's dtype; the price is bfloat16's rounding, a relative
error of about 2e-3. What they cannot take they do not always refuse (int8pack crashes the process when `in` is no
multiple of 16), so `choose` guards every shape. 3- and 2-bit codes run in 4-bit slots, and `describe` says so: their
bytes are saved on disk, not in memory.

A whole-row scale (group -1) is given to int4pack as equal scales of the largest group that divides the row. Left out:
int8 with groups on the CPU (no stock kernel takes it: reference).

Shapes: x (..., in); W (out, in); y (..., out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llmops.errors import LlmopsError, unknown
from llmops.ops.bitstream import pack_bits, unpack_bits
from llmops.ops.int8_matmul import triton_here

__all__ = ["KERNELS", "IntWeight", "Prepared", "choose", "dense", "dequantize", "describe", "int_matmul", "prepare",
           "recover"]

REFERENCE, INT8, INT4, TRITON, OPS = "reference", "torch:int8pack", "torch:int4pack", "triton", "ops"
GENERAL = ":general"  # after TRITON or OPS: groups that the fast op does not take
CHOICES = ("auto", "torch", "triton", "ops", "reference")
TRITON_GROUPS = (32, 64, 128)
INT4_GROUPS = (256, 128, 64, 32)  # what the op takes, largest first


@dataclass(frozen=True)
class IntWeight:
    """What a kernel needs beside the codes. scale: (out, groups); zero_point: packed int32 (words, groups) or None."""

    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int  # -1: one scale a row
    rows: int
    columns: int

    @property
    def group(self) -> int:
        return self.columns if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class Prepared:
    """Codes laid out for one kernel. `codes`, `extra` and `zero` mean what that kernel wants them to mean."""

    codes: Tensor
    extra: Tensor | None
    zero: Tensor | None = None


def choose(rows: int, columns: int, *, bits: int, group_size: int, symmetric: bool, device: str,
           kernel: str = "auto") -> str:
    """The name of the kernel for a weight (rows, columns) on a device type; one of `KERNELS`.

    kernel: "auto" takes the fastest that fits; "torch", "triton" and "reference" force a family, "ops" the ops of
    `llmops_kernels` on any device: kernels on a GPU, what they are checked against elsewhere. Raises LlmopsError when a
    forced family cannot run on the device; a shape that "torch" cannot take falls back to the reference.
    """
    if kernel not in CHOICES:
        raise LlmopsError(unknown("kernel", kernel, CHOICES))
    group = columns if group_size == -1 else group_size
    general = "" if group == columns or group in TRITON_GROUPS else GENERAL
    if kernel == "triton":
        if device != "cuda":
            raise LlmopsError(f"kernel triton on device {device}; it needs a CUDA device. Use auto, torch or reference")
        if not triton_here():
            raise LlmopsError("kernel triton, but triton or llmops_kernels is not installed; install them, or use auto")
        return TRITON + general
    if kernel == "ops":
        return (TRITON if device == "cuda" else OPS) + general
    if kernel == "reference":
        return REFERENCE
    if device == "cuda":
        return TRITON + general if kernel == "auto" and triton_here() else REFERENCE
    if device != "cpu":
        return REFERENCE
    if bits <= 4 and rows % 16 == 0 and _int4_group(group):
        return INT4
    if bits > 4 and group == columns and symmetric and columns % 16 == 0:
        return INT8
    return REFERENCE


def describe(name: str, bits: int) -> str:
    """The kernel's name for people and for the ledger, slots that are wider than the codes admitted."""
    slot = {INT8: 8, INT4: 4, REFERENCE: bits}.get(name, 8 if bits > 4 else 4 if GENERAL in name else bits)
    return name if slot == bits else f"{name} ({bits}-bit codes in {slot}-bit slots)"


def dequantize(packed: Tensor, weight: IntWeight) -> Tensor:
    """packed int32 (out, words) -> (out, in) in the dtype of the scales: (codes - zero_point) * scale."""
    return _dense(unpack_bits(packed, weight.bits, weight.columns), weight)


def dense(prepared: Prepared, weight: IntWeight, name: str) -> Tensor:
    """`dequantize` of codes that are laid out for the kernel `name`."""
    return _dense(KERNELS[name].codes(prepared, weight), weight)


def _dense(codes: Tensor, weight: IntWeight) -> Tensor:
    grouped = codes.view(weight.rows, weight.scale.shape[1], -1).to(weight.scale.dtype)
    zero = _zero_points(weight)
    if zero is not None:
        grouped = grouped - zero.to(weight.scale.dtype).unsqueeze(-1)
    return (grouped * weight.scale.unsqueeze(-1)).view(weight.rows, weight.columns)


def prepare(packed: Tensor, weight: IntWeight, name: str) -> Prepared:
    """Lay packed codes int32 (out, words) out for the kernel `name`, as `choose` gave it; then drop `packed`."""
    return KERNELS[name].prepare(packed, weight)


def int_matmul(x: Tensor, prepared: Prepared, weight: IntWeight, name: str, bias: Tensor | None = None) -> Tensor:
    """y (..., out) = x (..., in) @ dequantized.T + bias, in x's dtype. Raises ValueError when x does not fit."""
    if x.shape[-1] != weight.columns:
        raise ValueError(f"x is {tuple(x.shape)}; expected (..., {weight.columns})")
    flat = x.reshape(-1, weight.columns)
    if flat.shape[0] == 0:
        return x.new_zeros(*x.shape[:-1], weight.rows)
    y = KERNELS[name].run(flat, prepared, weight, bias)
    return y.view(*x.shape[:-1], weight.rows)


def recover(prepared: Prepared, weight: IntWeight, name: str) -> Tensor:
    """The packed codes int32 (out, words) out of a kernel's own layout: the inverse of `prepare`, exact."""
    return pack_bits(KERNELS[name].codes(prepared, weight), weight.bits)


# ---------------------------------------------------------------------------------------------------- reference
def _reference(x: Tensor, prepared: Prepared, weight: IntWeight, bias: Tensor | None) -> Tensor:
    dense = dequantize(prepared.codes, weight)
    wide = torch.promote_types(x.dtype, dense.dtype)
    # The bias goes in with the product, which rounds once; added afterwards it would not match a dense layer's bits.
    return F.linear(x.to(wide), dense.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


# ---------------------------------------------------------------------------------------------------- torch, CPU
def _prepare_int8(packed: Tensor, weight: IntWeight) -> Prepared:
    return Prepared(unpack_bits(packed, weight.bits, weight.columns), None)


def _run_int8(x: Tensor, prepared: Prepared, weight: IntWeight, bias: Tensor | None) -> Tensor:
    scale = weight.scale.view(-1).to(torch.bfloat16)
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), prepared.codes, scale)
    return _with(y.to(x.dtype), bias)


def _with(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _prepare_int4(packed: Tensor, weight: IntWeight) -> Prepared:
    group = _int4_group(weight.group)
    codes = unpack_bits(packed, weight.bits, weight.columns)
    slots: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)
    scale = weight.scale.float()
    zero = _zero_points(weight)
    shift = torch.zeros_like(scale) if zero is None else -zero.float() * scale  # the op: (slot - 8) * scale + shift
    both = torch.stack([scale, shift], dim=-1).repeat_interleave(weight.group // group, dim=1)
    return Prepared(slots, both.transpose(0, 1).to(torch.bfloat16).contiguous())  # (groups, out, 2)


def _run_int4(x: Tensor, prepared: Prepared, weight: IntWeight, bias: Tensor | None) -> Tensor:
    assert prepared.extra is not None
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.to(torch.bfloat16).contiguous(), prepared.codes, _int4_group(weight.group), prepared.extra.to(torch.bfloat16))
    return _with(y.to(x.dtype), bias)


def _codes_int4(prepared: Prepared, weight: IntWeight) -> Tensor:
    """Codes out of the op's private layout, by multiplying unit vectors: integers up to 8 are exact in bfloat16."""
    unit = torch.zeros(weight.columns // 32, weight.rows, 2, dtype=torch.bfloat16)
    unit[..., 0] = 1
    codes = torch.empty(weight.rows, weight.columns, dtype=torch.int8)
    for start in range(0, weight.columns, 256):
        stop = min(start + 256, weight.columns)
        x = torch.zeros(stop - start, weight.columns, dtype=torch.bfloat16)
        x[torch.arange(stop - start), torch.arange(start, stop)] = 1
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, prepared.codes, 32, unit)
        codes[:, start:stop] = y.t().to(torch.int8)
    return codes


def _int4_group(group: int) -> int:
    """The largest group that int4pack takes and that divides `group`; 0 when there is none."""
    return next((size for size in INT4_GROUPS if group % size == 0), 0)


# ---------------------------------------------------------------------------------------------------- llmops_kernels
def _prepare_ops(packed: Tensor, weight: IntWeight) -> Prepared:
    from llmops_kernels.int_linear import pack

    made = pack(unpack_bits(packed, weight.bits, weight.columns), weight.scale, _zero_points(weight), bits=weight.bits,
                group_size=_ops_group(weight))
    return Prepared(made.words, made.scale, made.zero)


def _run_ops(x: Tensor, prepared: Prepared, weight: IntWeight, bias: Tensor | None) -> Tensor:
    import llmops_kernels.int_linear  # noqa: F401 - puts the op into torch.ops

    y: Tensor = torch.ops.llmops.int_linear(_half(x), prepared.codes, prepared.extra, prepared.zero, bias, weight.bits,
                                            _ops_group(weight), weight.rows)
    return y.to(x.dtype)


def _codes_ops(prepared: Prepared, weight: IntWeight) -> Tensor:
    from llmops_kernels.int_linear import unpack

    return unpack(prepared.codes, weight.bits, _ops_group(weight), weight.rows, weight.columns)


def _ops_group(weight: IntWeight) -> int:
    return -1 if weight.group == weight.columns else weight.group


def _half(x: Tensor) -> Tensor:
    """Rows that a kernel takes: 16 bits, elements next to each other."""
    half = x if x.dtype in (torch.float16, torch.bfloat16) else x.to(torch.bfloat16)
    return half if half.stride(-1) == 1 else half.contiguous()


def _prepare_general(packed: Tensor, weight: IntWeight) -> Prepared:
    from llmops_kernels.int_matmul import pack_codes

    return Prepared(pack_codes(unpack_bits(packed, weight.bits, weight.columns), weight.bits), _zero_points(weight))


def _run_general(x: Tensor, prepared: Prepared, weight: IntWeight, bias: Tensor | None) -> Tensor:
    from llmops_kernels.int_matmul import int_matmul as launch

    y = launch(_half(x), prepared.codes, weight.scale, prepared.extra, bits=weight.bits, group_size=weight.group)
    return _with(y.to(x.dtype), bias)


def _codes_general(prepared: Prepared, weight: IntWeight) -> Tensor:
    from llmops_kernels.int_matmul import unpack_codes

    return unpack_codes(prepared.codes, weight.bits, weight.columns)


# ---------------------------------------------------------------------------------------------------- the table
@dataclass(frozen=True)
class _Kernel:
    prepare: Callable[[Tensor, IntWeight], Prepared]
    run: Callable[[Tensor, Prepared, IntWeight, Tensor | None], Tensor]
    codes: Callable[[Prepared, IntWeight], Tensor]


_FAST = _Kernel(_prepare_ops, _run_ops, _codes_ops)
_ANY_GROUP = _Kernel(_prepare_general, _run_general, _codes_general)
KERNELS = {
    REFERENCE: _Kernel(lambda packed, w: Prepared(packed, None), _reference,
                       lambda p, w: unpack_bits(p.codes, w.bits, w.columns)),
    INT8: _Kernel(_prepare_int8, _run_int8, lambda p, w: p.codes),
    INT4: _Kernel(_prepare_int4, _run_int4, _codes_int4),
    TRITON: _FAST, OPS: _FAST, TRITON + GENERAL: _ANY_GROUP, OPS + GENERAL: _ANY_GROUP,
}


def _zero_points(weight: IntWeight) -> Tensor | None:
    """int8 (out, groups), or None."""
    if weight.zero_point is None:
        return None
    return unpack_bits(weight.zero_point.t().contiguous(), weight.bits, weight.rows).t().contiguous()

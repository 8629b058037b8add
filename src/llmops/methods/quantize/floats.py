"""Small floating point formats: what a weight is rounded to when its codes are numbers of 4 or 8 bits with an exponent.

    format        element   scale of                       stored as                       step below the largest weight
    fp8-tensor    E4M3      the whole weight               one number of the model's type  absmax / 448
    fp8-channel   E4M3      a row                          the model's type                absmax / 448
    fp8-block     E4M3      128 rows x 128 columns         the model's type                absmax / 448
    mxfp4         E2M1      32 columns of a row            E8M0, a power of two            see below
    nvfp4         E2M1      16 columns of a row            E4M3, and one float32 for all   absmax / 6

E2M1 holds +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, E4M3 numbers up to 448 (OCP 8-bit Floating Point Specification 1.0); both
round to nearest, ties to an even mantissa, and clamp at the largest. A weight is code * scale, of nvfp4 code * (scale /
global) with global = 448 * 6 / absmax of all that shares it, so that the largest scale is the largest E4M3.

The power of two of mxfp4 (OCP Microscaling Formats 1.0, section 6.3, leaves it to the implementation):

    floor   2^(floor(log2 absmax) - 2), the specification's own example: a largest weight above 6 scales is clamped
    even    the same, but one higher where the largest weight would round to 8 scales (compressed-tensors does this)
    up      2^ceil(log2(absmax / 6)): nothing is clamped, and small weights are rounded more coarsely ("RCEIL")

"even" is the default here by measurement (see LOG.md). Left out: E5M2, zero points, static scales of activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.ops.fp4_matmul import VALUES as E2M1  # by code; the fourth bit is the sign

__all__ = ["BLOCK", "E2M1", "FLOATS", "MXFP4_SCALES", "AnyWeight", "FloatFormat", "FloatGrid", "FloatWeight", "bound",
           "float_between", "round_e2m1", "round_e4m3"]

BLOCK = 128  # rows and columns of a block of fp8-block
E4M3_MAX, E2M1_MAX, E4M3_LEAST = 448.0, 6.0, 2.0**-9
MXFP4_SCALES = ("even", "floor", "up")


@dataclass(frozen=True)
class FloatFormat:
    """bits: of an element; group_size: columns that share a scale, -1 a whole row; rows: how many rows share it, 0 all;
    power: how a scale becomes a power of two (mxfp4); reach: the absmax behind a scale that a whole tensor has, None
    until it is known (`bound`)."""

    name: str
    bits: int
    group_size: int
    rows: int = 1
    power: str = "even"
    reach: float | None = None

    @property
    def ranges(self) -> tuple[float, ...] | None:
        """Fractions of a group's range that a search has to try, the whole first; None where any may do. A power of two
        has few neighbours."""
        return (1.0, 2.0, 0.5) if self.name == "mxfp4" else None

    @property
    def whole(self) -> bool:
        """Whether a number is shared by the whole weight, and by the weights that a server runs with it as one."""
        return self.rows == 0 or self.name == "nvfp4"

    def round(self, ratio: Tensor) -> Tensor:
        """W / scale to the nearest numbers of the element type, float32."""
        return round_e2m1(ratio) if self.bits == 4 else round_e4m3(ratio)


FLOATS = {each.name: each for each in (
    FloatFormat("fp8-tensor", 8, -1, rows=0), FloatFormat("fp8-channel", 8, -1),
    FloatFormat("fp8-block", 8, BLOCK, rows=BLOCK), FloatFormat("mxfp4", 4, 32), FloatFormat("nvfp4", 4, 16))}


@dataclass(frozen=True)
class FloatWeight:
    """Codes and scales of one linear layer's weight.

    codes:        (out, in), float8_e4m3fn, or uint8 of 4 bits: the index in E2M1, and 8 for the sign
    scale:        fp8 in the model's type: (1,), (out, 1) or (ceil(out / 128), in / 128); mxfp4 uint8 (out, in / 32):
                  the exponent + 127; nvfp4 float8_e4m3fn (out, in / 16)
    global_scale: (1,) float32, by which the scales of nvfp4 are divided; None in other formats
    format:       which of FLOATS
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None
    format: str

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        wanted = scale_shape(self.format, rows, columns)
        if tuple(self.scale.shape) != wanted:
            raise ValueError(f"scale is {tuple(self.scale.shape)}; expected {wanted} for {self.format} codes of "
                             f"{(rows, columns)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def kind(self) -> str:
        """What the numbers are."""
        return self.format

    @property
    def bits(self) -> int:
        return FLOATS[self.format].bits

    @property
    def group_size(self) -> int:
        return FLOATS[self.format].group_size

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes on disk, its share of the scales counted."""
        extra = self.scale.numel() * self.scale.element_size() * 8 + (32 if self.global_scale is not None else 0)
        return self.bits + float(extra) / float(self.codes.numel())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in): fp8 in `dtype`, by default that of its scales, as readers multiply it; fp4 always in float32."""
        rows, columns = self.codes.shape
        if self.bits == 8:
            scale = self.scale if dtype is None else self.scale.to(dtype)
            return self.codes.to(scale.dtype) * spread(scale, self.format, rows, columns)
        scale = self.scale.float() if self.global_scale is not None else torch.exp2(self.scale.float() - 127)
        if self.global_scale is not None:
            scale = scale / self.global_scale
        values = torch.tensor((*E2M1, *(-value for value in E2M1)), device=self.codes.device)[self.codes.long()]
        return (values.view(rows, scale.shape[1], -1) * scale.unsqueeze(-1)).view(rows, columns)


AnyWeight = QuantizedWeight | FloatWeight


@dataclass(frozen=True)
class FloatGrid:
    """The numbers that groups of weights are rounded to. Has what `grid.Grid` has, so that every solver takes it.

    stored: (out, groups) float32, the scales as they will be stored, a copy for each row; dtype: what fp8 scales are
    stored in.
    """

    stored: Tensor
    format: FloatFormat
    dtype: torch.dtype

    @property
    def scale(self) -> Tensor:
        """(out, groups) float32: what a code is multiplied by."""
        return self.stored if self.format.name != "nvfp4" else self.stored / self._global()

    def steps(self, G: Tensor) -> Tensor:
        """G / scale on the element type, float32. G: (out, groups, group)."""
        return self.format.round(G / self.scale.unsqueeze(-1))

    def nearest(self, G: Tensor) -> Tensor:
        """The number nearest to each weight, float32. G: (out, groups, group)."""
        return self.steps(G) * self.scale.unsqueeze(-1)

    def pooled(self, error: Tensor) -> Tensor:
        """(out, groups) errors, summed over the rows that share a scale, the sum given to each of them."""
        return _over_rows(error, self.format.rows, "sum")

    def where(self, better: Tensor, other: FloatGrid) -> FloatGrid:
        """This grid where `better` (out, groups), `other` elsewhere."""
        return replace(self, stored=torch.where(better, self.stored, other.stored))

    def part(self, g: int) -> FloatGrid:
        return replace(self, stored=self.stored[:, g:g + 1])

    def joined(self, parts: list[FloatGrid]) -> FloatGrid:
        return replace(self, stored=torch.cat([part.stored for part in parts], 1))

    def rounder(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What writes the steps of W_:j / scale (out,) of a column into a second tensor; of a grid of one group."""
        return lambda ratio, steps: steps.copy_(self.format.round(ratio))

    def weight(self, steps: Tensor, group_size: int) -> FloatWeight:
        """The quantized weight of `steps` (out, groups, group); the format knows its group size itself."""
        name, flat = self.format.name, steps.flatten(1)
        if self.format.bits == 4:
            codes = _e2m1_codes(flat)
            if name == "mxfp4":
                return FloatWeight(codes, (torch.log2(self.stored) + 127).to(torch.uint8), None, name)
            return FloatWeight(codes, self.stored.to(torch.float8_e4m3fn), self._global().reshape(1), name)
        rows = self.format.rows
        scale = (self.stored[:1, 0] if rows == 0 else self.stored[::rows]).clone()
        return FloatWeight(flat.to(torch.float8_e4m3fn), scale.to(self.dtype), None, name)

    def _global(self) -> Tensor:
        assert self.format.reach is not None
        return torch.tensor(E4M3_MAX * E2M1_MAX / max(self.format.reach, 2.0**-100), device=self.stored.device)


def bound(kind: int | FloatFormat, W: Tensor) -> int | FloatFormat:
    """The format with its reach filled in from `W` where it needs one; integers (a number of bits) as they are."""
    if isinstance(kind, int) or not kind.whole or kind.reach is not None:
        return kind
    return replace(kind, reach=float(W.detach().abs().max()))


def float_between(low: Tensor, high: Tensor, kind: FloatFormat, dtype: torch.dtype) -> FloatGrid:
    """The grid over [low, high], (out, groups) float32. dtype: in which an fp8 scale is stored.

    Raises LlmopsError when a scale does not fit that type (float16 ends at 65,504, and below 6e-8).
    """
    size = _over_rows(torch.maximum(-low, high).clamp(min=0), kind.rows, "amax")
    if kind.name == "mxfp4":
        return FloatGrid(_powers(size, kind.power), kind, dtype)
    if kind.name == "nvfp4":
        assert kind.reach is not None, "nvfp4 needs the reach of the whole weight: bound(kind, W)"
        local = size / E2M1_MAX * (E4M3_MAX * E2M1_MAX / max(kind.reach, 2.0**-100))
        return FloatGrid(local.clamp(E4M3_LEAST, E4M3_MAX).to(torch.float8_e4m3fn).float(), kind, dtype)
    if kind.reach is not None:
        size = torch.full_like(size, kind.reach)
    scale = (size / E4M3_MAX).to(dtype)
    if not bool(torch.isfinite(scale).all()):
        raise LlmopsError(f"weights up to {float(size.max()):g} need scales beyond {dtype}; expected smaller weights")
    return FloatGrid(torch.where(scale == 0, torch.finfo(dtype).eps, scale).float(), kind, dtype)


def scale_shape(name: str, rows: int, columns: int) -> tuple[int, ...]:
    """Of the stored scales of a weight (rows, columns)."""
    if name == "fp8-tensor":
        return (1,)
    group = FLOATS[name].group_size
    return -(-rows // FLOATS[name].rows), 1 if group == -1 else columns // group


def spread(scale: Tensor, name: str, rows: int, columns: int) -> Tensor:
    """Stored fp8 scales in a shape that multiplies a weight (rows, columns): for blocks (rows, columns) itself."""
    if name != "fp8-block":
        return scale
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def round_e2m1(x: Tensor) -> Tensor:
    """To the nearest of +-E2M1, ties to an even mantissa, beyond 6 to 6; float32."""
    x = x.float()
    bounds, values = _e2m1(x.device.type)
    nearest = values[torch.bucketize(x.abs().contiguous(), bounds, right=True)]
    return nearest.copysign_(x).add_(0.0)  # 0: no negative zeros


def round_e4m3(x: Tensor) -> Tensor:
    """To the nearest number of float8_e4m3fn, beyond 448 to 448; float32."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() + 0.0


@cache
def _e2m1(device: str) -> tuple[Tensor, Tensor]:
    """(where each next number begins, the numbers). Half way between two it begins if its place is even."""
    values = torch.tensor(E2M1)
    middle = (values[1:] + values[:-1]) / 2
    above = torch.nextafter(middle, torch.tensor(torch.inf))
    return torch.where(torch.arange(7) % 2 == 1, middle, above).to(device), values.to(device)


def _e2m1_codes(values: Tensor) -> Tensor:
    """uint8: index in E2M1, plus 8 for negative ones."""
    index = torch.tensor([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8, device=values.device)
    return index[(values.abs() * 2).long()] | ((values < 0).to(torch.uint8) << 3)


def _powers(size: Tensor, power: str) -> Tensor:
    """2^e for the largest weights `size`; e within what E8M0 and bfloat16 both hold."""
    if power not in MXFP4_SCALES:
        raise LlmopsError(f'unknown rounding of scales "{power}"; expected {", ".join(MXFP4_SCALES)}')
    mantissa, exponent = torch.frexp(size / E2M1_MAX if power == "up" else size)  # size = mantissa 2^exponent, [0.5, 1)
    if power == "up":
        exponent = exponent - (mantissa == 0.5).int()
    else:
        exponent = exponent - 3 + ((mantissa >= 0.875).int() if power == "even" else 0)
    return torch.exp2(exponent.float().clamp(-126, 127))


def _over_rows(values: Tensor, rows: int, how: str) -> Tensor:
    """(out, groups) -> the same with the sum or the largest of every `rows` rows (0: all of them) in each of them."""
    if rows == 1:
        return values
    size = rows or values.shape[0]
    parts = values.split(size)
    reduced = [part.sum(0, keepdim=True) if how == "sum" else part.amax(0, keepdim=True) for part in parts]
    return torch.cat([each.expand(len(part), -1) for each, part in zip(reduced, parts, strict=True)])

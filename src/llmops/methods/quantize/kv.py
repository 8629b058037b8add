"""Keys and values of attention in 8 or 4 bits, with a scale for every token and head.

A vector x of D numbers (one head of one token) is stored as D codes and its own scale, so that nothing has to be
calibrated, and a loud token does not cost its neighbours any precision:

    int8   x ~ s c,      c in -127..127,            s = max|x| / 127
    fp8    x ~ s c,      c in E4M3 (OCP OFP8 1.0),  s = max|x| / 448, the largest E4M3 number
    int4   x R ~ m + s c,  c in 0..15,              m = min(x R), s = (max(x R) - m) / 15

Scale and minimum are bfloat16: the range of float32, and an error that is far below a step of the codes. They are
rounded before the codes are computed, so the codes know of it.

At 4 bits two things pay (LOG.md has the figures); at 8 bits there is nothing to win. The minimum costs two bytes a
vector and takes a third of the squared error away. R is a fixed rotation, a Hadamard matrix with signs (QuaRot:
Ashkboos et al. 2024, arXiv 2404.00456, section 4.3): it shares the few large channels of a key out among all, costs no
byte, and takes away another two fifths. A kernel need not undo it for every token: q.k = (q R).(k R), so it turns the
query and reads the codes as they are, and turns the sum over values back once. KIVI (Liu et al. 2024, arXiv 2402.02750)
takes keys per channel instead, but needs a group of tokens together before the first of them can be stored.

Shapes: x is (..., D), codes (..., D) or (..., D/2), scale and minimum (..., 1); here ... is (batch, heads, tokens).
Left out: groups within a head, static scales.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmops.errors import LlmopsError, unknown

__all__ = ["QuantizedKV", "dequantize_kv", "quantize_kv", "rotation", "round_kv"]

STORED = torch.bfloat16  # of scales and minima


class QuantizedKV(NamedTuple):
    """Keys or values as they are stored; the type of `codes` says how they are read.

    codes: int8; float8_e4m3fn; or uint8 with two of 4 bits each, element i in the low half of byte i and element
    i + D/2 in its high half, so that reading them is two masks and no shuffle.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        return [part for part in self if part is not None]

    def each(self, change: Callable[..., Tensor], *others: QuantizedKV) -> QuantizedKV:
        """change(part, its like in each of `others`) of every part; all have (batch, heads, tokens) in common.

        What moves numbers about need not know E4M3, so it is shown its bytes.
        """
        made = [None if parts[0] is None else change(*map(_bytes, parts)).view(parts[0].dtype)
                for parts in zip(self, *others, strict=True)]
        return QuantizedKV(*made)


def quantize_kv(x: Tensor, dtype: str) -> QuantizedKV:
    """x (..., D), floating -> its codes. dtype: int8, fp8 or int4.

    A vector with NaN or infinity in it does not come back finite: it shows in the score and is not clipped into a
    number. Raises LlmopsError for another dtype, and for int4 with an odd D.
    """
    if dtype not in _QUANTIZE:
        raise LlmopsError(unknown("type of keys and values", dtype, _QUANTIZE))
    return _QUANTIZE[dtype](x.detach().to(torch.promote_types(x.dtype, torch.float32)))


def dequantize_kv(kv: QuantizedKV, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., D): computed in float32 (float64 for that), then rounded to `dtype`.

    4 bits are turned back after that rounding, which adds less than 0.1 % to their squared error in bfloat16, and
    halves the time on a CPU that multiplies it itself.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if kv.minimum is None:
        return _numbers(kv.codes, wide).mul_(kv.scale.to(wide)).to(dtype)
    codes = torch.cat([kv.codes & 15, kv.codes >> 4], dim=-1)
    return _turned(codes.to(wide).mul_(kv.scale.to(wide)).add_(kv.minimum.to(wide)).to(dtype), back=True)


def round_kv(x: Tensor, dtype: str) -> Tensor:
    """x as attention sees it once it has been stored, in its own type. A gradient passes as if nothing had happened
    (straight-through estimator: Bengio et al. 2013, arXiv 1308.3432)."""
    rounded = dequantize_kv(quantize_kv(x, dtype), x.dtype)
    return x + (rounded - x).detach() if x.requires_grad and torch.is_grad_enabled() else rounded


@cache
def rotation(width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(width, width) orthogonal: diag(r) H, in blocks of the largest power of two p that divides the width.

    H_ij = (-1)^popcount(i & j) / sqrt(p) (Sylvester 1867). r_i = (-1)^popcount(i & i/2) (Shapiro 1951, Rudin 1959) is
    as far from all rows of H as can be, so that neither a large channel nor an offset of all ends up in one number.
    """
    with torch.inference_mode(False):  # it is kept, and may be asked for again where gradients are taken
        p = width & -width
        i = torch.arange(p)
        signs = 1.0 - 2.0 * ((_popcount(i[:, None] & i) + _popcount(i & (i >> 1))[:, None]) % 2)
        return torch.block_diag(*[signs / p ** 0.5] * (width // p)).to(device, dtype)


def _popcount(numbers: Tensor) -> Tensor:
    return sum(((numbers >> bit) & 1 for bit in range(16)), torch.zeros_like(numbers)).double()


def _turned(x: Tensor, *, back: bool = False) -> Tensor:
    """x R, or x R^T, in the type of x whatever autocast is on."""
    R = rotation(x.shape[-1], x.device, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return (x.reshape(-1, x.shape[-1]) @ (R.T if back else R)).view(x.shape)


def _int8(x: Tensor) -> QuantizedKV:
    scale = _stored(x.abs().amax(-1, keepdim=True) / 127)
    return QuantizedKV((x / _divisor(scale)).round_().clamp_(-127, 127).to(torch.int8), scale)


def _fp8(x: Tensor) -> QuantizedKV:
    scale = _stored(x.abs().amax(-1, keepdim=True) / 448)
    return QuantizedKV((x / _divisor(scale)).clamp_(-448, 448).to(torch.float8_e4m3fn), scale)  # above 464 it is NaN


def _int4(x: Tensor) -> QuantizedKV:
    width = x.shape[-1]
    if width % 2:
        raise LlmopsError(f"heads of {width} numbers do not fill bytes of two; expected an even head_dim for int4: "
                          "take int8 or fp8")
    x = _turned(x)
    minimum = _stored(x.amin(-1, keepdim=True))
    scale = _stored((x.amax(-1, keepdim=True) - minimum).clamp_min_(0) / 15)
    codes = ((x - minimum) / _divisor(scale)).round_().clamp_(0, 15).to(torch.uint8)
    low, high = codes.split(width // 2, dim=-1)
    return QuantizedKV(low | (high << 4), scale, minimum)


def _bytes(part: Tensor) -> Tensor:
    return part.view(torch.int8) if part.dtype == torch.float8_e4m3fn else part


def _numbers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of 8 bits as numbers. torch converts E4M3 one by one on a CPU; the same bits, moved to where float16 has
    its exponent and mantissa, are 2^8 times too small and take a seventh of the time (the one NaN becomes 480)."""
    if codes.dtype != torch.float8_e4m3fn or codes.device.type != "cpu":
        return codes.to(dtype)
    bits = codes.view(torch.int8).to(torch.int16) << 7  # the sign is extended over bit 14, where it does not belong
    return (bits & ~(1 << 14)).view(torch.float16).to(dtype).mul_(256)


def _stored(numbers: Tensor) -> Tensor:
    return numbers.to(STORED)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0: all codes are then 0, and so is what they stand for (beside a minimum)."""
    wide = scale.float()
    return wide.masked_fill_(wide == 0, 1.0)


_QUANTIZE: dict[str, Callable[[Tensor], QuantizedKV]] = {"int8": _int8, "fp8": _fp8, "int4": _int4}

"""How a row of float32 numbers becomes codes and a scale: the device functions that every quantizing kernel shares.

    int8   s = max(absmax, 2^-80) / 127     a = round(v / s), to even at ties
    fp8    s = absmax / 448, 1 for zeros    a = v / s to the nearest E4M3, ties to even

Codes and scales are bit for bit those of the reference: every division is rounded correctly. IEEE division costs a
branch and a call per number on a GPU, so a row's reciprocal is divided once and each quotient corrected (Markstein):

    q = v * inv      r = v - q s, exact in one fma      v / s = q + r * inv, rounded to nearest

which holds wherever 1 / s is a normal number; hence fp8's absmax counts as 2^-80 at the least too. Rounding to an
integer adds 1.5 * 2^23, after which the low byte of the sum *is* the code: no conversion (I2F and F2I run at a quarter
of the rate).

The largest of a row is found on the bits of |v|, which as integers order as the numbers do, with NaN above infinity:
a NaN in a row makes its scale NaN and so all that is computed from it, where the maximum of floats would lose it.

A row is laid out (GROUPS, 128): the same loads as a flat row, and a scale for 128 columns is a maximum along the
second axis.
"""

from __future__ import annotations

from ._interpret import INTERPRET
from ._triton import tl, triton

__all__ = ["GROUP", "WIDEST", "codes_of", "quantized", "row_columns", "scale_of", "tiles_of", "top_of"]

GROUP = 128  # columns that share a scale where a row has several
WIDEST = 16384  # columns that one program holds at a time
LANES = tl.constexpr(GROUP)
LEAST = tl.constexpr(2.0**-80)
SHIFT = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def row_columns(start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(BLOCK / 128, 128): the columns from `start` on."""
    return start + tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def top_of(v, axis: tl.constexpr):  # type: ignore[no-untyped-def]
    """max |v| along an axis, all of v for None; NaN where there is one."""
    return tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def scale_of(top, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of numbers whose largest is `top`."""
    least = tl.where(top < LEAST, LEAST, top)  # a NaN stays
    if FP8:
        return tl.where(top == 0.0, 1.0, tl.math.div_rn(least, 448.0))
    else:
        return tl.math.div_rn(least, 127.0)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def codes_of(v, s, FP8: tl.constexpr):  # type: ignore[no-untyped-def]
    """v / s as codes; s broadcasts against v."""
    if INTERPRET:
        q = tl.math.div_rn(v, s)  # its fma rounds twice
    else:
        inverse = tl.math.div_rn(1.0, s)
        q = v * inverse
        q = tl.fma(tl.fma(-q, s, v), inverse, q)
    if FP8:
        if INTERPRET:
            q = _on_e4m3(q)
        return q.to(tl.float8e4nv)
    else:
        return (q + SHIFT).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _on_e4m3(q):  # type: ignore[no-untyped-def]
    """q rounded to the E4M3 grid in float32, for the interpreter, whose own conversion is wrong in 1 to 7 %."""
    kept = tl.minimum(tl.abs(q), 448.0)
    bits = kept.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)  # 3 bits of mantissa
    grid = 1.5 * 2.0**14  # its neighbours are 2^-9 apart, which is E4M3's least step
    made = tl.where(kept < 2.0**-6, (kept + grid) - grid, normal).to(tl.int32, bitcast=True)
    sign = (q.to(tl.int32, bitcast=True) >> 31) << 31  # of a zero, too
    return tl.where(q == q, (made | sign).to(tl.float32, bitcast=True), q)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def quantized(v, q_at, s_at, columns, W, BLOCK: tl.constexpr, FP8: tl.constexpr,  # type: ignore[no-untyped-def]
              GROUPED: tl.constexpr):
    """Store codes at `q_at + columns` and the scale(s) of v, (BLOCK / 128, 128) with zeros past W.

    s_at: where the row's scale goes, or that of the first group of v.
    """
    if GROUPED:
        s = scale_of(top_of(v, 1), FP8)
        group = tl.arange(0, BLOCK // LANES)
        tl.store(s_at + group, s, mask=tl.min(columns, axis=1) < W)
        tl.store(q_at + columns, codes_of(v, s[:, None], FP8), mask=columns < W)
    else:
        s = scale_of(top_of(v, None), FP8)
        tl.store(s_at, s)
        tl.store(q_at + columns, codes_of(v, s, FP8), mask=columns < W)


def tiles_of(columns: int, inputs: int = 1) -> dict[str, int]:
    """BLOCK and num_warps for rows of `columns`: 32 numbers a thread, fewer where a kernel holds several inputs."""
    block = max(GROUP, min(WIDEST, triton.next_power_of_2(columns)))
    return {"BLOCK": block, "num_warps": max(1, min(16, block * inputs // 1024))}

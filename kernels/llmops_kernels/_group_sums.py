"""Zero points outside the loop over the weights.

Of y = sum_g s_g (u_g - z_g) @ x_g the loop sums only s_g (u_g @ x_g). The rest, sum_g s_g z_g X_g with X_g the sum of a
group's activations, is a product as large as the scales, 1 / group of the layer, and is taken off where the parts of a
split matmul are added, which has to happen anyway:

    add_up    at its end each program of the layer sums some groups of its own part of x: all of them together do it
              once, in float32, where a program alone would sum 16 / BLOCK_N of what it multiplies
    join      y = the parts in order - X @ (s (z + offset)).T + bias, on the tensor cores

Both factors are cut into bf16 numbers whose sum they are: X into three (24 bits), s (z + offset) into two, which holds
what a scale of 8 bits times a zero point of 8 has. Without zero points the scales are one, as they are.

What it costs is one more reading of the scales, 2 / group of the bytes of an 8-bit weight and mostly out of the L2
cache (zero points are read here in place of there), and few instructions: docs/kernels.md counts them.

Shapes: sums (3, M, G) bf16, G groups of a row (of one scale a row: of its chunks); the others as in `int_linear`.
"""

from __future__ import annotations

from torch import Tensor

from ._interpret import dot, narrow
from ._triton import tl, triton

__all__ = ["add_up", "join", "join_kernel"]


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def add_up(x_ptr, sums_ptr, M, K, stride_xm, rm, begin, end, step,  # type: ignore[no-untyped-def]
           SIZE: tl.constexpr):
    """sums[:, rm, g] = x[rm, SIZE columns from g * SIZE] added up, for g = begin, begin + step, ... below end."""
    groups = tl.cdiv(K, SIZE)
    row = rm.to(tl.int64)
    for group in tl.range(begin, end, step, num_stages=1):
        columns = group * SIZE + tl.arange(0, SIZE)
        some = tl.load(x_ptr + row[:, None] * stride_xm + columns[None, :],
                       mask=(rm[:, None] < M) & (columns[None, :] < K), other=0.0)
        left = tl.sum(some.to(tl.float32), 1)
        for plane in tl.static_range(3):
            cut = left.to(tl.bfloat16)
            tl.store(sums_ptr + (row + plane * M) * groups + group, cut, mask=rm < M)
            left -= cut.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def join_kernel(parts_ptr, sums_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, M, N, groups,  # type: ignore[no-untyped-def]
                stride_scale, stride_ym, PARTS: tl.constexpr, NEAR: tl.constexpr, ROWS: tl.constexpr,
                ZERO: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """A (BLOCK_M, BLOCK_N) tile of y. stride_scale: scales of a tile of rows; ROWS: one scale a row, for all groups."""
    CUT: tl.constexpr = ZERO or scale_ptr.dtype.element_ty != tl.bfloat16
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = rm.to(tl.int64)
    tile = (rn // TILE).to(tl.int64) * stride_scale + (rn % TILE) * NEAR
    less = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in tl.range(0, groups, BLOCK_G):
        group = begin + tl.arange(0, BLOCK_G)
        there = group < groups
        at = tile[:, None] + (group * 0 if ROWS else group // NEAR * (NEAR * TILE) + group % NEAR)[None, :]
        factor = tl.load(scale_ptr + at, mask=there[None, :], other=0.0)  # (BLOCK_N, BLOCK_G)
        if ZERO:
            points = tl.load(zero_ptr + at, mask=there[None, :], other=0)
            factor = factor.to(tl.float32) * (points.to(tl.float32) + OFFSET)
        if CUT:
            high = factor.to(tl.bfloat16)
            low = (factor.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16)
        else:
            high = factor
        for plane in tl.static_range(3):
            X = tl.load(sums_ptr + (row + plane * M)[:, None] * groups + group[None, :],
                        mask=(rm[:, None] < M) & there[None, :], other=0.0)
            less = dot(X, high.T, less)
            if CUT and plane < 2:
                less = dot(X, low.T, less)
    here = (rm[:, None] < M) & (rn[None, :] < N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + (row + part * M)[:, None] * N + rn[None, :], mask=here, other=0.0)
    total -= less if ZERO else less * OFFSET
    if BIAS:
        total += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * stride_ym + rn[None, :], narrow(total, y_ptr.dtype.element_ty), mask=here)


def join(parts: Tensor, sums: Tensor, scale: Tensor, zero: Tensor | None, offset: int, bias: Tensor | None, y: Tensor
         ) -> Tensor:
    """y (M, N), rows of any stride <- parts (PARTS, M, N) float32 - the correction + bias; scale and zero by tile.

    offset, a power of two or 0: what codes and zero points are stored too small by.
    """
    count, M, N = parts.shape
    join_kernel[(triton.cdiv(N, 32), triton.cdiv(M, 16))](
        parts, sums, scale, scale if zero is None else zero, scale if bias is None else bias, y, M, N, sums.shape[2],
        scale.stride(0), y.stride(0), PARTS=count, NEAR=scale.shape[3], ROWS=scale.shape[3] == 1, ZERO=zero is not None,
        OFFSET=offset, BIAS=bias is not None, TILE=scale.shape[2], BLOCK_M=16, BLOCK_N=32, BLOCK_G=128, num_warps=4,
        num_stages=1)
    return y

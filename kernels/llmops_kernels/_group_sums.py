"""Zero points outside the loop over the weights: of y = sum_g s_g (u_g - z_g) @ x_g only sum_g s_g (u_g @ x_g) is summed there.

The rest, sum_g s_g z_g X_g with X_g the sum of a group's activations, is a product as large as the scales: 1 / group of
the layer. It is taken off where the parts of a split matmul are added, which has to happen anyway:

    add_up    at its end each program of the layer sums some groups of its own part of x, so that all programs together
              do it once (in float32; a program alone would have to sum M / BLOCK_N of what it multiplies)
    join      y = the parts in order - X @ (s (z + offset)).T + bias, on the tensor cores in three TF32 products, which
              is float32's accuracy: scales of 8 or 11 bits times zero points of 9 are exact

What it costs is one more reading of the scales, 2 / group of the bytes of an 8-bit weight, mostly out of the L2 cache;
zero points are read here instead of there. What it saves is a third product for each bf16 weight of 8 bits.

Shapes: sums (G, M) float32, groups of a row (of one scale a row: of its chunks); the others as in `int_linear`.
"""

from __future__ import annotations

from torch import Tensor

from ._interpret import INTERPRET, narrow
from ._triton import tl, triton

__all__ = ["add_up", "join", "join_kernel"]


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def add_up(x_ptr, sums_ptr, M, K, stride_xm, rm, begin, end, step,  # type: ignore[no-untyped-def]
           SIZE: tl.constexpr):
    """sums[g] = x[rm, SIZE columns from g * SIZE] added up, for g = begin, begin + step, ... below end."""
    for group in tl.range(begin, end, step, num_stages=1):
        columns = group * SIZE + tl.arange(0, SIZE)
        some = tl.load(x_ptr + rm[:, None].to(tl.int64) * stride_xm + columns[None, :],
                       mask=(rm[:, None] < M) & (columns[None, :] < K), other=0.0)
        tl.store(sums_ptr + group.to(tl.int64) * M + rm, tl.sum(some.to(tl.float32), 1), mask=rm < M)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def join_kernel(parts_ptr, sums_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, M, N, groups,  # type: ignore[no-untyped-def]
                stride_scale, stride_ym, PARTS: tl.constexpr, NEAR: tl.constexpr, ROWS: tl.constexpr,
                ZERO: tl.constexpr, OFFSET: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr):
    """A (BLOCK_M, BLOCK_N) tile of y. stride_scale: scales of a tile of rows; ROWS: one scale a row, for all groups."""
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = (rm[:, None] < M) & (rn[None, :] < N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in tl.static_range(PARTS):
        row = (part * M + rm).to(tl.int64)
        total += tl.load(parts_ptr + row[:, None] * N + rn[None, :], mask=here, other=0.0)
    tile = (rn // TILE).to(tl.int64)[None, :] * stride_scale + (rn % TILE)[None, :] * NEAR
    less = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in tl.range(0, groups, BLOCK_G):
        group = begin + tl.arange(0, BLOCK_G)
        at = tile + (group * 0 if ROWS else group // NEAR * (NEAR * TILE) + group % NEAR)[:, None]
        factor = tl.load(scale_ptr + at, mask=(group < groups)[:, None], other=0.0).to(tl.float32)
        if ZERO:
            factor *= tl.load(zero_ptr + at, mask=(group < groups)[:, None], other=0).to(tl.float32) + OFFSET
        else:
            factor *= OFFSET
        X = tl.load(sums_ptr + group[None, :].to(tl.int64) * M + rm[:, None],
                    mask=(rm[:, None] < M) & (group[None, :] < groups), other=0.0)
        less = tl.dot(X, factor, less, input_precision="ieee" if INTERPRET else "tf32x3")
    total -= less
    if BIAS:
        total += tl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rm[:, None].to(tl.int64) * stride_ym + rn[None, :], narrow(total, y_ptr.dtype.element_ty), mask=here)


def join(parts: Tensor, sums: Tensor, scale: Tensor, zero: Tensor | None, offset: float, bias: Tensor | None,
         y: Tensor) -> Tensor:
    """y (M, N), rows of any stride <- parts (PARTS, M, N) float32 - the correction + bias. scale, zero: by tile."""
    count, M, N = parts.shape
    rowwise = scale.shape[1] == 1 and scale.shape[3] == 1
    join_kernel[(triton.cdiv(N, 32), triton.cdiv(M, 16))](
        parts, sums, scale, scale if zero is None else zero, scale if bias is None else bias, y, M, N, sums.shape[0],
        scale.stride(0), y.stride(0), PARTS=count, NEAR=scale.shape[3], ROWS=rowwise, ZERO=zero is not None,
        OFFSET=offset, BIAS=bias is not None, TILE=scale.shape[2], BLOCK_M=16, BLOCK_N=32, BLOCK_G=128, num_warps=4,
        num_stages=1)
    return y



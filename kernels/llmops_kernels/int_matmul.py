"""Weight-only integer matmul: y = x @ ((codes - zero) * scale).T, the weight read as packed integers.

At one to a few tokens a linear layer costs what it takes to read its weight, so reading a quarter of the bytes is the
whole gain. The weight is unpacked in registers, multiplied on the tensor cores as integers (exact in fp16 and bf16:
|code - zero| is at most 255), summed in float32, and only the sum of a group is scaled: no rounding of dequantized
weights anywhere.

Layout. 5 to 8 bits: int8, (out, in). 2 to 4 bits: two codes a byte, *planar in chunks of 128 columns*: byte j of a
chunk holds column j in its low half and column j + 64 in its high half, both as code + 8. So one load gives two
contiguous runs of columns and two matmuls, and nothing has to be interleaved. `in` is padded to whole chunks with
code 0.

Groups that are a multiple of the run (64 columns; 128 at 8 bits) are scaled on the accumulator; smaller ones scale each
weight before the product, which rounds to x's dtype. One program makes a (BLOCK_M, BLOCK_N) tile of y, over all of
`in`.

Left out, on purpose: splitting along `in` (few tokens on a small layer leave processors idle), tuned tile tables,
inline assembly for the unpacking, and a fallback to dense matmul for thousands of tokens.

The general op: any group size, any bits from 2 to 8. `int_linear` is the fast one, for the shapes that models have.

Shapes: x (M, K) fp16 or bf16; codes (N, K) int8 or (N, ceil(K / 128) * 64) uint8; scale (N, G); zero (N, G) int8;
y (M, N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._interpret import dot, narrow
from ._library import define, ops
from ._triton import tl, triton
from .reference import int_matmul as reference
from .reference.int_matmul import CHUNK, pack_codes, unpack_codes

__all__ = ["CHUNK", "int_matmul", "int_matmul_kernel", "launch", "pack_codes", "unpack_codes"]


# ---------------------------------------------------------------------------------------------------- kernel
@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _run(acc, x_ptr, q, scale_ptr, zero_ptr, rm, rn, rk, M, N, K, stride_xm, groups,  # type: ignore[no-untyped-def]
         GROUP: tl.constexpr, RUN: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Add one run of RUN contiguous columns `rk` to the tile: q (BLOCK_N, RUN) holds its signed codes as int8."""
    x = tl.load(x_ptr + rm[:, None].to(tl.int64) * stride_xm + rk[None, :],
                mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0)
    if GROUP == 0 or GROUP % RUN == 0:  # the run lies in one group: multiply integers, scale the sum
        group = 0 if GROUP == 0 else tl.minimum(tl.min(rk, axis=0) // GROUP, groups - 1)
        scale = tl.load(scale_ptr + rn * groups + group, mask=rn < N, other=0.0).to(tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + rn * groups + group, mask=rn < N, other=0)
            part = dot(x, (q.to(tl.int16) - zero.to(tl.int16)[:, None]).T, tl.zeros(acc.shape, tl.float32))
        else:
            part = dot(x, q.T, tl.zeros(acc.shape, tl.float32))
        return acc + part * scale[None, :]
    at = rn[:, None] * groups + tl.minimum(rk // GROUP, groups - 1)[None, :]
    scale = tl.load(scale_ptr + at, mask=rn[:, None] < N, other=0.0).to(tl.float32)
    w = q.to(tl.float32)
    if HAS_ZERO:
        w = w - tl.load(zero_ptr + at, mask=rn[:, None] < N, other=0).to(tl.float32)
    return dot(x, (w * scale).T, acc)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def int_matmul_kernel(x_ptr, q_ptr, scale_ptr, zero_ptr, y_ptr,  # type: ignore[no-untyped-def]
                      M, N, K, stride_xm, stride_qn, groups,
                      GROUP: tl.constexpr, NIBBLES: tl.constexpr, HAS_ZERO: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One (BLOCK_M, BLOCK_N) tile of y. GROUP 0: one scale a row. BLOCK_K is the chunk of the layout, 128."""
    rn = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    q_row = q_ptr + rn[:, None].to(tl.int64) * stride_qn
    if NIBBLES:
        HALF: tl.constexpr = BLOCK_K // 2
        run = tl.arange(0, HALF)
        for k in tl.range(0, K, BLOCK_K):
            both = tl.load(q_row + (k // 2 + run)[None, :], mask=rn[:, None] < N, other=0)
            low = (both & 15).to(tl.int8) - 8
            high = (both >> 4).to(tl.int8) - 8
            acc = _run(acc, x_ptr, low, scale_ptr, zero_ptr, rm, rn, k + run, M, N, K, stride_xm, groups,
                       GROUP, HALF, HAS_ZERO)
            acc = _run(acc, x_ptr, high, scale_ptr, zero_ptr, rm, rn, k + HALF + run, M, N, K, stride_xm, groups,
                       GROUP, HALF, HAS_ZERO)
    else:
        run = tl.arange(0, BLOCK_K)
        for k in tl.range(0, K, BLOCK_K):
            q = tl.load(q_row + (k + run)[None, :], mask=(rn[:, None] < N) & ((k + run)[None, :] < K), other=0)
            acc = _run(acc, x_ptr, q, scale_ptr, zero_ptr, rm, rn, k + run, M, N, K, stride_xm, groups,
                       GROUP, BLOCK_K, HAS_ZERO)
    tl.store(y_ptr + rm[:, None].to(tl.int64) * N + rn[None, :], narrow(acc, y_ptr.dtype.element_ty),
             mask=(rm[:, None] < M) & (rn[None, :] < N))


# ---------------------------------------------------------------------------------------------------- launch
def launch(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Run the kernel; `int_matmul` is the checked door to it."""
    M, K = x.shape
    N = scale.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M == 0 or N == 0:
        return y
    block_m, block_n = (16, 64) if M <= 16 else (32, 64) if M <= 32 else (64, 128)
    grid = (triton.cdiv(N, block_n), triton.cdiv(M, block_m))
    int_matmul_kernel[grid](
        x, codes, scale, scale if zero is None else zero, y, M, N, K, x.stride(0), codes.stride(0), scale.shape[1],
        GROUP=0 if scale.shape[1] == 1 else group_size, NIBBLES=bits <= 4, HAS_ZERO=zero is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=CHUNK, num_warps=4 if block_m < 64 else 8, num_stages=3)
    return y


def int_matmul(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int) -> Tensor:
    """y (M, N) in x's dtype. codes from `pack_codes`; scale (N, G); zero (N, G) int8 or None; group_size in columns.

    Raises ValueError when dtypes, shapes or devices do not fit together.
    """
    y: Tensor = ops.int_matmul(x, codes, scale.contiguous(), zero, bits, group_size)
    return y


def check(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> None:
    """Raises ValueError when dtypes, shapes or devices do not fit together."""
    if x.dim() != 2 or x.dtype not in (torch.float16, torch.bfloat16) or (x.shape[0] and x.stride(1) != 1):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected (M, K) float16 or bfloat16, rows contiguous")
    width = -(-x.shape[1] // CHUNK) * CHUNK // 2 if bits <= 4 else x.shape[1]
    stored = torch.uint8 if bits <= 4 else torch.int8
    if not 2 <= bits <= 8 or codes.shape != (scale.shape[0], width) or codes.stride(1) != 1 or codes.dtype != stored:
        raise ValueError(f"codes are {codes.dtype} {tuple(codes.shape)} for {bits} bits; expected pack_codes' layout "
                         f"{stored} {(scale.shape[0], width)}")
    if group_size < 1 or x.shape[1] % group_size or scale.shape[1] != x.shape[1] // group_size:
        raise ValueError(f"scale is {tuple(scale.shape)} for {x.shape[1]} columns in groups of {group_size}; expected "
                         f"one column a group, groups without a rest")
    if zero is not None and (zero.shape != scale.shape or zero.dtype != torch.int8 or not zero.is_contiguous()):
        raise ValueError(f"zero is {zero.dtype} {tuple(zero.shape)}; expected contiguous int8 {tuple(scale.shape)}")
    for name, given in (("codes", codes), ("scale", scale), ("zero", zero)):
        if given is not None and given.device != x.device:
            raise ValueError(f"{name} is on {given.device}; expected {x.device}, where x is")


def fake(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], scale.shape[0])


define("int_matmul(Tensor x, Tensor codes, Tensor scale, Tensor? zero, int bits, int group_size) -> Tensor",
       check=check, cpu=reference.int_matmul, cuda=launch, fake=fake)

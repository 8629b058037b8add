"""Activations to int8 or fp8, each token with a scale of its own: what W8A8 linears read.

    s_t = absmax(x_t) / 127 (int8), / 448 (fp8)      a_tk = x_tk / s_t, rounded to nearest, ties to even

group_size 128 (fp8 only) takes a scale for every 128 columns of a token instead, as block-scaled weights want it. One
program reads a token once, up to 16,384 columns; a wider one twice, the second time from the cache. With groups a
program takes 2,048 columns, since nothing ties the groups of a token together.

Rounding is that of `reference/quantize_tokens.py` bit for bit, and of vLLM's dynamic per-token quantization.

Shapes: x (M, K) fp16, bf16 or fp32, rows of any stride; codes (M, K) int8 or float8_e4m3fn; scale (M, 1) or
(M, ceil(K / 128)) float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from ._library import define, ops
from ._rows import GROUP, codes_of, quantized, row_columns, scale_of, tiles_of, top_of
from ._triton import tl, triton
from .reference.quantize_tokens import quantize_tokens as reference

__all__ = ["CODES", "kernel", "launch", "quantize_tokens"]

CODES = (torch.int8, torch.float8_e4m3fn)


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def kernel(x_ptr, q_ptr, s_ptr, K, stride_x, stride_s,  # type: ignore[no-untyped-def]
           BLOCK: tl.constexpr, FP8: tl.constexpr, GROUPED: tl.constexpr, ONCE: tl.constexpr):
    """Token program_id(0); with groups its BLOCK columns program_id(1). ONCE: BLOCK holds the whole token."""
    m = tl.program_id(0).to(tl.int64)
    x_row, q_row, s_at = x_ptr + m * stride_x, q_ptr + m * K, s_ptr + m * stride_s
    if ONCE or GROUPED:
        start = tl.program_id(1) * BLOCK
        columns = row_columns(start, BLOCK)
        v = tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32)
        quantized(v, q_row, s_at + start // 128, columns, K, BLOCK, FP8, GROUPED)
    else:
        top = tl.zeros((), tl.float32)
        for start in tl.range(0, K, BLOCK):
            columns = row_columns(start, BLOCK)
            v = tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32)
            part = top_of(v, None)
            top = tl.where((part > top) | (part != part), part, top)
        s = scale_of(top, FP8)
        tl.store(s_at, s)
        for start in tl.range(0, K, BLOCK):
            columns = row_columns(start, BLOCK)
            v = tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32)
            tl.store(q_row + columns, codes_of(v, s, FP8), mask=columns < K)


def launch(x: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    """Run the kernel; `quantize_tokens` is the checked door to it."""
    M, K = x.shape
    codes, scale = _empty(x, dtype, group_size)
    if codes.numel() == 0:
        return codes, scale.fill_(1.0)
    tiles = tiles_of(min(K, 2048) if group_size == GROUP else K)
    chunks = triton.cdiv(K, tiles["BLOCK"]) if group_size == GROUP else 1
    kernel[(M, chunks)](x, codes, scale, K, x.stride(0), scale.stride(0), FP8=dtype != torch.int8,
                        GROUPED=group_size == GROUP, ONCE=tiles["BLOCK"] >= K, **tiles)
    return codes, scale


def check(x: Tensor, dtype: torch.dtype, group_size: int) -> None:
    checks.tensor("x", x, (*checks.HALVES, torch.float32), (None, None), contiguous=False)
    if x.numel() and x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"x has strides {x.stride()}; expected its rows contiguous (a last stride of 1)")
    coding("dtype", dtype, group_size)


def coding(name: str, dtype: torch.dtype, group_size: int) -> None:
    """What the quantizing ops share: int8 by token, float8_e4m3fn by token or by 128 columns of one."""
    checks.one_of(name, dtype, CODES)
    if group_size not in (-1, GROUP) or (dtype == torch.int8 and group_size != -1):
        raise ValueError(f"group_size is {group_size} for {dtype}; expected -1, one scale a token"
                         f"{'' if dtype == torch.int8 else f', or {GROUP}'}")


def _empty(x: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    groups = 1 if group_size == -1 else -(-x.shape[1] // GROUP)
    return (torch.empty(x.shape, dtype=dtype, device=x.device),
            torch.empty((x.shape[0], groups), dtype=torch.float32, device=x.device))


define("quantize_tokens(Tensor x, ScalarType dtype, int group_size) -> (Tensor, Tensor)",
       check=check, cpu=reference, cuda=launch, fake=_empty)


def quantize_tokens(x: Tensor, dtype: torch.dtype = torch.int8, *, group_size: int = -1) -> tuple[Tensor, Tensor]:
    """(codes (M, K), float32 scales (M, 1) or (M, ceil(K / 128))) of x (M, K).

    dtype: torch.int8 or torch.float8_e4m3fn; group_size: -1, or 128 with float8. A token of zeros gets a scale next to
    none in int8, 1 in float8. Raises ValueError where dtype, group or strides do not fit.
    """
    made: tuple[Tensor, Tensor] = ops.quantize_tokens(x, dtype, group_size)
    return made

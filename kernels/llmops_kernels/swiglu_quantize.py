"""SwiGLU and quantization in one pass: what stands between the two halves of an MLP whose linears are W8A8.

    v = silu(gate) * up = gate / (1 + exp(-gate)) * up      float32 (Shazeer 2020, eq. 6)
    a, s = quantize(v)                                      `quantize_tokens` on v before it is rounded

gate and up are usually the two halves of one packed linear's output, so rows may have any stride. Up to 16,384
columns a token is read once, a wider one twice; with a scale for every 128 columns a program takes 2,048 of them.

Shapes: gate, up (M, K) fp16 or bf16; a (M, K) int8 or float8_e4m3fn; s (M, 1) or (M, ceil(K / 128)) float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from ._library import define, ops
from ._rows import GROUP, codes_of, quantized, row_columns, scale_of, tiles_of, top_of
from ._triton import tl, triton
from .quantize_tokens import coding
from .reference.swiglu_quantize import swiglu_quantize as reference

__all__ = ["kernel", "launch", "swiglu_quantize"]


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def _gated(gate_row, up_row, columns, K):  # type: ignore[no-untyped-def]
    gate = tl.load(gate_row + columns, mask=columns < K, other=0.0).to(tl.float32)
    up = tl.load(up_row + columns, mask=columns < K, other=0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def kernel(gate_ptr, up_ptr, q_ptr, s_ptr, K, stride_gate, stride_up, stride_s,  # type: ignore[no-untyped-def]
           BLOCK: tl.constexpr, FP8: tl.constexpr, GROUPED: tl.constexpr, ONCE: tl.constexpr):
    """Token program_id(0); with groups its BLOCK columns program_id(1). ONCE: BLOCK holds the whole token."""
    m = tl.program_id(0).to(tl.int64)
    gate_row, up_row = gate_ptr + m * stride_gate, up_ptr + m * stride_up
    q_row, s_at = q_ptr + m * K, s_ptr + m * stride_s
    if ONCE or GROUPED:
        start = tl.program_id(1) * BLOCK
        columns = row_columns(start, BLOCK)
        quantized(_gated(gate_row, up_row, columns, K), q_row, s_at + start // 128, columns, K, BLOCK, FP8, GROUPED)
    else:
        top = tl.zeros((), tl.float32)
        for start in tl.range(0, K, BLOCK):
            part = top_of(_gated(gate_row, up_row, row_columns(start, BLOCK), K), None)
            top = tl.where((part > top) | (part != part), part, top)
        s = scale_of(top, FP8)
        tl.store(s_at, s)
        for start in tl.range(0, K, BLOCK):
            columns = row_columns(start, BLOCK)
            tl.store(q_row + columns, codes_of(_gated(gate_row, up_row, columns, K), s, FP8), mask=columns < K)


def launch(gate: Tensor, up: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    """Run the kernel; `swiglu_quantize` is the checked door to it."""
    M, K = gate.shape
    codes, scale = _empty(gate, up, dtype, group_size)
    if codes.numel() == 0:
        return codes, scale.fill_(1.0)
    tiles = tiles_of(min(K, 2048) if group_size == GROUP else K, inputs=2)
    chunks = triton.cdiv(K, tiles["BLOCK"]) if group_size == GROUP else 1
    kernel[(M, chunks)](gate, up, codes, scale, K, gate.stride(0), up.stride(0), scale.stride(0),
                        FP8=dtype != torch.int8, GROUPED=group_size == GROUP, ONCE=tiles["BLOCK"] >= K, **tiles)
    return codes, scale


def check(gate: Tensor, up: Tensor, dtype: torch.dtype, group_size: int) -> None:
    for name, given in (("gate", gate), ("up", up)):
        checks.tensor(name, given, checks.HALVES if name == "gate" else gate.dtype,
                      (None, None) if name == "gate" else tuple(gate.shape), like=gate, contiguous=False)
        if given.numel() and given.shape[1] > 1 and given.stride(1) != 1:
            raise ValueError(f"{name} has strides {given.stride()}; expected its rows contiguous")
    coding("dtype", dtype, group_size)


def _empty(gate: Tensor, up: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    groups = 1 if group_size == -1 else -(-gate.shape[1] // GROUP)
    return (torch.empty(gate.shape, dtype=dtype, device=gate.device),
            torch.empty((gate.shape[0], groups), dtype=torch.float32, device=gate.device))


define("swiglu_quantize(Tensor gate, Tensor up, ScalarType dtype, int group_size) -> (Tensor, Tensor)",
       check=check, cpu=reference, cuda=launch, fake=_empty)


def swiglu_quantize(gate: Tensor, up: Tensor, dtype: torch.dtype = torch.int8, *, group_size: int = -1
                    ) -> tuple[Tensor, Tensor]:
    """(codes, scale) of silu(gate) * up. Raises ValueError where dtypes, shapes or devices do not fit."""
    made: tuple[Tensor, Tensor] = ops.swiglu_quantize(gate, up, dtype, group_size)
    return made

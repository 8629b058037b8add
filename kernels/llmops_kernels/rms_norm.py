"""RMSNorm with what comes before and after it in one pass: residual addition, and quantization for a W8A8 linear.

    h = x + r                       rounded to x's dtype, as the residual stream is stored
    y = h / sqrt(mean(h^2) + eps) * weight                       float32 to the end (Zhang and Sennrich 2019, eq. 4)
    a, s = quantize(y)              `quantize_tokens` on y before it is rounded

A block of a transformer reads and writes its activations for each of these; fused, x is read once and the codes, half
its size, are written once. Models in plain PyTorch round y to their dtype between the norm and the weight and again
before quantizing; that is left out here, so a code may differ by one from theirs where the two fall on either side of
a half.

One program a token, up to 32,768 columns held in registers.

    rms_norm_quantize        x                -> a, s
    add_rms_norm             x, residual      -> y, h
    add_rms_norm_quantize    x, residual      -> a, s, h

Shapes: x, residual, y, h (M, K) fp16 or bf16, rows of any stride; weight (K,) in x's dtype or float32 (a model that
multiplies by 1 + weight passes that); a (M, K) int8 or float8_e4m3fn; s (M, 1) or (M, ceil(K / 128)) float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from ._interpret import narrow
from ._library import define, ops
from ._rows import GROUP, quantized, row_columns
from ._triton import tl, triton
from .quantize_tokens import coding
from .reference import rms_norm as reference

__all__ = ["WIDEST", "add_rms_norm", "add_rms_norm_quantize", "kernel", "launch", "rms_norm_quantize"]

WIDEST = 32768


@triton.jit  # type: ignore[untyped-decorator]  # a kernel is no Python function
def kernel(x_ptr, r_ptr, w_ptr, h_ptr, y_ptr, s_ptr, K, eps, stride_x, stride_r, stride_s,  # type: ignore[no-untyped-def]
           BLOCK: tl.constexpr, ADD: tl.constexpr, QUANTIZE: tl.constexpr, FP8: tl.constexpr, GROUPED: tl.constexpr):
    """Token program_id(0). y_ptr: codes where QUANTIZE, else the normed token."""
    m = tl.program_id(0).to(tl.int64)
    columns = row_columns(0, BLOCK)
    keep = columns < K
    v = tl.load(x_ptr + m * stride_x + columns, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        h = narrow(v + tl.load(r_ptr + m * stride_r + columns, mask=keep, other=0.0).to(tl.float32),
                   x_ptr.dtype.element_ty)
        tl.store(h_ptr + m * K + columns, h, mask=keep)
        v = h.to(tl.float32)
    w = tl.load(w_ptr + columns, mask=keep, other=0.0).to(tl.float32)
    v = v * tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.sum(v * v) / K + eps)) * w
    if QUANTIZE:
        quantized(v, y_ptr + m * K, s_ptr + m * stride_s, columns, K, BLOCK, FP8, GROUPED)
    else:
        tl.store(y_ptr + m * K + columns, narrow(v, y_ptr.dtype.element_ty), mask=keep)


def launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None, group_size: int
           ) -> tuple[Tensor, Tensor, Tensor]:
    """(y or codes, scale, h) of the kernel; what was not asked for is empty. dtype None: no quantization."""
    M, K = x.shape
    y = torch.empty((M, K), dtype=dtype or x.dtype, device=x.device)
    scale = torch.empty((M, _groups(K, group_size)) if dtype else (0, 1), dtype=torch.float32, device=x.device)
    h = torch.empty((M, K) if residual is not None else (0, K), dtype=x.dtype, device=x.device)
    if y.numel():
        r = x if residual is None else residual
        kernel[(M,)](x, r, weight, h, y, scale, K, eps, x.stride(0), r.stride(0), scale.stride(0),
                     ADD=residual is not None, QUANTIZE=dtype is not None, FP8=dtype == torch.float8_e4m3fn,
                     GROUPED=group_size == GROUP, **tiles(K))
    return y, scale, h


def tiles(columns: int) -> dict[str, int]:
    """BLOCK and num_warps for a token of `columns`."""
    block = max(GROUP, triton.next_power_of_2(columns))
    return {"BLOCK": block, "num_warps": max(1, min(32, block // 1024))}


def _groups(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // GROUP)


# ---------------------------------------------------------------------------------------------------- ops
def check(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None, group_size: int
          ) -> None:
    columns = x.shape[-1] if x.dim() else 0
    checks.activations(x, columns)
    if not 1 <= columns <= WIDEST:
        raise ValueError(f"x has {columns} columns; expected 1 to {WIDEST}")
    checks.tensor("weight", weight, (x.dtype, torch.float32), (columns,), like=x)
    if residual is not None:
        checks.tensor("residual", residual, x.dtype, tuple(x.shape), like=x, contiguous=False)
        if residual.shape[0] and columns > 1 and residual.stride(1) != 1:
            raise ValueError(f"residual has strides {residual.stride()}; expected its rows contiguous")
    if dtype is not None:
        coding("dtype", dtype, group_size)


def _quantize(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    return launch(x, None, weight, eps, dtype, group_size)[:2]


def _add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, h = launch(x, residual, weight, eps, None, -1)
    return y, h


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _codes(x: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    return (torch.empty(x.shape, dtype=dtype, device=x.device),
            torch.empty((x.shape[0], _groups(x.shape[1], group_size)), dtype=torch.float32, device=x.device))


define("rms_norm_quantize(Tensor x, Tensor weight, float eps, ScalarType dtype, int group_size) -> (Tensor, Tensor)",
       check=lambda x, weight, eps, dtype, group_size: check(x, None, weight, eps, dtype, group_size),
       cpu=reference.rms_norm_quantize, cuda=_quantize,
       fake=lambda x, weight, eps, dtype, group_size: _codes(x, dtype, group_size))
define("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
       check=lambda x, residual, weight, eps: check(x, residual, weight, eps, None, -1),
       cpu=reference.add_rms_norm, cuda=_add, fake=lambda x, residual, weight, eps: (_like(x), _like(x)))
define("add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype, int group_size) "
       "-> (Tensor, Tensor, Tensor)",
       check=check, cpu=reference.add_rms_norm_quantize, cuda=launch,
       fake=lambda x, residual, weight, eps, dtype, group_size: (*_codes(x, dtype, group_size), _like(x)))


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.int8, *, group_size: int = -1
                      ) -> tuple[Tensor, Tensor]:
    """(codes, scale) of RMSNorm(x) * weight. Raises ValueError where dtypes, shapes or devices do not fit."""
    made: tuple[Tensor, Tensor] = ops.rms_norm_quantize(x, weight, eps, dtype, group_size)
    return made


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm(h) * weight, h) with h = x + residual, both in x's dtype. Raises ValueError as above."""
    made: tuple[Tensor, Tensor] = ops.add_rms_norm(x, residual, weight, eps)
    return made


def add_rms_norm_quantize(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.int8, *,
                          group_size: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, h): both of the above. Raises ValueError as above."""
    made: tuple[Tensor, Tensor, Tensor] = ops.add_rms_norm_quantize(x, residual, weight, eps, dtype, group_size)
    return made

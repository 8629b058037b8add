"""y = x @ dequantize(W).T with W in 4-bit floats (E2M1) under a scale for 32 (mxfp4) or 16 (nvfp4) columns.

    W_oj = value(code_oj) * 2^(e_og - 127)          mxfp4
    W_oj = value(code_oj) * (s_og / global)         nvfp4, s_og in E4M3

Activations stay as they are. A weight is multiplied out in float32, rounded once to x's type, and used: the same bits
that a reader computes with that decompresses at load (compressed-tensors in transformers). mxfp4 weights are exact in
bfloat16.

There is one way to run it, `reference`: the stock 4-bit op of torch (int4pack) takes evenly spaced numbers, and no op
for a CPU takes E2M1. Two codes are looked up at once in a table of 256 pairs, 2^18 weights at a time, so that the dense
weight never exists. On a CPU it saves bytes, not time.

Shapes: x (..., in); W (out, in); y (..., out).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from llmops.errors import LlmopsError, unknown

__all__ = ["choose", "dequantize", "describe", "fp4_matmul"]

REFERENCE = "reference"
CHUNK = 1 << 18  # weights multiplied out at a time
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Held = Mapping[str, Tensor]


def choose(kernel: str = "auto") -> str:
    """The name of the kernel. Raises LlmopsError for "triton", which there is none of, and for an unknown name."""
    if kernel not in ("auto", "torch", "triton", "ops", "reference"):
        raise LlmopsError(unknown("kernel", kernel, ("auto", "torch", "triton", "ops", "reference")))
    if kernel == "triton":
        raise LlmopsError("kernel triton for 4-bit floats; there is none: use auto or reference")
    return REFERENCE


def describe(name: str) -> str:
    """The kernel's name for people and for the ledger."""
    return f"{name} (fp4 codes multiplied out as they are used)"


def dequantize(held: Held, dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
    """Rows first..last of W, (rows, in). held: `weight_packed` uint8 (out, in / 2), the even column in the low half;
    `weight_scale` uint8 exponents or float8_e4m3fn (out, groups); for nvfp4 `weight_global_scale` (1,)."""
    packed, stored = held["weight_packed"][first:last], held["weight_scale"][first:last]
    rows, half = packed.shape
    pairs = torch.index_select(_pairs(packed.device.type), 0, packed.reshape(-1).int()).view(rows, stored.shape[1], -1)
    codes = pairs.view(torch.bfloat16)  # (rows, groups, group), two to a word of the table
    if stored.dtype == torch.uint8:
        scale = torch.exp2(stored.float() - 127).to(torch.promote_types(dtype, torch.bfloat16))
        codes = codes if dtype != torch.float16 else codes.float()  # float16 cannot hold every power that E8M0 can
    else:
        scale = stored.float() / held["weight_global_scale"]
    return (codes * scale.unsqueeze(-1)).to(dtype).view(rows, 2 * half)


def fp4_matmul(x: Tensor, held: Held, bias: Tensor | None = None) -> Tensor:
    """y (..., out) in x's type."""
    rows, columns = held["weight_packed"].shape[0], 2 * held["weight_packed"].shape[1]
    flat = x.reshape(-1, columns)
    if flat.shape[0] == 0:
        return x.new_zeros(*x.shape[:-1], rows)
    size = max(16, CHUNK // columns)
    parts = []
    for first in range(0, rows, size):
        dense = dequantize(held, x.dtype, first, first + size)
        # The bias goes in with the product, which rounds once; added later it would not match a dense layer's bits.
        parts.append(F.linear(flat, dense, None if bias is None else bias[first:first + size].to(x.dtype)))
    return torch.cat(parts, 1).view(*x.shape[:-1], rows)


@cache
def _pairs(device: str) -> Tensor:
    """(256,) int32: the two bfloat16 numbers of a byte, low half first."""
    values = torch.tensor((*VALUES, *(-value for value in VALUES)))
    both = torch.stack((values.repeat(16), values.repeat_interleave(16)), -1)
    return both.to(torch.bfloat16).contiguous().view(torch.int32).view(-1).to(device)

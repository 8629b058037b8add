"""y = x @ dequantize(W).T with W in float8 (E4M3) and x rounded to float8 on the way in.

    scales    of W                        of x                              y_to
    tensor    one                         a token: absmax(x_t) / 448        s_t s   sum_k a_tk w_ok
    channel   a row, s_o                  a token                           s_t s_o sum_k a_tk w_ok
    block     128 rows x 128 columns      a token and 128 of its inputs     sum_g s_tg s_og sum_k in g a_tk w_ok

a_tk = x_tk / s_t to the nearest E4M3, ties to even, clamped at 448. Products of two E4M3 numbers are exact in float32,
in which they are added, as on a GPU's tensor cores; scales are float32 and the bias comes last. That is what servers
compute (vLLM's dynamic per-token and per-group quantization).

    triton     CUDA (package `llmops_kernels`), compute capability 8.9 and newer
    ops        the same ops on a device without the kernels: their PyTorch reference, for comparison
    reference  any device

On a CPU there is no fast way: no stock op is. `torch._scaled_mm` and oneDNN's
`qlinear_pointwise` do take float8 there and give the same sums, 7 to 9 ms for 8 x 1024 x 1024 where bfloat16 takes 0.09
(one core of an AVX-512 EPYC): they widen a number at a time. Here codes are widened by a table of 256 entries, 2^18
at a time, so that the dense weight never exists; that takes 0.5 ms. fp8 on a CPU is to score what a GPU will serve.

Shapes: x (..., in); W (out, in); y (..., out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from llmops.errors import LlmopsError, unknown
from llmops.ops.int8_matmul import triton_here

__all__ = ["BLOCK", "choose", "describe", "fp8_matmul", "on_codes", "quantize_tokens", "widened"]

REFERENCE, TRITON, OPS = "reference", "triton", "ops"
CHOICES = ("auto", "torch", "triton", "ops", "reference")
BLOCK = 128
LARGEST = 448.0
CHUNK = 1 << 18  # weights widened at a time
Held = Mapping[str, Tensor]


def choose(kernel: str = "auto", device: str = "cpu") -> str:
    """The name of the kernel on a device type. Raises LlmopsError for "triton" where there is none, and for an unknown
    name."""
    if kernel not in CHOICES:
        raise LlmopsError(unknown("kernel", kernel, CHOICES))
    able = device == "cuda" and triton_here() and torch.cuda.is_available() and (
        torch.cuda.get_device_capability() >= (8, 9))
    if kernel == "triton" and not able:
        raise LlmopsError(f"kernel triton for float8 weights on device {device}; it needs a CUDA device of compute "
                          "capability 8.9 or newer, triton and llmops_kernels: use auto or reference")
    if kernel == "ops":
        return TRITON if able else OPS
    return TRITON if able and kernel in ("auto", "triton") else REFERENCE


def describe(name: str) -> str:
    """The kernel's name for people and for the ledger."""
    return f"{name} ({'fp8 codes widened as they are used' if name == REFERENCE else 'fp8 activations by token'})"


def quantize_tokens(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """(codes (tokens, in) float8_e4m3fn, scales (tokens, groups) float32) of x (tokens, in), a scale a row by default.

    A group of zeros gets the scale 1. Raises ValueError when `group` does not divide the inputs.
    """
    tokens, columns = x.shape
    size = group or columns
    if columns % size:
        raise ValueError(f"x has {columns} inputs; expected a multiple of {size}")
    parts = x.float().view(tokens, -1, size)
    scale = parts.abs().amax(-1, keepdim=True) / LARGEST
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (parts / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view(tokens, columns), scale.squeeze(-1)


def fp8_matmul(x: Tensor, held: Held, scales: str, bias: Tensor | None = None, name: str = REFERENCE) -> Tensor:
    """y (..., out) in x's type. held: `weight` float8_e4m3fn, `weight_scale`; scales: "tensor", "channel", "block";
    name: as `choose` gave it."""
    rows, columns = held["weight"].shape
    flat = x.reshape(-1, columns)
    if flat.shape[0] == 0:
        return x.new_zeros(*x.shape[:-1], rows)
    if name != REFERENCE:
        return _ops(flat, held, scales, bias).to(x.dtype).view(*x.shape[:-1], rows)
    codes, scale = quantize_tokens(flat, BLOCK if scales == "block" else None)
    a = widened(codes)
    if scales == "block":  # a scale for every group of inputs has to go in before the sum
        a = (a.view(len(a), -1, BLOCK) * scale.unsqueeze(-1)).view(len(a), columns)
    y = torch.cat([F.linear(a, part) for part in _parts(held, scales)], 1)
    if scales != "block":
        y = y.mul_(scale).mul_(held["weight_scale"].float().view(1, -1))
    y = y if bias is None else y.add_(bias.float())
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def on_codes(codes: Tensor, scale: Tensor, held: Held, scales: str, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y (tokens, out) by the op of `llmops_kernels`, from tokens that are codes (tokens, in) and scales, one a token,
    or one for each 128 columns where W's belong to blocks."""
    from llmops_kernels.fp8_linear import fp8_linear

    given = held["weight_scale"].float()
    given = given.view(1) if scales == "tensor" else given.view(-1, 1) if scales == "channel" else given
    return fp8_linear(codes, scale, held["weight"], given.contiguous(), bias, dtype=dtype)


def _ops(x: Tensor, held: Held, scales: str, bias: Tensor | None) -> Tensor:
    from llmops_kernels.quantize_tokens import quantize_tokens as rounded

    codes, scale = rounded(x if x.stride(1) == 1 else x.contiguous(), torch.float8_e4m3fn,
                           group_size=BLOCK if scales == "block" else -1)
    return on_codes(codes, scale, held, scales, bias, x.dtype)


def widened(codes: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, exact. On a CPU five times as fast as `codes.float()`."""
    if codes.device.type != "cpu":
        return codes.float()
    return torch.index_select(_table(), 0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def _parts(held: Held, scales: str) -> Iterator[Tensor]:
    """W float32 by some rows after others, multiplied by its scales where they belong to blocks."""
    weight = held["weight"]
    rows, columns = weight.shape
    size = max(BLOCK, CHUNK // columns // BLOCK * BLOCK)
    for first in range(0, rows, size):
        part = widened(weight[first:first + size])
        if scales == "block":
            scale = held["weight_scale"][first // BLOCK:-(-(first + size) // BLOCK)].float().repeat_interleave(BLOCK, 0)
            part = (part.view(len(part), -1, BLOCK) * scale[:len(part)].unsqueeze(-1)).view(len(part), columns)
        yield part


@cache
def _table() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()

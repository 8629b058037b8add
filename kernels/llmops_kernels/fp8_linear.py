"""FP8 W8A8: y = (a @ w.T) scaled + bias, E4M3 codes on both sides, summed in float32.

    w_scale    a_scale           from `quantize_tokens(x, torch.float8_e4m3fn, group_size=...)`
    (1,)       (M, 1)            -1: one scale for all of w, one a token
    (N, 1)     (M, 1)            -1: one a row of w, one a token
    (N/128, K/128), rounded up   (M, K/128), rounded up      128: one for 128 x 128 of w, one for 128 columns of a token

Which of them is read off the shapes. Up to 64 tokens the operands are swapped, weights first: Triton's fp8 product with
a first operand of 16 rows is quietly computed in fp16, at half the rate and with a conversion for every code. The
frame is in `_scaled_matmul.py`, with what is done about Hopper's short fp8 sums. Needs compute capability 8.9 or newer.

Shapes: a (M, K), w (N, K) float8_e4m3fn; scales float32; bias (N,) any float type; y (M, N) fp16, bf16 or fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, config
from ._library import define, ops
from ._rows import GROUP
from ._scaled_matmul import BLOCK, CHANNEL, TENSOR, Config, fitting, run, shared_bytes
from .int8_linear import operands, output, splits
from .quantize_tokens import quantize_tokens
from .reference.fp8_linear import fp8_linear as reference

__all__ = ["OP", "fp8_linear", "launch", "rule", "scales_of", "w8a8_fp8"]

OP = "fp8_linear"
FP8 = torch.float8_e4m3fn
NAMES = {TENSOR: "tensor", CHANNEL: "channel", BLOCK: "block"}


def rule(M: int, N: int, K: int, processors: int) -> Config:
    """Tiles for a shape that no table has. They suit every kind of scale."""
    if M <= 64:
        block_m = 16 if M <= 16 else 32 if M <= 32 else 64
        return {"BLOCK_M": block_m, "BLOCK_N": 128 if block_m == 64 else 64, "BLOCK_K": 128, "GROUP_M": 1, "SWAP": 1,
                "num_warps": 4, "num_stages": 5, "SPLIT": splits(-(-N // 64), K, 128, 2 * processors)}
    block_m = 128 if processors <= (-(-M // 128)) * (-(-N // 128)) else 64
    tiles = -(-M // block_m) * -(-N // 128)
    return {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "SWAP": 0,
            "num_warps": 8 if block_m == 128 else 4, "num_stages": 4, "SPLIT": splits(tiles, K, 128, processors)}


def scales_of(w: Tensor, w_scale: Tensor) -> int:
    """TENSOR, CHANNEL or BLOCK. Raises ValueError when the scales' shape is none of them."""
    N, K = w.shape
    shape = tuple(w_scale.shape)
    if shape == (1,):
        return TENSOR
    if shape == (N, 1):  # a block's, too, where N is 1 and K at most 128: the same thing
        return CHANNEL
    if shape == (-(-N // GROUP), -(-K // GROUP)):
        return BLOCK
    raise ValueError(f"w_scale is {shape} for w {tuple(w.shape)}; expected (1,), ({N}, 1) or "
                     f"({-(-N // GROUP)}, {-(-K // GROUP)})")


def launch(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
           tiles: Config | None = None) -> Tensor:
    """Run the kernel; `fp8_linear` is the checked door to it. tiles: instead of the table's or the rule's."""
    M, K = a.shape
    N = w.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    if y.numel():
        scales, index = _kind(a, a_scale, w, w_scale), a.device.index
        _supported(a)
        found = tiles or config.pick(OP, config.key(N, K, scales=NAMES[scales]), M, config.device_name(index)) or rule(
            M, N, K, config.processors(index))
        if scales == BLOCK and (found["BLOCK_K"] != GROUP or GROUP % found["BLOCK_N"]):
            raise ValueError(f"tiles {found} with scales of 128 x 128; expected BLOCK_K 128 and a BLOCK_N that "
                             f"divides 128")
        run(a, a_scale, w, w_scale, bias, y, scales, fitting(found, shared_bytes(index)))
    return y


def check(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    operands(a, w, FP8)
    checks.tensor("w_scale", w_scale, torch.float32, tuple(w_scale.shape), like=a)
    _kind(a, a_scale, w, w_scale)
    checks.tensor("a_scale", a_scale, torch.float32, tuple(a_scale.shape), like=a, contiguous=False)
    output(bias, dtype, w)


def _kind(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor) -> int:
    """Whose the scales of both sides are; ValueError where the two do not belong together."""
    scales = scales_of(w, w_scale)
    wanted = (a.shape[0], -(-a.shape[1] // GROUP) if scales == BLOCK else 1)
    if tuple(a_scale.shape) != wanted:
        raise ValueError(f"a_scale is {tuple(a_scale.shape)} with w_scale {tuple(w_scale.shape)}; expected {wanted}")
    return scales


def _supported(a: Tensor) -> None:
    if a.device.type == "cuda" and torch.cuda.get_device_capability(a.device) < (8, 9):
        raise ValueError(f"a is float8 on {torch.cuda.get_device_name(a.device)}; expected compute capability 8.9 or "
                         f"newer: use int8_linear there")


def _fake(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty((a.shape[0], w.shape[0]), dtype=dtype, device=a.device)


define("fp8_linear(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor",
       check=check, cpu=reference, cuda=launch, fake=_fake)


def fp8_linear(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None, *,
               dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y (M, N) in `dtype`. Raises ValueError where dtypes, shapes or devices do not fit."""
    y: Tensor = ops.fp8_linear(a, a_scale, w, w_scale, bias, dtype)
    return y


def w8a8_fp8(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (M, N) in x's dtype from x (M, K) fp16 or bf16, quantized on the way in as w_scale's kind wants it."""
    a, a_scale = quantize_tokens(x, FP8, group_size=GROUP if scales_of(w, w_scale) == BLOCK else -1)
    return fp8_linear(a, a_scale, w, w_scale, bias, dtype=x.dtype)

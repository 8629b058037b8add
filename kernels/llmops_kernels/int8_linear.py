"""W8A8: y = s_t s_o (a @ w.T) + bias, int8 codes on both sides, the sum in integers and exact.

a and s_t come from `quantize_tokens`, or fused into what stands before the linear (`rms_norm_quantize`,
`swiglu_quantize`); w is rounded once, a scale for each output. `w8a8` does both steps for activations that are not
quantized yet. The frame, and what splits, swaps and tiles are, is in `_scaled_matmul.py`.

Few tokens read each weight once and cost what that costs: small tiles over K split until every processor has two of
them. Many tokens run at the tensor cores' int8 rate, twice that of bf16.

Left out: scales a token *group* (int8 servers have none) and zero points of activations (symmetric rounding needs
none).

Shapes: a (M, K) int8; a_scale (M, 1) float32; w (N, K) int8; w_scale (N, 1) float32; bias (N,) any float type;
y (M, N) fp16, bf16 or fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, config
from ._library import define, ops
from ._scaled_matmul import CHANNEL, Config, fitting, run, shared_bytes
from .quantize_tokens import quantize_tokens
from .reference.int8_linear import int8_linear as reference

__all__ = ["OP", "int8_linear", "launch", "rule", "w8a8"]

OP = "int8_linear"
WIDEST = 131072  # inputs whose products, 127 * 128 each, surely sum within int32
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


def rule(M: int, N: int, K: int, processors: int) -> Config:
    """Tiles for a shape that no table has."""
    if M <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 256, "GROUP_M": 1, "SWAP": 0, "num_warps": 4, "num_stages": 4,
                "SPLIT": splits(-(-N // 64), K, 256, 2 * processors)}
    if M <= 64:
        block_m = 32 if M <= 32 else 64
        return {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 1, "SWAP": 1, "num_warps": 4,
                "num_stages": 4, "SPLIT": splits(-(-N // 128), K, 128, 2 * processors)}
    block_m = 128 if processors <= (-(-M // 128)) * (-(-N // 128)) else 64
    tiles = -(-M // block_m) * -(-N // 128)
    return {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "SWAP": 0,
            "num_warps": 8 if block_m == 128 else 4, "num_stages": 4, "SPLIT": splits(tiles, K, 128, processors)}


def splits(tiles: int, K: int, block_k: int, programs: int) -> int:
    """Into how many runs of K each tile is split to come near `programs`, each with at least four steps."""
    return max(1, min(programs // max(tiles, 1), K // (4 * block_k), 16))


def launch(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
           tiles: Config | None = None) -> Tensor:
    """Run the kernel; `int8_linear` is the checked door to it. tiles: instead of the table's or the rule's."""
    M, K = a.shape
    N = w.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=a.device)
    if y.numel():
        index = a.device.index
        found = tiles or config.pick(OP, config.key(N, K), M, config.device_name(index)) or rule(
            M, N, K, config.processors(index))
        run(a, a_scale, w, w_scale, bias, y, CHANNEL, fitting(found, shared_bytes(index)))
    return y


def check(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    operands(a, w, torch.int8)
    if a.shape[1] > WIDEST:
        raise ValueError(f"a has {a.shape[1]} columns; expected at most {WIDEST}, beyond which a sum may pass 32 bits")
    checks.tensor("a_scale", a_scale, torch.float32, (a.shape[0], 1), like=a, contiguous=False)
    checks.tensor("w_scale", w_scale, torch.float32, (w.shape[0], 1), like=a)
    output(bias, dtype, w)


def operands(a: Tensor, w: Tensor, dtype: torch.dtype) -> None:
    """The codes of both sides: one dtype, one K, rows contiguous, one device."""
    checks.tensor("a", a, dtype, (None, None), contiguous=False)
    checks.tensor("w", w, dtype, (None, a.shape[1]), like=a, contiguous=False)
    for name, given in (("a", a), ("w", w)):
        if given.numel() and given.shape[1] > 1 and given.stride(1) != 1:
            raise ValueError(f"{name} has strides {given.stride()}; expected its rows contiguous (a last stride of 1)")


def output(bias: Tensor | None, dtype: torch.dtype, w: Tensor) -> None:
    checks.one_of("dtype", dtype, OUTPUTS)
    if bias is not None:
        checks.tensor("bias", bias, OUTPUTS, (w.shape[0],), like=w)


def _fake(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty((a.shape[0], w.shape[0]), dtype=dtype, device=a.device)


define("int8_linear(Tensor a, Tensor a_scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor",
       check=check, cpu=reference, cuda=launch, fake=_fake)


def int8_linear(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None, *,
                dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """y (M, N) in `dtype`. Raises ValueError where dtypes, shapes or devices do not fit."""
    y: Tensor = ops.int8_linear(a, a_scale, w, w_scale, bias, dtype)
    return y


def w8a8(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (M, N) in x's dtype from x (M, K) fp16 or bf16, quantized on the way in."""
    a, a_scale = quantize_tokens(x, torch.int8)
    return int8_linear(a, a_scale, w, w_scale, bias, dtype=x.dtype)

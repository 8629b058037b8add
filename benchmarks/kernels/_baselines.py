"""Weight-only linears of other packages, as contenders: each where it is installed, takes the shape and runs.

A package that refuses is left out of the case, with a line that says why; none of them is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["four_bits", "nf4"]

Call = Callable[[], Any]
_told: set[str] = set()


def four_bits(x: Tensor, codes: Tensor, scale: Tensor, group: int, bits: int = 4) -> dict[str, Call]:
    """x (M, K) bf16; codes (N, K) int8, signed; scale (N, K / group). Baselines for weights of 4 or 8 bits."""
    made: dict[str, Call] = {}
    if x.device.type == "cuda":
        for name, build in (("torchao", _torchao), ("gemlite", _gemlite)):
            _try(made, name, build, x, codes, scale, group, bits)
    return made


def nf4(x: Tensor, weight: Tensor) -> dict[str, Call]:
    """weight (N, K) float: rounded by bitsandbytes itself, in blocks of 64."""
    made: dict[str, Call] = {}
    if x.device.type == "cuda":
        _try(made, "bitsandbytes", _bitsandbytes, x, weight)
    return made


def _try(made: dict[str, Call], name: str, build: Callable[..., Call], *arguments: Any) -> None:
    try:
        call = build(*arguments)
        call()
        made[name] = call
    except Exception as reason:  # not installed, another version, a shape that it does not take
        if name not in _told:
            print(f"  without {name}: {type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}",
                  flush=True)
            _told.add(name)


def _torchao(x: Tensor, codes: Tensor, scale: Tensor, group: int, bits: int) -> Call:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    dense = (codes.float().view(len(codes), -1, group) * scale.float().unsqueeze(-1)).view(codes.shape)
    layer = nn.Linear(codes.shape[1], codes.shape[0], bias=False, device=x.device, dtype=x.dtype)
    layer.weight = nn.Parameter(dense.to(x.dtype), requires_grad=False)
    quantize_(layer, Int4WeightOnlyConfig(group_size=group) if bits == 4 else Int8WeightOnlyConfig())
    return lambda: layer(x)


def _gemlite(x: Tensor, codes: Tensor, scale: Tensor, group: int, bits: int) -> Call:
    from gemlite.core import DType, GemLiteLinear

    layer = GemLiteLinear(W_nbits=bits, group_size=group, in_features=codes.shape[1], out_features=codes.shape[0],
                          input_dtype=DType.BF16, output_dtype=DType.BF16)
    half = 1 << (bits - 1)
    zeros = torch.full_like(scale, half)
    layer.pack((codes.int() + half).to(torch.uint8), scale.view(-1, 1), zeros.view(-1, 1), bias=None)
    return lambda: layer(x)


def _bitsandbytes(x: Tensor, weight: Tensor) -> Call:
    import bitsandbytes

    codes, state = bitsandbytes.functional.quantize_4bit(weight.to(x.dtype), blocksize=64, quant_type="nf4")
    return lambda: bitsandbytes.matmul_4bit(x, codes.t(), state)


def dense(x: Tensor, rows: int, seed: int) -> Call:
    """bf16 x @ w.T by cuBLAS, on a weight of its own."""
    made = torch.Generator(x.device).manual_seed(seed)
    w = torch.randn(rows, x.shape[1], generator=made, device=x.device, dtype=torch.float32).to(x.dtype)
    return lambda: F.linear(x, w)

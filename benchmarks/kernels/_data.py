"""What the benchmarks of 8-bit and 2:4 linears share: random data, float64 errors, cuBLAS beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ROUNDED", "activations", "cublas", "limit", "relative", "seeded"]

ROUNDED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def seeded(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def activations(m: int, k: int, seed: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Tensor:
    """Normal numbers with tokens of different sizes and a few columns thirty times the others, as models have them."""
    made = seeded(seed, device)
    sizes = torch.exp(torch.empty(m, 1, device=device).uniform_(-3, 1, generator=made))
    x = torch.randn(m, k, generator=made, device=device) * sizes
    x[:, :: max(1, k // 3)] *= 30
    return x.to(dtype)


def relative(y: Tensor, exact: Tensor) -> float:
    """||y - exact|| / ||exact||; NaN where y has one."""
    return float((y.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm())


def limit(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-5}[dtype]


def cublas(m: int, n: int, k: int, seed: int, device: str) -> Callable[[], Any]:
    """bf16 x @ w.T of the shape."""
    w = torch.randn(n, k, generator=seeded(seed, device), device=device).to(torch.bfloat16)
    x = torch.randn(m, k, generator=seeded(seed + 1, device), device=device).to(torch.bfloat16)
    return lambda: F.linear(x, w)

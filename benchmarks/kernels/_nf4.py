"""Checks and timings of `nf4_linear`: bitsandbytes' format beside bitsandbytes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels import _baselines
from benchmarks.kernels._contract import LAYERS, ROWS, Case, Check

from llmops_kernels import config, nf4_linear
from llmops_kernels._library import ops
from llmops_kernels.reference.nf4_linear import dequantize


def checks(device: str) -> Iterator[Check]:
    """All codes; absmax over three decades; blocks of 64 that divide the columns."""
    for m, n, k, dtype in ((1, 200, 512, torch.bfloat16), (17, 136, 320, torch.float16), (64, 264, 640, torch.bfloat16),
                           (300, 136, 256, torch.float16)):
        made = torch.Generator().manual_seed(m)
        codes = torch.randint(0, 256, (n * k // 2, 1), generator=made, dtype=torch.uint8)
        absmax = torch.exp(torch.empty(n * k // 64).uniform_(-6.9, 0, generator=made))
        x = torch.randn(m, k, generator=made).to(dtype)
        y = ops.nf4_linear(x.to(device), codes.to(device), absmax.to(device), None, None, None, None, "nf4", 64, n)
        exact = x.double() @ dequantize(codes, absmax, "nf4", 64, n, k, torch.float64).T
        # the sixteen values are rounded to the type of x: 2^-9 of a weight in bfloat16
        yield Check(f"nf4_linear M={m} N={n} K={k}, {dtype}", float((y.cpu().double() - exact).norm() / exact.norm()),
                    3e-3 if dtype == torch.bfloat16 else 5e-4)


def cases(dry: bool) -> list[Case]:
    layers = {"tiny": (128, 256)} if dry else LAYERS
    return [_case(name, m, n, k) for name, (n, k) in layers.items() for m in ((1,) if dry else ROWS)]


def _case(name: str, m: int, n: int, k: int) -> Case:
    weight = n * k // 2 + n * k // 16

    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        made = torch.Generator(device).manual_seed(seed)
        codes = torch.randint(0, 256, (n * k // 2, 1), generator=made, device=device, dtype=torch.uint8)
        absmax = torch.empty(n * k // 64, device=device).uniform_(0.5, 1.5, generator=made)
        x = torch.randn(m, k, generator=made, device=device).to(torch.bfloat16)
        call = (codes, absmax, None, None, None, None, "nf4", 64, n)
        dense = torch.randn(n, k, generator=made, device=device)
        more = _baselines.nf4(x, dense) if device == "cuda" else {}
        return {"llmops": lambda: ops.nf4_linear(x, *call), "cuBLAS bf16": _baselines.dense(x, n, seed), **more}

    return Case("nf4_linear", f"{name} NF4", {"M": m, "N": n, "K": k}, weight + 2 * m * (n + k), 2 * m * n * k, "bf16",
                weight, make, lambda device: _tiles(m, n, k, device))


def _tiles(m: int, n: int, k: int, device: str) -> dict[str, int]:
    index = torch.cuda.current_device() if device == "cuda" else None
    found = config.pick("nf4_linear", config.key(n, k), m, config.device_name(index))
    return dict(found or nf4_linear.tiles(m, n, k, config.processors(index)))

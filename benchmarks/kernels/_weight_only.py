"""Checks and timings of `int_linear`: 4 bits in groups of 128 and 8 bits by row, beside what else runs such weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels import _baselines
from benchmarks.kernels._contract import LAYERS, ROWS, Case, Check
from torch import Tensor

from llmops_kernels import config, int_linear
from llmops_kernels.reference.int_linear import pack


def checks(device: str) -> Iterator[Check]:
    """Every code, scales over three decades with an outlier row, zero points, rows and columns off the tile."""
    for bits, group, zero, m, n, k, dtype in (
            (4, 128, False, 1, 200, 640, torch.bfloat16), (4, 32, True, 16, 136, 352, torch.float16),
            (4, 64, True, 17, 264, 448, torch.bfloat16), (4, -1, False, 129, 200, 500, torch.float16),
            (8, -1, False, 3, 200, 640, torch.bfloat16), (8, 128, True, 33, 136, 384, torch.float16),
            (8, 32, False, 16, 136, 640, torch.bfloat16), (8, 64, True, 5, 200, 448, torch.bfloat16),
            (8, 32, True, 2, 136, 352, torch.float16), (8, -1, True, 1, 72, 700, torch.bfloat16),
            (3, 128, False, 2, 72, 640, torch.float16), (2, 64, True, 15, 72, 448, torch.bfloat16),
            (4, 128, False, 600, 136, 640, torch.bfloat16)):
        made = torch.Generator().manual_seed(bits + m)
        half, size = 1 << (bits - 1), k if group == -1 else group
        codes = torch.randint(-half, half, (n, k), generator=made, dtype=torch.int8)
        codes.view(-1)[: 2 * half] = torch.arange(-half, half, dtype=torch.int8)
        scale = torch.exp(torch.empty(n, k // size).uniform_(-6.9, 0, generator=made))
        scale[n // 2] *= 30
        scale = scale.to(dtype)
        points = torch.randint(-half, half, scale.shape, generator=made, dtype=torch.int8) if zero else None
        x = torch.randn(m, k, generator=made).to(dtype)
        packed = pack(codes.to(device), scale.to(device), None if points is None else points.to(device), bits=bits,
                      group_size=group)
        y = int_linear.int_linear(x.to(device), packed)
        assert torch.equal(y, int_linear.int_linear(x.to(device), packed)), "two runs differ"
        shifted = codes.double() if points is None else codes.double() - points.double().repeat_interleave(size, 1)
        exact = x.double() @ (shifted * scale.double().repeat_interleave(size, 1)).T
        yield Check(f"int_linear {bits} bits, group {group}{', zeros' if zero else ''}, M={m}, {dtype}",
                    float((y.cpu().double() - exact).norm() / exact.norm()), 3e-3 if dtype == torch.bfloat16 else 5e-4)


def cases(dry: bool) -> list[Case]:
    if dry:
        return [_case("tiny", m, 128, 256, 4, 128) for m in (1, 33)]
    return [_case(name, m, n, k, bits, group) for bits, group in ((4, 128), (8, -1))
            for name, (n, k) in LAYERS.items() for m in ROWS]


def _case(name: str, m: int, n: int, k: int, bits: int, group: int) -> Case:
    groups = 1 if group == -1 else k // group
    weight = n * k * bits // 8 + 2 * n * groups

    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        made = torch.Generator(device).manual_seed(seed)
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (n, k), generator=made, device=device, dtype=torch.int8)
        scale = torch.exp(torch.empty(n, groups, device=device).uniform_(-6.9, 0, generator=made)).to(torch.bfloat16)
        x = torch.randn(m, k, generator=made, device=device).to(torch.bfloat16)
        packed = pack(codes, scale, bits=bits, group_size=group)
        more = _baselines.four_bits(x, codes, scale, k if group == -1 else group, bits)
        return {"llmops": lambda: int_linear.int_linear(x, packed),
                "dequantize + cuBLAS": lambda: _then_dense(x, packed), "cuBLAS bf16": _baselines.dense(x, n, seed),
                **more}

    return Case("int_linear", f"{name} W{bits} {'row' if group == -1 else f'g{group}'}", {"M": m, "N": n, "K": k},
                weight + 2 * m * (n + k), 2 * m * n * k, "bf16", weight, make,
                lambda device: _tiles(m, n, k, bits, group, device))


def _then_dense(x: Tensor, packed: Any) -> Tensor:
    return int_linear.launch(x, packed.words, packed.scale, packed.zero, None, packed.bits, packed.group_size,
                             packed.rows, tile={"DENSE": 1})


def _tiles(m: int, n: int, k: int, bits: int, group: int, device: str) -> dict[str, int]:
    index = torch.cuda.current_device() if device == "cuda" else None
    found = config.pick("int_linear", config.key(n, k, bits=bits, group=group), m, config.device_name(index))
    return dict(found or int_linear.tiles(m, n, k, bits, group, config.processors(index)))

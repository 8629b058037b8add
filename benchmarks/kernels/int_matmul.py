"""The general integer matmul: its machine code and its checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import Case, Check
from tests.kernels.offline import Compiled

from llmops_kernels.int_matmul import int_matmul, int_matmul_kernel, pack_codes

#          dtype, bits, group (0: whole row), zero point, tile M, tile N, warps
TILES = [("bf16", 4, 128, False, 16, 64, 4), ("fp16", 4, 128, True, 16, 64, 4), ("bf16", 4, 32, False, 16, 64, 4),
         ("bf16", 8, 0, False, 16, 64, 4), ("fp16", 8, 32, True, 32, 64, 4), ("bf16", 4, 128, False, 64, 128, 8),
         ("bf16", 8, 0, False, 64, 128, 8), ("fp16", 4, 32, True, 64, 128, 8)]


def compiled() -> list[Compiled]:
    return [_case(*tile) for tile in TILES]


def _case(dtype: str, bits: int, group: int, zero: bool, m: int, n: int, warps: int) -> Compiled:
    constants: dict[str, Any] = {"GROUP": group, "NIBBLES": bits <= 4, "HAS_ZERO": zero, "BLOCK_M": m, "BLOCK_N": n,
                                 "BLOCK_K": 128}
    types = {"x_ptr": f"*{dtype}", "q_ptr": "*u8" if bits <= 4 else "*i8", "scale_ptr": f"*{dtype}",
             "zero_ptr": "*i8" if zero else f"*{dtype}", "y_ptr": f"*{dtype}"}
    name = f"int_matmul {dtype} {bits} bits, group {group or 'row'}{', zeros' if zero else ''}, {m}x{n}x128"
    return Compiled(name, int_matmul_kernel, types, constants, warps, 3, odd=("M", "groups"), weights=n * 128,
                    matrix="HMMA" if m < 64 else "HGMMA", copies=False)


def checks(device: str) -> Iterator[Check]:
    for bits, group, m, dtype in ((4, 128, 3, torch.bfloat16), (4, 100, 17, torch.float16),
                                  (8, -1, 16, torch.bfloat16)):
        made = torch.Generator().manual_seed(m)
        n, k = 72, 400 if group == 100 else 384
        size = k if group == -1 else group
        half = 1 << (bits - 1)
        codes = torch.randint(-half, half, (n, k), generator=made, dtype=torch.int8)
        scale = torch.exp(torch.empty(n, k // size).uniform_(-6.9, 0, generator=made)).to(dtype)
        x = torch.randn(m, k, generator=made).to(dtype)
        y = int_matmul(x.to(device), pack_codes(codes, bits).to(device), scale.to(device), None, bits=bits,
                       group_size=size).cpu().double()
        exact = x.double() @ (codes.double() * scale.double().repeat_interleave(size, 1)).T
        yield Check(f"int_matmul {bits} bits, group {group}, M={m}, {dtype}", float((y - exact).norm() / exact.norm()),
                    3e-3 if dtype == torch.bfloat16 else 5e-4)


def cases(dry: bool) -> list[Case]:
    """None: the general op is the fallback of `int_linear`, whose cases time what models run."""
    return []

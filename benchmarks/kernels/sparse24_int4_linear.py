"""2:4 weights of four bits: machine code, checks, and timings beside cuBLAS and the dense int4 linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import LAYERS, ROWS, Case, Check
from benchmarks.kernels._data import activations, cublas, limit, relative, seeded
from benchmarks.kernels.int8_linear import tiles
from tests.kernels.offline import Compiled
from torch import Tensor

from llmops_kernels import int_linear
from llmops_kernels import sparse24_int4_linear as op

MOST = {16: 7.1, 32: 8.0}  # thread-instructions a dense weight, by the tile's tokens


def compiled() -> list[Compiled]:
    """Every set of tiles that the rule gives for a Llama's layers; the kernel that makes a weight dense."""
    seen: dict[str, Compiled] = {}
    for n, k in LAYERS.values():
        for m in (1, 32):
            for dtype, rows in (("bf16", False), ("bf16", True), ("fp16", False)):
                case = _product(dtype, rows, op.rule(m, n, k, 132))
                seen.setdefault(case.name, case)
    dense = Compiled("2:4 int4 made dense", op.dense_kernel, {"c_ptr": "*u8", "places_ptr": "*u8", "scale_ptr": "*bf16",
                     "w_ptr": "*i64"}, {"BLOCK_N": 32, "BF16": True, "ROWS": False}, 4, 3, copies=False)
    return [*seen.values(), dense]


def _product(dtype: str, rows: bool, tiles: dict[str, int]) -> Compiled:
    tiles = dict(tiles)
    warps, stages, split = tiles.pop("num_warps"), tiles.pop("num_stages"), tiles.pop("SPLIT") > 1
    constants = tiles | {"PARTIAL": split, "BF16": dtype == "bf16", "BIAS": True, "ROWS": rows}
    types = {"x_ptr": "*i64", "c_ptr": "*u8", "places_ptr": "*u8", "scale_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}",
             "y_ptr": "*fp32" if split else f"*{dtype}"}
    name = (f"sparse24_int4_linear {dtype}, group {-1 if rows else 128}, {tiles['BLOCK_M']}x{tiles['BLOCK_N']}x256"
            f"{', split' if split else ''}")
    return Compiled(name, op.kernel, types, constants, warps, stages, odd=("M", "chunks", "stride_s"),
                    weights=tiles["BLOCK_N"] * 256, limit=MOST[tiles["BLOCK_M"]],
                    matrix="HMMA")


def weight(n: int, k: int, rows: bool, seed: int, dtype: torch.dtype, device: str = "cpu"
           ) -> tuple[Tensor, Tensor, Tensor]:
    """(codes (N, K) int8 with every code, two of four zero; scale over three decades; the dense weight in float64)."""
    made = seeded(seed, device)
    codes = torch.randint(-8, 8, (n, k // 4, 4), generator=made, dtype=torch.int8, device=device)
    codes.scatter_(-1, torch.rand(codes.shape, generator=made, device=device).argsort(-1)[..., :2], 0)
    codes = codes.view(n, k)
    scale = torch.exp(torch.empty(n, 1 if rows else -(-k // 128), device=device).uniform_(-6.9, 0, generator=made))
    scale[n // 2] *= 30
    scale = scale.to(dtype)
    wide = scale.double() if rows else scale.double().repeat_interleave(128, 1)[:, :k]
    return codes, scale, codes.double() * wide


def checks(device: str) -> Iterator[Check]:
    for m, n, k, rows, dtype in ((1, 200, 4096, False, torch.bfloat16), (16, 136, 300, True, torch.float16),
                                 (33, 72, 528, False, torch.float16), (129, 200, 528, False, torch.bfloat16)):
        codes, scale, dense = weight(n, k, rows, m, dtype)
        x = activations(m, k, m, dtype)
        y = op.sparse24_int4_linear(x.to(device), op.pack(codes.to(device), scale.to(device)))
        yield Check(f"sparse24_int4_linear M={m} N={n} K={k} {dtype}", relative(y, x.double() @ dense.T), limit(dtype))


def cases(dry: bool) -> list[Case]:
    layers = {"tiny": (128, 256)} if dry else LAYERS
    return [_case(name, m, n, k) for name, (n, k) in layers.items() for m in ((1, 64) if dry else ROWS)]


def _case(name: str, m: int, n: int, k: int) -> Case:
    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        codes, scale, _ = weight(n, k, False, seed, torch.bfloat16, device)
        packed = op.pack(codes.to(device), scale.to(device))
        dense = int_linear.pack(codes.to(device), scale.to(device), bits=4, group_size=128)
        x = activations(m, k, seed, device=device)
        return {"llmops": lambda: op.sparse24_int4_linear(x, packed), "cuBLAS bf16": cublas(m, n, k, seed, device),
                "llmops, dense int4": lambda: int_linear.int_linear(x, dense)}

    stored = n * k * 3 // 8 + n * k // 64
    return Case("sparse24_int4_linear", f"{name}, g128", {"M": m, "N": n, "K": k}, stored + 2 * (m * k + m * n),
                2 * m * n * k, "bf16", stored + 2 * m * k, make, lambda device: tiles(op, "", m, n, k, device))

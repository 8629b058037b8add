"""2:4 weights: machine code, checks, and timings beside cuBLAS on the dense weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import LAYERS, ROWS, Case, Check
from benchmarks.kernels._data import activations, cublas, limit, relative, seeded
from benchmarks.kernels.int8_linear import tiles
from tests.kernels.offline import Compiled
from torch import Tensor

from llmops_kernels import sparse24_linear

MOST = 6.5  # thread-instructions a dense weight; an H200 issues 8.7 while it reads one at 4.3 TB/s


def compiled() -> list[Compiled]:
    """Every set of tiles that the rule gives for a Llama's layers; the kernel that makes a weight dense."""
    seen: dict[str, Compiled] = {}
    for n, k in LAYERS.values():
        for m in (1, 4, 16, 32, 64):
            for dtype in ("bf16", "fp16"):
                case = _product(dtype, sparse24_linear.rule(m, n, k, 132))
                seen.setdefault(case.name, case)
    dense = Compiled("2:4 made dense", sparse24_linear.dense_kernel, {"v_ptr": "*i32", "places_ptr": "*u8",
                     "w_ptr": "*i64"}, {"BLOCK_N": 32}, 4, 3, copies=False)
    return [*seen.values(), dense]


def _product(dtype: str, tiles: dict[str, int]) -> Compiled:
    tiles = dict(tiles)
    warps, stages, split = tiles.pop("num_warps"), tiles.pop("num_stages"), tiles.pop("SPLIT") > 1
    swap = bool(tiles.pop("SWAP"))
    constants = tiles | {"PARTIAL": split, "SWAP": swap, "BF16": dtype == "bf16", "BIAS": True}
    types = {"x_ptr": "*i64", "v_ptr": "*i32", "places_ptr": "*u8", "bias_ptr": f"*{dtype}",
             "y_ptr": "*fp32" if split else f"*{dtype}"}
    name = (f"sparse24_linear {dtype}, {tiles['BLOCK_M']}x{tiles['BLOCK_N']}x256{', swapped' if swap else ''}"
            f"{', split' if split else ''}")
    return Compiled(name, sparse24_linear.kernel, types, constants, warps, stages,
                    odd=("M", "chunks"), weights=tiles["BLOCK_N"] * 256,
                    limit=MOST, matrix="HGMMA" if swap or tiles["BLOCK_M"] >= 64 else "HMMA")


def weight(n: int, k: int, seed: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Tensor:
    """Dense, two of each four columns zero; one row thirty times its size."""
    made = seeded(seed, device)
    w = torch.randn(n, k // 4, 4, generator=made, device=device)
    w.scatter_(-1, torch.rand(w.shape, generator=made, device=device).argsort(-1)[..., :2], 0.0)
    w[n // 2] *= 30
    return w.view(n, k).to(dtype)


def checks(device: str) -> Iterator[Check]:
    for m, n, k, dtype in ((1, 200, 4096, torch.bfloat16), (16, 136, 300, torch.float16), (33, 72, 528, torch.float16),
                           (129, 200, 528, torch.bfloat16)):
        w, x = weight(n, k, m, dtype), activations(m, k, m, dtype)
        y = sparse24_linear.sparse24_linear(x.to(device), sparse24_linear.pack(w.to(device)))
        yield Check(f"sparse24_linear M={m} N={n} K={k} {dtype}", relative(y, x.double() @ w.double().T), limit(dtype))
    if device == "cuda" and torch.backends.cusparselt.is_available():
        w, x = weight(256, 512, 1), activations(129, 512, 1)
        y = sparse24_linear.sparse24_linear(x.cuda(), sparse24_linear.pack(w.cuda(), prefill=True))
        yield Check("sparse24_linear cuSPARSELt M=129", relative(y, x.double() @ w.double().T), limit(torch.bfloat16))


def cases(dry: bool) -> list[Case]:
    layers = {"tiny": (128, 256)} if dry else LAYERS
    return [_case(name, m, n, k) for name, (n, k) in layers.items() for m in ((1, 64) if dry else ROWS)]


def _case(name: str, m: int, n: int, k: int) -> Case:
    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        dense = weight(n, k, seed, device=device)
        prefill = device == "cuda" and torch.backends.cusparselt.is_available()
        packed, x = sparse24_linear.pack(dense, prefill=prefill), activations(m, k, seed, device=device)
        plain = sparse24_linear.Sparse24(packed.values, packed.places)
        calls: dict[str, Callable[[], Any]] = {
            "llmops": lambda: sparse24_linear.sparse24_linear(x, packed),
            "cuBLAS bf16": cublas(m, n, k, seed, device)}
        if prefill and m >= sparse24_linear.DENSE_FROM:
            calls["llmops, dense copy + cuBLAS"] = lambda: sparse24_linear.sparse24_linear(x, plain)
        return calls

    return Case("sparse24_linear", name, {"M": m, "N": n, "K": k}, n * k * 9 // 8 + 2 * (m * k + m * n), 2 * m * n * k,
                "bf16", n * k * 9 // 8 + 2 * m * k, make, lambda device: tiles(sparse24_linear, "", m, n, k, device))

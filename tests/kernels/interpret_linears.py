"""Run by the tests of 8-bit and 2:4 linears under Triton's interpreter.

Outputs and workspaces are poisoned (torch's deterministic mode fills what `empty` gives with NaN and with the largest
integer), operands are views with a stride, and everything runs twice.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from benchmarks.kernels import fp8_linear as fp8_cases
from benchmarks.kernels import int8_linear as int8_cases
from benchmarks.kernels import sparse24_int4_linear as int4_cases
from benchmarks.kernels import sparse24_linear as sparse_cases
from benchmarks.kernels._data import activations, relative
from torch import Tensor

from llmops_kernels import _scaled_matmul, fp8_linear, int8_linear, sparse24_int4_linear, sparse24_linear
from llmops_kernels.quantize_tokens import quantize_tokens
from llmops_kernels.reference.int8_linear import int8_linear as int8_reference

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FP8 = torch.float8_e4m3fn


def strided(x: Tensor, more: int = 16) -> Tensor:
    """The same numbers with rows that are further apart; between them the largest there are."""
    wide = torch.full((x.shape[0], x.shape[1] + more), 127 if x.dtype == torch.int8 else 400.0).to(x.dtype)
    wide[:, :x.shape[1]] = x
    return wide[:, :x.shape[1]]


def of_rows(y: Tensor, exact: Tensor) -> float:
    """The worst relative error of a column of y, which is a row of the weight: an outlier row hides nothing."""
    if y.numel() == 0:
        return 0.0
    return float(((y.double() - exact).norm(dim=0) / exact.norm(dim=0)).max())


def bias_of(n: int, wanted: bool) -> Tensor | None:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)) if wanted else None


def int8(m: int, n: int, k: int, dtype: str, bias: bool, tiles: dict[str, int], seed: int) -> dict[str, Any]:
    """equal: the same bits as the reference, whose sums are exact integers (a bias may be added in one rounding)."""
    w, scale = int8_cases.weights(n, k, seed)
    a, s = quantize_tokens(activations(m, k, seed))
    b = bias_of(n, bias)
    chosen = int8_linear.rule(m, n, k, 132) | tiles
    call = (strided(a), strided(s, 3)[:, :1], strided(w), scale, b, TYPES[dtype], chosen)
    y, again = int8_linear.launch(*call), int8_linear.launch(*call)
    wanted = int8_reference(a, s, w, scale, b, TYPES[dtype])
    exact = (a.double() @ w.double().T) * s.double() * scale.double().T + (0 if b is None else b.double())
    return {"equal": torch.equal(y, wanted), "repeats": torch.equal(y, again),
            "error": relative(y, exact) if y.numel() else 0.0, "rows": of_rows(y, exact)}


def fp8(kind: str, m: int, n: int, k: int, dtype: str, bias: bool, tiles: dict[str, int], seed: int) -> dict[str, Any]:
    w, scale = fp8_cases.weights(n, k, kind, seed)
    a, s = quantize_tokens(activations(m, k, seed), FP8, group_size=128 if kind == "block" else -1)
    b = bias_of(n, bias)
    chosen = fp8_linear.rule(m, n, k, 132) | tiles
    call = (strided(a), strided(s, 3)[:, :s.shape[1]], strided(w), scale, b, TYPES[dtype], chosen)
    y, again = fp8_linear.launch(*call), fp8_linear.launch(*call)
    exact = fp8_cases.exact(a, s, w, scale, kind) + (0 if b is None else b.double())
    return {"equal": True, "repeats": torch.equal(y, again), "error": relative(y, exact) if y.numel() else 0.0,
            "rows": of_rows(y, exact)}


def sparse(m: int, n: int, k: int, dtype: str, bias: bool, tiles: dict[str, int], seed: int) -> dict[str, Any]:
    w = sparse_cases.weight(n, k, seed, TYPES[dtype])
    w[0] = 0  # a row, and a group, of fewer than two numbers
    w[1, :4] = torch.tensor([0.0, 0, 0, 5])
    x = strided(activations(m, k, seed, TYPES[dtype]), 4 + seed)  # rows that begin at whole words, and some that do not
    b = bias_of(n, bias)
    packed = sparse24_linear.pack(w)
    dense = sparse24_linear.to_dense(packed.values, packed.places)
    chosen = sparse24_linear.rule(m, n, k, 132) | tiles
    call = (x, packed.values, packed.places, None if b is None else b.to(x.dtype), None, chosen)
    y, again = sparse24_linear.launch(*call), sparse24_linear.launch(*call)
    exact = x.double() @ w.double().T + (0 if b is None else call[3].double())
    kept = [i for i in range(n) if i or bias]
    return {"equal": torch.equal(dense, w), "repeats": torch.equal(y, again),
            "error": relative(y, exact) if y.numel() else 0.0, "rows": of_rows(y[:, kept], exact[:, kept])}


def sparse_int4(m: int, n: int, k: int, dtype: str, rows: bool, bias: bool, tiles: dict[str, int], seed: int
                ) -> dict[str, Any]:
    codes, scale, wide = int4_cases.weight(n, k, rows, seed, TYPES[dtype])
    x = strided(activations(m, k, seed, TYPES[dtype]), 4 + seed)
    b = bias_of(n, bias)
    packed = sparse24_int4_linear.pack(codes, scale)
    dense = sparse24_int4_linear.to_dense(*packed, x.dtype)
    chosen = sparse24_int4_linear.rule(m, n, k, 132) | tiles
    call = (x, *packed, None if b is None else b.to(x.dtype), chosen)
    y, again = sparse24_int4_linear.launch(*call), sparse24_int4_linear.launch(*call)
    exact = x.double() @ wide.T + (0 if b is None else b.to(x.dtype).double())
    return {"equal": torch.equal(dense, wide.to(x.dtype)), "repeats": torch.equal(y, again),
            "error": relative(y, exact) if y.numel() else 0.0, "rows": of_rows(y, exact)}


def into(seed: int) -> dict[str, Any]:
    """A product into a view: what lies between its rows stays."""
    w, scale = int8_cases.weights(70, 96, seed)
    a, s = quantize_tokens(activations(5, 96, seed))
    results = []
    for tiles in ({}, {"SPLIT": 2, "BLOCK_K": 32}):
        wide = torch.full((5, 100), 7.0)
        chosen = int8_linear.rule(5, 70, 96, 132) | tiles
        _scaled_matmul.run(a, s, w, scale, None, wide[:, 10:80], _scaled_matmul.CHANNEL, chosen)
        results += [torch.equal(wide[:, 10:80], int8_reference(a, s, w, scale, None, torch.float32)),
                    bool((wide[:, :10] == 7).all()), bool((wide[:, 80:] == 7).all())]
    return {"equal": all(results), "repeats": True, "error": 0.0, "rows": 0.0}


def far(which: str) -> dict[str, Any]:
    """Three rows of an operand, the last past 2^31: an offset in 32 bits would read, or crash, elsewhere.

    A stride that does not fit 32 bits itself would be passed in 64.
    """
    k, distance = 64, 2**30 + 16
    w, scale = int8_cases.weights(3, k, 0)
    a, s = quantize_tokens(activations(3, k, 0))
    spread = torch.empty(2 * distance + k, dtype=torch.int8).as_strided((3, k), (distance, 1))
    spread.copy_(a if which == "a" else w)
    y = int8_linear.int8_linear(spread if which == "a" else a, s, w if which == "a" else spread, scale)
    wanted = int8_linear.int8_linear(a, s, w, scale)
    return {"equal": torch.equal(y, wanted), "repeats": True, "error": 0.0, "rows": 0.0}


if __name__ == "__main__":
    functions = {"int8": int8, "fp8": fp8, "sparse": sparse, "sparse_int4": sparse_int4, "into": into, "far": far}
    for name, *case in json.loads(sys.argv[1]):
        torch.use_deterministic_algorithms(name != "far")  # poisons; a far tensor is too large to fill
        print(json.dumps(functions[name](*case)), flush=True)

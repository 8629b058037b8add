"""Run by test_quantize_tokens.py, test_rms_norm.py and test_swiglu_quantize.py under Triton's interpreter.

Outputs are poisoned before a kernel writes them (torch's deterministic mode fills what `empty` gives with NaN and with
the largest integer), inputs are views with a stride, and everything runs twice.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from benchmarks.kernels._data import activations, relative
from benchmarks.kernels.rms_norm import EPS, exact, half_step
from torch import Tensor

from llmops_kernels import quantize_tokens, rms_norm, swiglu_quantize
from llmops_kernels.reference.quantize_tokens import quantize_tokens as reference

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp16": torch.float16, "bf16": torch.bfloat16,
         "fp32": torch.float32}


def strided(x: Tensor) -> Tensor:
    """The same numbers with rows that are further apart, poison between them."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), float("nan"), dtype=x.dtype)
    wide[:, 8:8 + x.shape[1]] = x
    return wide[:, 8:8 + x.shape[1]]


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """Bit for bit, NaN like NaN."""
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
               for a, b in zip(first, second, strict=True))


def steps(codes: Tensor, scale: Tensor, wanted: Tensor, group: int) -> float:
    if wanted.numel() == 0:
        return 0.0
    grid = scale if group == -1 else scale.repeat_interleave(group, 1)[:, :wanted.shape[1]]
    return half_step(codes, grid, wanted)


def quantize(m: int, k: int, dtype: str, group: int, source: str, special: str, seed: int) -> dict[str, Any]:
    x = activations(m, k, seed, TYPES[source])
    if special == "zeros":
        x[0] = 0
    if special == "ties" and m:  # scale 1 and 1 / 2: halves to round, to even
        x[0] = (torch.arange(k) % 255 - 127) * 0.5
        x[-1] = 127 if dtype == "int8" else 448
    if special == "nan":
        x[m // 2, k // 2] = float("nan")
    if special == "tiny":
        x[0] *= 2.0**-110
    x = strided(x)
    found = quantize_tokens.quantize_tokens(x, TYPES[dtype], group_size=group)
    wanted = reference(x, TYPES[dtype], group)
    if special == "nan":  # the token's scale (or its group's) is NaN, its neighbours' are not
        others = [i for i in range(m) if i != m // 2]
        return {"repeats": bool(found[1][m // 2].isnan().any()),
                "equal": same(tuple(part[others] for part in found), tuple(part[others] for part in wanted))}
    again = quantize_tokens.quantize_tokens(x, TYPES[dtype], group_size=group)
    return {"repeats": same(found, again), "equal": same(found, wanted)}


def norm(m: int, k: int, dtype: str | None, group: int, source: str, add: bool, seed: int) -> dict[str, Any]:
    x, r = (strided(activations(m, k, seed + i, TYPES[source])) for i in range(2))
    weight = torch.empty(k).uniform_(0.2, 2, generator=torch.Generator().manual_seed(seed)).to(TYPES[source])
    h = (x.float() + r.float()).to(x.dtype) if add else x

    def call() -> tuple[Tensor, ...]:
        if dtype is None:
            return rms_norm.add_rms_norm(x, r, weight, EPS)
        if add:
            return rms_norm.add_rms_norm_quantize(x, r, weight, EPS, TYPES[dtype], group_size=group)
        return rms_norm.rms_norm_quantize(x, weight, EPS, TYPES[dtype], group_size=group)

    found = call()
    result: dict[str, Any] = {"repeats": same(found, call()), "equal": not add or same(found[-1:], (h,))}
    wanted = exact(h, weight)
    if dtype is None:
        return result | {"error": relative(found[0], wanted) if m else 0.0}
    return result | {"steps": steps(found[0], found[1], wanted, group)}


def swiglu(m: int, k: int, dtype: str, group: int, source: str, seed: int) -> dict[str, Any]:
    both = activations(m, 2 * k, seed, TYPES[source])
    if m:
        both[0, :8] = torch.tensor([0.0, 90.0, -90.0, 1e4, -1e4, 1e-3, -0.0, 5.0])
    gate, up = both[:, :k], both[:, k:]  # one packed linear's output
    found = swiglu_quantize.swiglu_quantize(gate, up, TYPES[dtype], group_size=group)
    again = swiglu_quantize.swiglu_quantize(gate, up, TYPES[dtype], group_size=group)
    wanted = gate.double() * torch.sigmoid(gate.double()) * up.double()
    return {"repeats": same(found, again), "equal": True, "steps": steps(found[0], found[1], wanted, group)}


def far(name: str) -> dict[str, Any]:
    """Three rows, the last past 2^31: an offset in 32 bits would read, or crash, elsewhere."""
    k, distance = 64, 2**30 + 8
    store = torch.empty(2 * distance + k, dtype=torch.float16)  # 4 GiB of addresses, of which three pages are touched
    x = store.as_strided((3, k), (distance, 1))
    x.copy_(activations(3, k, 0, torch.float16))
    near = x.clone()
    if name == "quantize":
        pair = [quantize_tokens.quantize_tokens(each) for each in (x, near)]
    elif name == "norm":
        weight = torch.ones(k, dtype=torch.float16)
        pair = [rms_norm.add_rms_norm(each, near, weight, EPS) for each in (x, near)]
    else:
        pair = [swiglu_quantize.swiglu_quantize(near, each) for each in (x, near)]
    return {"repeats": True, "equal": same(pair[0], pair[1])}


if __name__ == "__main__":
    functions = {"quantize": quantize, "norm": norm, "swiglu": swiglu}
    for which, *case in json.loads(sys.argv[1]):
        torch.use_deterministic_algorithms(which != "far")  # poisons; a far tensor is too large to fill
        print(json.dumps(far(*case) if which == "far" else functions[which](*case)), flush=True)

"""Run by test_kv.py in a process of its own under TRITON_INTERPRET=1: the kernels of the KV cache beside float64.

A JSON line a case: what was asked, and what was found.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from tests.kernels.kv_case import empty_cache, vectors
from torch import Tensor

from llmops_kernels.kv_append import kv_append, kv_rope_append
from llmops_kernels.kv_attention import kv_attention
from llmops_kernels.reference import kv_append as append_reference
from llmops_kernels.reference.kv_attention import kv_attention as attention_reference


def steps(found: Tensor, wanted: Tensor, format: str) -> tuple[float, float]:
    """(share of codes that differ, by how many steps at most)."""
    if format == "int4":
        found, wanted = (torch.cat([codes & 15, codes >> 4], -1) for codes in (found, wanted))
    elif format == "fp8":  # in order of size, both zeros in one place
        found, wanted = (codes.view(torch.int8) for codes in (found, wanted))
        found, wanted = (torch.where(codes < 0, -(codes & 127), codes) for codes in (found, wanted))
    apart = (found.short() - wanted.short()).abs()
    return float((apart > 0).double().mean()), float(apart.max())


def compared(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], format: str) -> dict[str, Any]:
    shares = [steps(a, b, format) for a, b in zip(found[::2], wanted[::2], strict=True)]
    scales = [bool(torch.equal(a.view(torch.int16), b.view(torch.int16)))
              for a, b in zip(found[1::2], wanted[1::2], strict=True)]
    return {"share": max(share for share, _ in shares), "steps": max(most for _, most in shares), "scales": all(scales)}


def append(format: str, dtype: str, B: int, H: int, T: int, D: int) -> dict[str, Any]:
    """Starts of each row's own, the last of them running out of room; the reference goes through the same poison."""
    N, typed = T + 5, getattr(torch, dtype)
    key, value = vectors(1, B, H, T, D, typed), vectors(2, B, H, T, D, typed)
    start = torch.tensor([2, N - 1, 0, 1][:B])
    found, wanted = empty_cache(B, H, N, D, format), empty_cache(B, H, N, D, format)
    kv_append(key, value, *found, start, format)
    append_reference.kv_append(key, value, *wanted, start, format)
    return compared(found, wanted, format)


def rope(format: str, dtype: str, B: int, H: int, G: int, T: int, D: int) -> dict[str, Any]:
    typed = getattr(torch, dtype)
    query, key, value = (vectors(seed, B, heads, T, D, typed) for seed, heads in ((3, H * G), (4, H), (5, H)))
    angle = torch.rand(1, T, D // 2, generator=torch.Generator().manual_seed(6)).repeat(1, 1, 2) * 50
    found, wanted = empty_cache(B, H, T, D, format), empty_cache(B, H, T, D, format)
    start = torch.zeros(1, dtype=torch.int32)
    turned = kv_rope_append(query, key, value, angle.cos(), angle.sin(), *found, start, format)
    exact = append_reference.kv_rope_append(query.double(), key.double(), value.double(), angle.cos(), angle.sin(),
                                            *wanted, start, format)
    return compared(found, wanted, format) | {"error": float((turned.double() - exact).norm() / exact.norm())}


def attention(format: str, dtype: str, B: int, H: int, G: int, T: int, D: int, N: int,
              more: dict[str, Any]) -> dict[str, Any]:
    """more: first, window, softcap, mask. Rows end at lengths of their own; what lies beyond is poison."""
    typed, made = getattr(torch, dtype), torch.Generator().manual_seed(N)
    held = empty_cache(B, H, N, D, format)
    lengths = torch.tensor([N, max(N - 7, T), 0][:B])
    keys, values = (vectors(seed, B, H, N, D, typed) * 0.05 for seed in (7, 8))
    for row in range(B):
        append_reference.kv_append(keys[row:row + 1, :, :int(lengths[row])], values[row:row + 1, :, :int(lengths[row])],
                                   *(part[row:row + 1] for part in held), torch.zeros(1, dtype=torch.int64), format)
    query = torch.randn(B, T, H * G, D, generator=made).to(typed).transpose(1, 2)
    first = torch.tensor([5, 0, 0][:B], dtype=torch.int32) if more.get("first") else None
    mask = torch.rand(B, 1, T, N - 3, generator=made) > 0.3 if more.get("mask") else None
    options = {"scale": D ** -0.5, "window": more.get("window", 0), "softcap": more.get("softcap", 0.0)}
    found = kv_attention(query, *held, lengths, first, mask, **options, format=format)
    again = kv_attention(query, *held, lengths, first, mask, **options, format=format)
    exact = attention_reference(query, *held, lengths, first, mask, *options.values(), format, exact=torch.float64)
    rows = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-9)
    return {"error": float((found.double() - exact).norm() / exact.norm()), "worst_row": float(rows.max()),
            "repeat": bool(torch.equal(found, again))}


def far(format: str) -> dict[str, Any]:
    """Three rows of a batch, the last past 2^31: of 2 GiB of address space some pages are touched."""
    D, T = 16, 3
    row = (1 << 30) + 64
    codes = [torch.empty(2 * row + 4096, dtype=torch.int8).as_strided((3, 1, 64, D), (row, 64 * D, D, 1))
             for _ in range(2)]
    scales = [torch.zeros(3, 1, 64, 1, dtype=torch.bfloat16) for _ in range(2)]
    held = (codes[0], scales[0], codes[1], scales[1])
    key, value = vectors(9, 3, 1, T, D, torch.float16), vectors(10, 3, 1, T, D, torch.float16)
    kv_append(key, value, *held, torch.zeros(1, dtype=torch.int64), format)
    near = empty_cache(3, 1, 64, D, format)
    append_reference.kv_append(key, value, *near, torch.zeros(1, dtype=torch.int64), format)
    query, length = torch.randn(3, 1, 1, D, generator=torch.Generator().manual_seed(1)).half(), torch.tensor([T])
    found = kv_attention(query, *held, length, scale=0.25, format=format)
    exact = attention_reference(query, *near, length, None, None, 0.25, 0, 0.0, format, exact=torch.float64)
    return {"same": bool(torch.equal(codes[0][:, :, :T], near[0][:, :, :T])),
            "error": float((found.double() - exact).norm() / exact.norm())}


def wrong(format: str) -> dict[str, Any]:
    """NaN and infinity in a vector must show when it is read."""
    x = torch.randn(1, 1, 3, 32).half()
    warnings.simplefilter("ignore")  # numpy does not like what is tried here
    x[0, 0, 0, 5], x[0, 0, 1, 7] = float("nan"), float("inf")
    held = empty_cache(1, 1, 3, 32, format)
    kv_append(x, x, *held, torch.zeros(1, dtype=torch.int64), format)
    dense = append_reference.dequantize(held[0], held[1], format)
    return {"finite": [bool(row.isfinite().all()) for row in dense[0, 0]]}


def none(format: str, B: int, T: int) -> dict[str, Any]:
    """No token or no row: nothing is written, and what is returned is empty in the right shape."""
    H, G, D, N = 2, 3, 32, 5
    query, key = torch.zeros(B, H * G, T, D).half(), torch.zeros(B, H, T, D).half()
    angles, start = torch.ones(1, T, D), torch.zeros(1, dtype=torch.int64)
    held, before = empty_cache(B, H, N, D, format), empty_cache(B, H, N, D, format)
    kv_append(key, key, *held, start, format)
    turned = kv_rope_append(query, key, key, angles, angles, *held, start, format)
    y = kv_attention(query, *held, start, scale=1.0, format=format)
    same = all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
               for a, b in zip(held, before, strict=True))
    return {"same": same, "shapes": [list(turned.shape), list(y.shape)]}


CASES = {"none": none, "append": append, "rope": rope, "attention": attention, "far": far, "wrong": wrong}

if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        print(json.dumps({"case": [name, *arguments], **CASES[name](*arguments)}), flush=True)

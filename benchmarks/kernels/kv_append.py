"""Appending to a quantized KV cache, with RoPE and without, beside the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import Case, Check
from tests.kernels.kv_case import empty_cache, vectors
from tests.kernels.offline import Compiled
from torch import Tensor

from llmops_kernels._kv import FORMATS
from llmops_kernels.kv_append import append_kernel, kv_append, kv_rope_append, tiles
from llmops_kernels.reference import kv_append as reference

CODES = {"int8": "*i8", "fp8": "*fp8e4nv", "int4": "*u8"}


def compiled() -> list[Compiled]:
    return [_compiled(format, rope, D, rows) for format in FORMATS for rope, D, rows in
            ((True, 128, 1), (False, 128, 4), (True, 256, 4))]


def _compiled(format: str, rope: bool, D: int, rows: int) -> Compiled:
    types = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "cos_ptr": "*bf16", "sin_ptr": "*bf16",
             "turned_ptr": "*bf16", "k_codes_ptr": CODES[format], "k_scales_ptr": "*bf16", "v_codes_ptr": CODES[format],
             "v_scales_ptr": "*bf16", "start_ptr": "*i64"}
    constants = {"FORMAT": FORMATS[format], "ROPE": rope, "D": D, "ROWS": rows}
    odd = ("rows", "T", "H", "G", "scale_b", "scale_h", "scale_t", "start_b")
    name = f"kv_{'rope_' if rope else ''}append {format}, heads of {D}, {rows} a program"
    return Compiled(name, append_kernel, types, constants, 1, 1, odd=odd, copies=False)


def checks(device: str) -> Iterator[Check]:
    for format, dtype, B, H, G, T, D in (("int8", torch.bfloat16, 2, 2, 4, 3, 128), ("fp8", torch.float16, 2, 1, 2, 5,
                                         64), ("int4", torch.bfloat16, 2, 2, 4, 1, 128)):
        query, key, value = (vectors(seed, B, heads, T, D, dtype) for seed, heads in ((3, H * G), (4, H), (5, H)))
        angle = torch.rand(1, T, D // 2, generator=torch.Generator().manual_seed(6)).repeat(1, 1, 2) * 50
        start = torch.tensor([1, 2][:B])
        wanted = empty_cache(B, H, T + 4, D, format)
        held = [part.to(device) for part in empty_cache(B, H, T + 4, D, format)]
        exact = reference.kv_rope_append(query.double(), key.double(), value.double(), angle.cos(), angle.sin(),
                                         *wanted, start, format)
        moved = [part.to(device) for part in (query, key, value, angle.cos(), angle.sin())]
        turned = kv_rope_append(*moved, *held, start.to(device), format).cpu().double()
        yield Check(f"kv_rope_append {format}, {dtype}: queries", float((turned - exact).norm() / exact.norm()),
                    3e-3 if dtype == torch.bfloat16 else 5e-4)
        for name, at in (("keys", 0), ("values", 2)):
            dense = [reference.dequantize(part[at].cpu(), part[at + 1].cpu(), format) for part in (held, wanted)]
            found, right = (torch.cat([part[row, :, row + 1:][:, :T] for row in range(B)]) for part in dense)
            # bit for bit but for ties, which RoPE in float32 and in float64 may decide differently
            yield Check(f"kv_rope_append {format}, {dtype}: {name}", float((found - right).norm() / right.norm()), 1e-2)


def cases(dry: bool) -> list[Case]:
    """A decode step of Llama-3-8B at batch 1 and 32, and the append of a prompt of 4096 tokens."""
    if dry:
        return [_case((1, 2, 32), 1, 1, "int4", True)]
    heads = (8, 4, 128)
    return [_case(heads, B, T, format, rope) for B, T, rope in ((1, 1, True), (32, 1, True), (1, 4096, False))
            for format in ("int8", "fp8", "int4")]


def _case(heads: tuple[int, int, int], B: int, T: int, format: str, rope: bool) -> Case:
    H, G, D = heads
    stored = 2 * B * H * T * (D // 2 + 4 if format == "int4" else D + 2)
    read = 2 * B * H * T * D * 2 + (2 * 2 * B * H * G * T * D if rope else 0)

    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        made = torch.Generator(device).manual_seed(seed)
        q, k, v = (torch.randn(B, n, T, D, generator=made, device=device).to(torch.bfloat16) for n in (H * G, H, H))
        held = [part.to(device) for part in empty_cache(B, H, T, D, format)]
        dense = [torch.empty_like(k), torch.empty_like(v)]
        angle = torch.rand(1, T, D, generator=made, device=device)
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
        start = torch.zeros(1, dtype=torch.int64, device=device)
        place = torch.arange(T, device=device)

        def stock() -> Tensor:
            """What a model written in PyTorch does: RoPE, then a copy into a static bf16 cache."""
            turned = [_rope(x, cos, sin) for x in (q, k)] if rope else [q, k]
            dense[0].index_copy_(2, place, turned[1])
            dense[1].index_copy_(2, place, v)
            return turned[0]

        if rope:
            return {"llmops": lambda: kv_rope_append(q, k, v, cos, sin, *held, start, format), "torch bf16": stock}
        return {"llmops": lambda: kv_append(k, v, *held, start, format), "torch bf16": stock}

    name = f"{'rope + ' if rope else ''}append {format}, batch {B}, {T} tokens"
    return Case("kv_rope_append" if rope else "kv_append", name, {"B": B, "T": T, "H": H, "G": G, "D": D},
                stored + read, 0, "bf16", stored + 2 * read, make,
                lambda device: tiles(D, B * H * T, torch.device(device)))


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

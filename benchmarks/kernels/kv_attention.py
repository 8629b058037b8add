"""Decode attention over a quantized KV cache, beside bf16 SDPA over a dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import Case, Check
from tests.kernels.kv_case import empty_cache, vectors
from tests.kernels.offline import Compiled
from torch import Tensor
from torch.nn import functional as F

from llmops_kernels._kv import FORMATS
from llmops_kernels.kv_attention import attention_kernel, join_kernel, kv_attention, tiles
from llmops_kernels.reference.kv_append import kv_append
from llmops_kernels.reference.kv_attention import kv_attention as reference

#        dtype, format, D, tile M, tile N, warps, instructions a code at most (0: not gated)
TILES = [("bf16", "int8", 128, 16, 64, 4, 5.2), ("fp16", "fp8", 128, 16, 64, 4, 5.2),
         ("bf16", "int4", 128, 16, 128, 4, 4.2), ("fp16", "int4", 64, 16, 128, 4, 0.0),
         ("bf16", "int8", 256, 16, 32, 4, 0.0), ("bf16", "int4", 256, 16, 32, 4, 0.0),
         ("bf16", "int8", 128, 32, 64, 4, 0.0), ("bf16", "fp8", 128, 32, 64, 4, 0.0),
         ("bf16", "int4", 128, 32, 64, 4, 0.0), ("bf16", "int4", 256, 32, 32, 4, 0.0)]
CODES = {"int8": "*i8", "fp8": "*fp8e4nv", "int4": "*u8"}
EIGHT_B, SEVENTY_B = (8, 4, 128), (8, 8, 128)  # key-value heads, queries a head, numbers a head


def compiled() -> list[Compiled]:
    made = [_attention(*tile) for tile in TILES]
    made += [_attention("bf16", "int8", 128, 16, 64, 4, 5.6, 1), _attention("bf16", "int4", 128, 16, 128, 4, 4.3, 1)]
    return made + [Compiled(f"kv_attention join {name}", join_kernel,
                            {"part_ptr": "*fp32", "norm_ptr": "*fp32", "out_ptr": "*bf16"},
                            {"FORMAT": FORMATS[name], "D": 128, "SPLITS": 64, "CHUNK": 16}, 4, 1,
                            odd=("T", "G", "H", "splits"), copies=False) for name in ("int8", "int4")]


def _attention(dtype: str, name: str, D: int, m: int, n: int, warps: int, limit: float, mask: int = 0) -> Compiled:
    scales = "*i32" if name == "int4" else "*bf16"
    types = {"q_ptr": f"*{dtype}", "k_ptr": CODES[name], "v_ptr": CODES[name], "ks_ptr": scales, "vs_ptr": scales,
             "length_ptr": "*i64", "first_ptr": "*i64", "mask_ptr": "*u8", "part_ptr": "*fp32", "norm_ptr": "*fp32",
             "scale": "fp32", "softcap": "fp32"}
    constants = {"FORMAT": FORMATS[name], "HAS_FIRST": False, "MASK": mask, "HAS_WINDOW": False, "SOFTCAP": False,
                 "EVEN": True, "D": D, "BLOCK_M": m, "BLOCK_N": n, "scale_t": 1}
    odd = ("T", "G", "H", "window", "splits", "length_b", "first_b", "mask_b", "mask_t", "mask_n")
    told = f"kv_attention {dtype} {name}, heads of {D}, {m}x{n}{', mask' if mask else ''}"
    return Compiled(told, attention_kernel, types, constants, warps, 3, odd=odd, weights=2 * n * D, limit=limit,
                    matrix="HMMA")


def checks(device: str) -> Iterator[Check]:
    for format, dtype, B, H, G, T, D, N, more in (
            ("int8", torch.bfloat16, 2, 2, 4, 1, 128, 200, {}), ("int4", torch.bfloat16, 2, 2, 4, 1, 128, 256, {}),
            ("fp8", torch.float16, 2, 1, 4, 2, 64, 130, {"window": 50}),
            ("int4", torch.float16, 1, 1, 17, 1, 64, 75, {"mask": True})):
        held = empty_cache(B, H, N, D, format)
        length = torch.tensor([N, N - 9][:B])
        for row in range(B):
            x, y = (vectors(seed + row, 1, H, int(length[row]), D, dtype) * 0.03 for seed in (1, 5))
            kv_append(x, y, *(part[row:row + 1] for part in held), torch.zeros(1, dtype=torch.int64), format)
        query = torch.randn(B, H * G, T, D, generator=torch.Generator().manual_seed(3)).to(dtype)
        mask = torch.rand(B, 1, T, N, generator=torch.Generator().manual_seed(4)) > 0.3 if "mask" in more else None
        window = int(more.get("window", 0))
        exact = reference(query, *held, length, None, mask, D ** -0.5, window, 0.0, format, exact=torch.float64)
        moved = [part.to(device) for part in (query, *held, length)]
        there = None if mask is None else mask.to(device)
        y = kv_attention(*moved, None, there, scale=D ** -0.5, window=window, format=format)
        again = kv_attention(*moved, None, there, scale=D ** -0.5, window=window, format=format)
        assert torch.equal(y, again), f"kv_attention {format}: two runs differ"
        # at 4 bits a value is a code over a minimum of the other sign: the sum is smaller than its parts
        limit = 3e-3 if dtype == torch.bfloat16 else 1e-3 if format == "int4" else 5e-4
        yield Check(f"kv_attention {format}, {dtype}, T={T}, G={G}, {more or 'plain'}",
                    float((y.cpu().double() - exact).norm() / exact.norm()), limit)


def cases(dry: bool) -> list[Case]:
    """8 k of context at batch 1 and 32."""
    if dry:
        return [_case("dry", (1, 2, 32), 1, 64, "int4")]
    return [_case(name, heads, batch, 8192, format) for batch in (1, 32) for name, heads in
            (("8B", EIGHT_B), ("70B", SEVENTY_B)) for format in ("int8", "fp8", "int4") if name == "8B" or batch == 1]


def _case(name: str, heads: tuple[int, int, int], B: int, N: int, format: str) -> Case:
    H, G, D = heads
    bytes_ = 2 * B * H * N * (D // 2 + 4 if format == "int4" else D + 2)
    footprint = bytes_ + 4 * B * H * N * D  # the dense cache beside it

    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        made = torch.Generator(device).manual_seed(seed)
        k, v, q = (torch.randn(B, heads, T, D, generator=made, device=device, dtype=torch.float32).to(torch.bfloat16)
                   for heads, T in ((H, N), (H, N), (H * G, 1)))
        held: list[Tensor] = []
        for x in (k, v):
            held += [codes_or_scales for codes_or_scales in _quantized(x, format)]
        length = torch.tensor([N], device=device)
        return {"llmops": lambda: kv_attention(q, *held, length, scale=D ** -0.5, format=format),
                "SDPA bf16": lambda: F.scaled_dot_product_attention(q, k, v, scale=D ** -0.5, enable_gqa=True)}

    return Case("kv_attention", f"{name} {format}, batch {B}, context {N}",
                {"B": B, "H": H, "G": G, "D": D, "N": N}, bytes_, 4 * B * H * G * N * D, "bf16", footprint, make,
                lambda device: tiles(format, D, N, torch.device(device)))


def _quantized(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """(codes, scales) by the op, so that it is what a model reads."""
    from llmops_kernels.kv_append import kv_append as append

    B, H, N, D = x.shape
    held = [part.to(x.device) for part in empty_cache(B, H, N, D, format)]
    append(x, x, held[0], held[1], held[2], held[3], torch.zeros(1, dtype=torch.int64, device=x.device), format)
    return held[0], held[1]

"""What `llmops_kernels.tune` can tune: for each op random data of a shape, and the values its tiles may take.

The values are axes, not a list of all tiles: the tuner goes along one after the other from the op's own rule, and from
other starts where an op has quite another way (a dense copy and cuBLAS, which has no tiles). A set of tiles that an op
or the compiler refuses, or whose result is not that of the rule's, is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import (
    config,
    fp8_linear,
    int8_linear,
    int_linear,
    kv_attention,
    nf4_linear,
    sparse24_int4_linear,
    sparse24_linear,
)
from ._library import ops
from .kv_append import kv_append
from .quantize_tokens import quantize_tokens

__all__ = ["TRIALS", "WIDTHS", "Axes", "Trial"]

Axes = dict[str, tuple[int, ...]]
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Trial:
    """One entry of a table to find."""

    op: str
    shape: str  # its key in the table
    m: int
    starts: tuple[config.Config, ...]  # the rule's first
    axes: Axes
    footprint: int  # bytes of one set of data
    make: Callable[[int], Callable[[], Tensor]]  # seed -> the call, on data of its own


def _linear_axes(m: int, swapped: tuple[int, ...]) -> Axes:
    """For the products of 8-bit codes. Few tokens: how K is split matters most; many: the tile."""
    if m <= 64:
        return {"SPLIT": (1, 2, 3, 4, 6, 8, 12, 16), "BLOCK_N": (32, 64, 128), "BLOCK_K": (128, 256, 512),
                "SWAP": swapped, "num_stages": (2, 3, 4, 5, 6), "num_warps": (4, 8)}
    return {"BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128, 256), "num_warps": (4, 8), "num_stages": (3, 4, 5),
            "BLOCK_K": (64, 128, 256), "SPLIT": (1, 2, 4), "GROUP_M": (4, 8, 16)}


def _random(seed: int, device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _int8(n: int, k: int, m: int, device: str, processors: int) -> list[Trial]:
    def make(seed: int) -> Callable[[], Tensor]:
        made = _random(seed, device)
        w = torch.randint(-128, 128, (n, k), generator=made, dtype=torch.int8, device=device)
        scale = torch.rand(n, 1, generator=made, device=device)
        a, s = quantize_tokens(torch.randn(m, k, generator=made, device=device))
        return lambda: int8_linear.int8_linear(a, s, w, scale)

    return [Trial(int8_linear.OP, config.key(n, k), m, (int8_linear.rule(m, n, k, processors),),
                  _linear_axes(m, (0, 1)), n * k + m * k, make)]


def _fp8(n: int, k: int, m: int, device: str, processors: int) -> list[Trial]:
    def maker(kind: str) -> Callable[[int], Callable[[], Tensor]]:
        def make(seed: int) -> Callable[[], Tensor]:
            made = _random(seed, device)
            w = torch.randn(n, k, generator=made, device=device).to(FP8)
            shape = {"tensor": (1,), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}[kind]
            scale = torch.rand(shape, generator=made, device=device)
            a, s = quantize_tokens(torch.randn(m, k, generator=made, device=device), FP8,
                                   group_size=128 if kind == "block" else -1)
            return lambda: fp8_linear.fp8_linear(a, s, w, scale)

        return make

    axes = _linear_axes(m, (1,))
    block = {name: tuple(v for v in values if name not in ("BLOCK_K", "BLOCK_N") or v <= 128 and (
        name == "BLOCK_N" or v == 128)) for name, values in axes.items()}
    return [Trial(fp8_linear.OP, config.key(n, k, scales=kind), m, (fp8_linear.rule(m, n, k, processors),),
                  block if kind == "block" else axes, n * k + m * k, maker(kind))
            for kind in fp8_linear.NAMES.values()]


def _sparse24(n: int, k: int, m: int, device: str, processors: int) -> list[Trial]:
    if m >= sparse24_linear.DENSE_FROM:
        return []

    def make(seed: int) -> Callable[[], Tensor]:
        made = _random(seed, device)
        w = torch.randn(n, k // 4, 4, generator=made, device=device)
        w.scatter_(-1, torch.rand(w.shape, generator=made, device=device).argsort(-1)[..., :2], 0.0)
        packed = sparse24_linear.pack(w.view(n, k).to(torch.bfloat16))
        x = torch.randn(m, k, generator=made, device=device).to(torch.bfloat16)
        return lambda: sparse24_linear.sparse24_linear(x, packed)

    axes = {"SPLIT": (1, 2, 3, 4, 6, 8, 12, 16), "BLOCK_N": (32, 64, 128), "SWAP": (0, 1), "num_stages": (2, 3, 4, 5),
            "num_warps": (2, 4, 8)}
    return [Trial(sparse24_linear.OP, config.key(n, k), m, (sparse24_linear.rule(m, n, k, processors),), axes,
                  n * k * 9 // 8 + 2 * m * k, make)]


def _sparse24_int4(n: int, k: int, m: int, device: str, processors: int) -> list[Trial]:
    if m >= sparse24_linear.DENSE_FROM:
        return []

    def make(seed: int) -> Callable[[], Tensor]:
        made = _random(seed, device)
        codes = torch.randint(-8, 8, (n, k // 4, 4), generator=made, dtype=torch.int8, device=device)
        codes.scatter_(-1, torch.rand(codes.shape, generator=made, device=device).argsort(-1)[..., :2], 0)
        scale = torch.rand(n, -(-k // 128), generator=made, device=device).to(torch.bfloat16)
        packed = sparse24_int4_linear.pack(codes.view(n, k), scale)
        x = torch.randn(m, k, generator=made, device=device).to(torch.bfloat16)
        return lambda: sparse24_int4_linear.sparse24_int4_linear(x, packed)

    axes = {"SPLIT": (1, 2, 3, 4, 6, 8, 12, 16), "BLOCK_N": (32, 64, 128), "num_stages": (2, 3, 4, 5),
            "num_warps": (2, 4, 8)}
    return [Trial(sparse24_int4_linear.OP, config.key(n, k), m, (sparse24_int4_linear.rule(m, n, k, processors),), axes,
                  n * k * 3 // 8 + 2 * m * k, make)]


def _int(n: int, k: int, m: int, device: str, processors: int) -> list[Trial]:
    """4 bits in groups of 128, 8 bits in rows: a table has a key for each pair, and these are the usual ones."""
    def maker(bits: int, group: int) -> Callable[[int], Callable[[], Tensor]]:
        def make(seed: int) -> Callable[[], Tensor]:
            made = _random(seed, device)
            half = 1 << (bits - 1)
            codes = torch.randint(-half, half, (n, k), generator=made, dtype=torch.int8, device=device)
            scale = torch.rand(n, 1 if group == -1 else k // group, generator=made, device=device).to(torch.bfloat16)
            packed = int_linear.pack(codes, scale, bits=bits, group_size=group)
            x = torch.randn(m, k, generator=made, device=device).to(torch.bfloat16)
            return lambda: int_linear.int_linear(x, packed)

        return make

    found = []
    for bits, group in ((4, 128), (8, -1)):
        if group != -1 and k % group:
            continue
        starts = [int_linear.tiles(m, n, k, bits, group, processors)]
        if m > 64:  # the other way, whichever the rule takes
            other = {"DENSE": 1} if "DENSE" not in starts[0] else int_linear.tiles(int_linear.DENSE_FROM, n, k, bits,
                                                                                  group, processors)
            starts.append(other)
        axes = {"PARTS": (1, 2, 3, 4, 6, 8, 12, 16), "BLOCK_N": (64, 128), "SWAP": (0, 1), "num_stages": (2, 3, 4, 5),
                "num_warps": (2, 4, 8)} | ({"BLOCK_M": (64, 128)} if m > 64 else {})
        found.append(Trial("int_linear", config.key(n, k, bits=bits, group=group), m, tuple(starts), axes,
                           n * k * bits // 8 + 2 * m * k, maker(bits, group)))
    return found


def _nf4(n: int, k: int, m: int, device: str, processors: int) -> list[Trial]:
    """Blocks of 64 with plain absmax; the key is one for quantized absmax, too."""
    if k % 64:
        return []

    def make(seed: int) -> Callable[[], Tensor]:
        made = _random(seed, device)
        codes = torch.randint(0, 256, (n * k // 2, 1), generator=made, dtype=torch.uint8, device=device)
        absmax = torch.rand(n * k // 64, generator=made, device=device)
        x = torch.randn(m, k, generator=made, device=device).to(torch.bfloat16)
        return lambda: ops.nf4_linear(x, codes, absmax, None, None, None, None, "nf4", 64, n)

    starts = [nf4_linear.tiles(m, n, k, processors)]
    if m > 64:
        few = min(m, nf4_linear.DENSE_FROM)
        starts.append({"DENSE": 1} if "DENSE" not in starts[0] else nf4_linear.tiles(few, n, k, processors))
    axes = {"PARTS": (1, 2, 3, 4, 6, 8, 12, 16), "BLOCK_N": (64, 128), "num_stages": (2, 3, 4), "num_warps": (4, 8)}
    return [Trial("nf4_linear", config.key(n, k, kind="nf4", block=64), m, tuple(starts), axes,
                  n * k // 2 + 2 * m * k, make)]


WIDTHS = (16, 32, 64, 128, 256)  # of heads


def _kv(n: int, k: int, m: int, device: str, processors: int) -> list[Trial]:
    """Attention of one token over a full cache: N and K are the width of a head, M is the room of the cache. Eight
    heads of four queries, one text: with more texts there are programs enough whatever the tiles."""
    if n != k or k not in WIDTHS:
        return []

    def maker(format: str) -> Callable[[int], Callable[[], Tensor]]:
        def make(seed: int) -> Callable[[], Tensor]:
            made = _random(seed, device)
            x, y = (torch.randn(1, 8, m, k, generator=made, device=device).to(torch.bfloat16) for _ in range(2))
            width, numbers = (k // 2, 2) if format == "int4" else (k, 1)
            kind = {"int8": torch.int8, "fp8": FP8, "int4": torch.uint8}[format]
            k_codes, k_scales, v_codes, v_scales = (
                torch.zeros(1, 8, m, size, dtype=dtype, device=device) for _ in range(2)
                for size, dtype in ((width, kind), (numbers, torch.bfloat16)))
            start = torch.zeros(1, dtype=torch.int64, device=device)
            kv_append(x, y, k_codes, k_scales, v_codes, v_scales, start, format)
            query = torch.randn(1, 32, 1, k, generator=made, device=device).to(torch.bfloat16)
            length = torch.tensor([m], device=device)
            return lambda: kv_attention.kv_attention(query, k_codes, k_scales, v_codes, v_scales, length,
                                                     scale=k ** -0.5, format=format)

        return make

    axes = {"BLOCK_N": (32, 64, 128), "PROGRAMS": tuple(times * processors for times in (1, 2, 3, 4)),
            "num_stages": (2, 3, 4), "num_warps": (2, 4, 8)}
    found = []
    for format in ("int8", "fp8", "int4"):
        bytes_ = 2 * 8 * m * (k // 2 + 4 if format == "int4" else k + 2)
        found.append(Trial("kv_attention", config.key(k, k, format=format), m,
                           (kv_attention.rule(format, k, processors),), axes, bytes_, maker(format)))
    return found


# N, K, M, device, processors -> what there is to find for that shape
TRIALS: dict[str, Callable[[int, int, int, str, int], list[Trial]]] = {
    "int_linear": _int, "nf4_linear": _nf4, "int8_linear": _int8, "fp8_linear": _fp8, "sparse24_linear": _sparse24,
    "sparse24_int4_linear": _sparse24_int4, "kv_attention": _kv}

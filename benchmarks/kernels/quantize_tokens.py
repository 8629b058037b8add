"""Quantization by token: machine code, checks, and the bytes a second it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import Case, Check
from benchmarks.kernels._data import ROUNDED, activations
from tests.kernels.offline import Compiled
from torch import Tensor

from llmops_kernels import quantize_tokens
from llmops_kernels._rows import tiles_of
from llmops_kernels.reference.quantize_tokens import quantize_tokens as reference

FP8 = torch.float8_e4m3fn
KINDS = ((torch.int8, -1), (FP8, -1), (FP8, 128))
WIDTHS = (4096, 14336, 28672)
TOKENS = (1, 16, 4096)


def compiled() -> list[Compiled]:
    made = []
    for width in (4096, 16384, 28672):
        for dtype, group in KINDS:
            if group == 128 and width > 4096:
                continue  # the tiles of 2,048
            tiles = tiles_of(min(width, 2048) if group == 128 else width)
            constants = {"BLOCK": tiles["BLOCK"], "FP8": dtype == FP8, "GROUPED": group == 128,
                         "ONCE": tiles["BLOCK"] >= width}
            types = {"x_ptr": "*bf16", "q_ptr": "*fp8e4nv" if dtype == FP8 else "*i8", "s_ptr": "*fp32"}
            made.append(Compiled(f"quantize_tokens {label(dtype, group)}, {width} columns", quantize_tokens.kernel,
                                 types, constants, tiles["num_warps"], 3, odd=("stride_s",), copies=False))
    return made


def label(dtype: torch.dtype, group: int) -> str:
    return ROUNDED[dtype] + (f" g{group}" if group != -1 else "")


def agreement(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """1 where any code or scale differs in a bit, else 0."""
    return float(any(not torch.equal(a.cpu().float(), b.float()) for a, b in zip(found, wanted, strict=True)))


def checks(device: str) -> Iterator[Check]:
    for dtype, group in KINDS:
        for m, k in ((1, 4096), (3, 1000), (17, 20000)):
            x = activations(m, k, seed=k)
            found = quantize_tokens.quantize_tokens(x.to(device), dtype, group_size=group)
            yield Check(f"quantize_tokens {label(dtype, group)} M={m} K={k}, bits that differ",
                        agreement(found, reference(x, dtype, group)), 0.0)


def cases(dry: bool) -> list[Case]:
    return [_case(m, k, dtype, group) for k in ((256,) if dry else WIDTHS) for m in ((2,) if dry else TOKENS)
            for dtype, group in KINDS]


def _case(m: int, k: int, dtype: torch.dtype, group: int) -> Case:
    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        x = activations(m, k, seed, device=device)
        return {"llmops": lambda: quantize_tokens.quantize_tokens(x, dtype, group_size=group),
                "PyTorch": lambda: reference(x, dtype, group)}

    scales = 4 * m * (1 if group == -1 else -(-k // 128))
    return Case("quantize_tokens", f"{k} columns, {label(dtype, group)}", {"M": m, "K": k}, 3 * m * k + scales, 0,
                "bf16", 3 * m * k, make)

"""SwiGLU with quantization: machine code, checks, and the bytes a second beside the unfused steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import Case, Check
from benchmarks.kernels._data import activations
from benchmarks.kernels.quantize_tokens import FP8, KINDS, TOKENS, label
from benchmarks.kernels.rms_norm import half_step
from tests.kernels.offline import Compiled
from torch.nn import functional as F

from llmops_kernels import swiglu_quantize
from llmops_kernels._rows import tiles_of
from llmops_kernels.quantize_tokens import quantize_tokens

WIDTHS = (14336, 28672)


def compiled() -> list[Compiled]:
    made = []
    for width in (4096, 14336, 28672):
        for dtype, group in KINDS:
            if group == 128 and width > 4096:
                continue  # the tiles of 2,048
            tiles = tiles_of(min(width, 2048) if group == 128 else width, inputs=2)
            constants = {"BLOCK": tiles["BLOCK"], "FP8": dtype == FP8, "GROUPED": group == 128,
                         "ONCE": tiles["BLOCK"] >= width}
            types = {"gate_ptr": "*bf16", "up_ptr": "*bf16", "q_ptr": "*fp8e4nv" if dtype == FP8 else "*i8",
                     "s_ptr": "*fp32"}
            made.append(Compiled(f"swiglu_quantize {label(dtype, group)}, {width} columns", swiglu_quantize.kernel,
                                 types, constants, tiles["num_warps"], 3, odd=("stride_s",), copies=False))
    return made


def checks(device: str) -> Iterator[Check]:
    for dtype, group in KINDS:
        for m, k in ((1, 4096), (3, 1000), (17, 20000)):
            both = activations(m, 2 * k, seed=k)
            both[0, :8] = torch.tensor([0.0, 90.0, -90.0, 1e4, -1e4, 1e-3, -0.0, 5.0])
            gate, up = both[:, :k], both[:, k:]
            packed = both.to(device)
            codes, scale = swiglu_quantize.swiglu_quantize(packed[:, :k], packed[:, k:], dtype, group_size=group)
            size = k if group == -1 else group
            grid = scale.cpu().repeat_interleave(size, 1)[:, :k]
            wanted = gate.double() * torch.sigmoid(gate.double()) * up.double()
            yield Check(f"swiglu_quantize {label(dtype, group)} M={m} K={k}, steps of the grid",
                        half_step(codes.cpu(), grid, wanted), 0.501)


def cases(dry: bool) -> list[Case]:
    return [_case(m, k, dtype, group) for k in ((256,) if dry else WIDTHS) for m in ((2,) if dry else TOKENS)
            for dtype, group in KINDS]


def _case(m: int, k: int, dtype: torch.dtype, group: int) -> Case:
    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        both = activations(m, 2 * k, seed, device=device)
        gate, up = both[:, :k], both[:, k:]
        return {"llmops": lambda: swiglu_quantize.swiglu_quantize(gate, up, dtype, group_size=group),
                "one by one": lambda: quantize_tokens(F.silu(gate) * up, dtype, group_size=group)}

    return Case("swiglu_quantize", f"{k} columns, {label(dtype, group)}", {"M": m, "K": k}, 5 * m * k, 0, "bf16",
                5 * m * k, make)

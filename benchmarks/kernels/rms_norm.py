"""RMSNorm with addition and quantization: machine code, checks, and the bytes a second beside the unfused steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import Case, Check
from benchmarks.kernels._data import activations, limit, relative
from benchmarks.kernels.quantize_tokens import FP8, KINDS, TOKENS, label
from tests.kernels.offline import Compiled
from torch import Tensor
from torch.nn import functional as F

from llmops_kernels import rms_norm
from llmops_kernels.quantize_tokens import quantize_tokens

EPS = 1e-6
WIDTHS = (4096, 8192)


def compiled() -> list[Compiled]:
    made = []
    for width in (4096, 16384):
        for add in (False, True):
            for dtype, group in (*KINDS, *(((None, -1),) if add else ())):
                tiles = rms_norm.tiles(width)
                constants = {"BLOCK": tiles["BLOCK"], "ADD": add, "QUANTIZE": dtype is not None, "FP8": dtype == FP8,
                             "GROUPED": group == 128}
                codes = {None: "*bf16", torch.int8: "*i8", FP8: "*fp8e4nv"}[dtype]
                types = {"x_ptr": "*bf16", "r_ptr": "*bf16", "w_ptr": "*bf16", "h_ptr": "*bf16", "y_ptr": codes,
                         "s_ptr": "*fp32", "eps": "fp32"}
                kind = "bf16" if dtype is None else label(dtype, group)
                name = f"{'add_' if add else ''}rms_norm {kind}, {width} columns"
                made.append(Compiled(name, rms_norm.kernel, types, constants, tiles["num_warps"], 3, odd=("stride_s",),
                                     copies=False))
    return made


def exact(h: Tensor, weight: Tensor) -> Tensor:
    """float64 RMSNorm."""
    v = h.double()
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + EPS) * weight.double()


def half_step(codes: Tensor, scale: Tensor, wanted: Tensor) -> float:
    """The largest distance of codes * scale from what was rounded, in steps of the grid: 0.5 is perfect rounding."""
    wide = scale.double().repeat_interleave(-(-codes.shape[1] // scale.shape[1]), 1)[:, :codes.shape[1]]
    step = torch.ones_like(wide)
    if codes.dtype == FP8:
        step = torch.exp2(torch.floor(torch.log2((wanted / wide).abs().clamp(min=2.0**-6))) - 3)
    return float(((codes.double() * wide - wanted).abs() / (wide * step)).max())


def checks(device: str) -> Iterator[Check]:
    for m, k in ((1, 4096), (17, 1000)):
        x, r = activations(m, k, seed=k), activations(m, k, seed=k + 1)
        weight = torch.empty(k).uniform_(0.2, 2).to(torch.bfloat16)
        h = (x.float() + r.float()).to(x.dtype)
        y, sum_ = rms_norm.add_rms_norm(x.to(device), r.to(device), weight.to(device), EPS)
        yield Check(f"add_rms_norm M={m} K={k}", relative(y, exact(h, weight)), limit(x.dtype))
        yield Check(f"add_rms_norm M={m} K={k}, sums that differ", float((sum_.cpu() != h).sum()), 0.0)
        for dtype, group in KINDS:
            codes, scale, _ = rms_norm.add_rms_norm_quantize(x.to(device), r.to(device), weight.to(device), EPS, dtype,
                                                             group_size=group)
            size = k if group == -1 else group
            grid = scale.cpu() if group == -1 else scale.cpu().repeat_interleave(size, 1)[:, :k]
            yield Check(f"add_rms_norm {label(dtype, group)} M={m} K={k}, steps of the grid",
                        half_step(codes.cpu(), grid, exact(h, weight)), 0.501)


def cases(dry: bool) -> list[Case]:
    return [_case(m, k, dtype, group) for k in ((256,) if dry else WIDTHS) for m in ((2,) if dry else TOKENS)
            for dtype, group in (*KINDS, (None, -1))]


def _case(m: int, k: int, dtype: torch.dtype | None, group: int) -> Case:
    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        x, r = activations(m, k, seed, device=device), activations(m, k, seed + 1, device=device)
        weight = torch.ones(k, dtype=x.dtype, device=device)

        def steps() -> Any:
            normed = F.rms_norm(x + r, (k,), weight, EPS)
            return normed if dtype is None else quantize_tokens(normed, dtype, group_size=group)

        if dtype is None:
            return {"llmops": lambda: rms_norm.add_rms_norm(x, r, weight, EPS), "one by one": steps}
        return {"llmops": lambda: rms_norm.add_rms_norm_quantize(x, r, weight, EPS, dtype, group_size=group),
                "one by one": steps,
                "llmops, no addition": lambda: rms_norm.rms_norm_quantize(x, weight, EPS, dtype, group_size=group)}

    out = 2 if dtype is None else 1
    return Case("rms_norm", f"{k} columns, {'bf16' if dtype is None else label(dtype, group)}", {"M": m, "K": k},
                (6 + out) * m * k, 0, "bf16", (6 + out) * m * k, make)

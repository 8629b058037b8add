"""FP8 W8A8 in its three kinds of scales: machine code, checks, and timings beside cuBLAS bf16 and torch._scaled_mm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import LAYERS, ROWS, Case, Check
from benchmarks.kernels._data import activations, cublas, limit, relative, seeded
from benchmarks.kernels.int8_linear import product, sums, tiles
from tests.kernels.offline import Compiled
from torch import Tensor

from llmops_kernels import _scaled_matmul, fp8_linear
from llmops_kernels.quantize_tokens import quantize_tokens

FP8 = torch.float8_e4m3fn
KINDS = tuple(fp8_linear.NAMES.values())


def compiled() -> list[Compiled]:
    """Every set of tiles that the rule gives for a Llama's layers, with scales by row and by block."""
    seen: dict[str, Compiled] = {}
    for n, k in LAYERS.values():
        for m in ROWS:
            for scales in (_scaled_matmul.CHANNEL, _scaled_matmul.BLOCK):
                case = product(fp8_linear.OP, "fp8e4nv", f"{fp8_linear.NAMES[scales]} scales", scales,
                               fp8_linear.rule(m, n, k, 132))
                seen.setdefault(case.name, case)
    tensor = product(fp8_linear.OP, "fp8e4nv", "tensor scales", _scaled_matmul.TENSOR,
                     fp8_linear.rule(4096, 4096, 4096, 132))
    return [*seen.values(), tensor, *(sums("fp32", scales) for scales in range(3))]


def weights(n: int, k: int, kind: str, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Every finite code, scales over three decades."""
    made = seeded(seed, device)
    codes = torch.randint(0, 256, (n, k), generator=made, dtype=torch.uint8, device=device)
    codes[(codes & 127) == 127] = 0x7E  # NaN becomes the largest
    shape = {"tensor": (1,), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}[kind]
    return codes.view(FP8), torch.exp(torch.empty(shape, device=device).uniform_(-6.9, 0, generator=made)) / 448


def exact(a: Tensor, s: Tensor, w: Tensor, scale: Tensor, kind: str) -> Tensor:
    """float64."""
    (n, k), wide_a, wide_w = w.shape, a.double(), w.double()
    if kind != "block":
        return wide_a * s.double() @ (wide_w * scale.double()).T
    wide_s = s.double().repeat_interleave(128, 1)[:, :k]
    return wide_a * wide_s @ (wide_w * scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]).T


def checks(device: str) -> Iterator[Check]:
    for kind in KINDS:
        for m, n, k, dtype in ((1, 200, 4096, torch.bfloat16), (17, 136, 304, torch.float16),
                               (129, 200, 528, torch.bfloat16)):
            w, scale = weights(n, k, kind, seed=m)
            a, s = quantize_tokens(activations(m, k, seed=m), FP8, group_size=128 if kind == "block" else -1)
            y = fp8_linear.fp8_linear(*(part.to(device) for part in (a, s, w, scale)), dtype=dtype)
            yield Check(f"fp8_linear {kind} M={m} N={n} K={k} {dtype}", relative(y, exact(a, s, w, scale, kind)),
                        limit(dtype))


def cases(dry: bool) -> list[Case]:
    layers = {"tiny": (128, 256)} if dry else LAYERS
    return [_case(name, kind, m, n, k) for name, (n, k) in layers.items() for kind in KINDS[1:]
            for m in ((1, 64) if dry else ROWS)]


def _case(name: str, kind: str, m: int, n: int, k: int) -> Case:
    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        w, scale = weights(n, k, kind, seed, device)
        x = activations(m, k, seed, device=device)
        a, s = quantize_tokens(x, FP8, group_size=128 if kind == "block" else -1)
        calls: dict[str, Callable[[], Any]] = {
            "llmops": lambda: fp8_linear.fp8_linear(a, s, w, scale),
            "llmops, with quantization": lambda: fp8_linear.w8a8_fp8(x, w, scale),
            "cuBLAS bf16": cublas(m, n, k, seed, device)}
        if device == "cuda" and kind == "channel":
            by_column = scale.t().contiguous()
            calls["torch._scaled_mm"] = lambda: torch._scaled_mm(a, w.t(), scale_a=s, scale_b=by_column,
                                                                 out_dtype=torch.bfloat16)
        return calls

    groups = -(-k // 128) if kind == "block" else 1
    least = m * k + n * k + 4 * (m * groups + (n if kind == "channel" else -(-n // 128) * groups)) + 2 * m * n
    return Case("fp8_linear", f"{name}, {kind} scales", {"M": m, "N": n, "K": k}, least, 2 * m * n * k, "fp8",
                n * k + 3 * m * k, make, lambda device: tiles(fp8_linear, kind, m, n, k, device))

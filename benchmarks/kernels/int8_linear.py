"""W8A8 int8: machine code, checks, and timings beside cuBLAS bf16 and torch._int_mm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.kernels._contract import LAYERS, ROWS, Case, Check
from benchmarks.kernels._data import activations, cublas, seeded
from tests.kernels.offline import Compiled
from torch import Tensor

from llmops_kernels import _scaled_matmul, config, int8_linear
from llmops_kernels.quantize_tokens import quantize_tokens
from llmops_kernels.reference.int8_linear import int8_linear as reference


def compiled() -> list[Compiled]:
    """Every set of tiles that the rule gives for a Llama's layers, and the kernel that adds partial sums."""
    seen: dict[str, Compiled] = {}
    for n, k in LAYERS.values():
        for m in ROWS:
            case = product(int8_linear.OP, "i8", "int8", _scaled_matmul.CHANNEL, int8_linear.rule(m, n, k, 132))
            seen.setdefault(case.name, case)
    return [*seen.values(), sums("i32", _scaled_matmul.CHANNEL)]


def product(op: str, code: str, label: str, scales: int, tiles: dict[str, int]) -> Compiled:
    """The product with some tiles; also for fp8."""
    tiles = _scaled_matmul.fitting(dict(tiles), 227 * 1024)
    warps, stages, split = tiles.pop("num_warps"), tiles.pop("num_stages"), tiles.pop("SPLIT") > 1
    swap = bool(tiles.pop("SWAP"))
    workspace = "*i32" if code == "i8" else "*fp32"
    constants = tiles | {"PARTIAL": split, "SWAP": swap, "SCALES": scales, "BIAS": True, "EVEN_K": True}
    types = {"a_ptr": f"*{code}", "w_ptr": f"*{code}", "sa_ptr": "*fp32", "sw_ptr": "*fp32", "bias_ptr": "*bf16",
             "y_ptr": workspace if split else "*bf16"}
    shape = f"{tiles['BLOCK_M']}x{tiles['BLOCK_N']}x{tiles['BLOCK_K']}"
    name = (f"{op} {label}, {shape}, {warps} warps{', swapped' if swap else ''}{', split' if split else ''}")
    wide = swap or tiles["BLOCK_M"] >= 64
    matrix = {"i8": ("IGMMA", "IMMA"), "fp8e4nv": ("QGMMA", "QGMMA")}[code][0 if wide else 1]
    return Compiled(name, _scaled_matmul.kernel, types, constants, warps, stages, odd=("M", "stride_sa", "stride_sw"),
                    weights=tiles["BLOCK_N"] * tiles["BLOCK_K"], limit=2.5 if tiles["BLOCK_M"] <= 64 else 0.0,
                    matrix=matrix)


def sums(code: str, scales: int) -> Compiled:
    constants = {"SPLIT": 4, "SCALES": scales, "BIAS": True, "BLOCK_N": 256}
    types = {"part_ptr": f"*{code}", "sa_ptr": "*fp32", "sw_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    return Compiled(f"partial sums, {code}, scales {scales}", _scaled_matmul.add_up_kernel, types, constants, 4, 3,
                    odd=("M", "stride_sa"), copies=False)


def weights(n: int, k: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Every code, and scales over three decades with a row thirty times its size."""
    made = seeded(seed, device)
    w = torch.randint(-128, 128, (n, k), generator=made, dtype=torch.int8, device=device)
    scale = torch.exp(torch.empty(n, 1, device=device).uniform_(-6.9, 0, generator=made))
    scale[n // 2] *= 30
    return w, scale


def checks(device: str) -> Iterator[Check]:
    """Integers are exact and scales are applied in one order, so float32 results agree to the last bit or two."""
    for m, n, k in ((1, 200, 4096), (16, 264, 1040), (17, 136, 300), (129, 200, 528)):
        w, scale = weights(n, k, seed=m)
        a, s = quantize_tokens(activations(m, k, seed=m))
        y = int8_linear.int8_linear(a.to(device), s.to(device), w.to(device), scale.to(device), dtype=torch.float32)
        exact = reference(a, s, w, scale, None, torch.float32)
        worst = float((y.cpu() - exact).abs().div(exact.abs() + 1e-20).max())
        yield Check(f"int8_linear M={m} N={n} K={k}", worst, 3e-7)


def cases(dry: bool) -> list[Case]:
    layers = {"tiny": (128, 256)} if dry else LAYERS
    return [_case(name, m, n, k) for name, (n, k) in layers.items() for m in ((1, 64) if dry else ROWS)]


def _case(name: str, m: int, n: int, k: int) -> Case:
    def make(device: str, seed: int) -> dict[str, Callable[[], Any]]:
        w, scale = weights(n, k, seed, device)
        x = activations(m, k, seed, device=device)
        a, s = quantize_tokens(x)
        calls: dict[str, Callable[[], Any]] = {
            "llmops": lambda: int8_linear.int8_linear(a, s, w, scale),
            "llmops, with quantization": lambda: int8_linear.w8a8(x, w, scale),
            "cuBLAS bf16": cublas(m, n, k, seed, device)}
        if device == "cuda" and m > 16:
            calls["torch._int_mm + scales"] = lambda: (torch._int_mm(a, w.t()).float() * s * scale.t()).bfloat16()
        return calls

    return Case("int8_linear", name, {"M": m, "N": n, "K": k}, m * k + n * k + 4 * (m + n) + 2 * m * n, 2 * m * n * k,
                "int8", n * k + 3 * m * k, make, lambda device: tiles(int8_linear, "", m, n, k, device))


def tiles(op: Any, more: str, m: int, n: int, k: int, device: str) -> dict[str, int]:
    """The tiles that a call takes; also for fp8 (more: the kind of scales) and 2:4."""
    index = torch.cuda.current_device() if device == "cuda" else None
    shape = config.key(n, k, scales=more) if more else config.key(n, k)
    found = config.pick(op.OP, shape, m, config.device_name(index))
    return dict(found or op.rule(m, n, k, config.processors(index)))

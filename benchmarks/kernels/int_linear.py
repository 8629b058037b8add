"""The weight-only integer linear layer: its machine code, its checks, its timings."""

from __future__ import annotations

from benchmarks.kernels._weight_only import cases, checks
from tests.kernels.offline import Compiled

from llmops_kernels._dequantize import dequantize_integers_kernel
from llmops_kernels._group_sums import join_kernel
from llmops_kernels.int_linear import constants, int_linear_kernel
from llmops_kernels.reference.int_linear import layout

__all__ = ["cases", "checks", "compiled"]

LIMITS = {("fp16", 4): 3.2, ("bf16", 4): 3.6, ("fp16", 8): 2.5, ("bf16", 8): 2.5}  # thread-instructions a weight
#          dtype, bits, group, zero point, BLOCK_M, BLOCK_N, warps, stages, parts, swapped
TILES = [("fp16", 4, 128, False, 16, 64, 4, 4, 4, False), ("bf16", 4, 128, False, 16, 64, 4, 4, 4, False),
         ("fp16", 4, 128, True, 16, 64, 4, 4, 4, False), ("bf16", 4, 128, True, 16, 64, 4, 4, 4, False),
         ("fp16", 4, 64, False, 16, 64, 4, 4, 4, False), ("bf16", 4, 64, True, 16, 64, 4, 4, 4, False),
         ("fp16", 4, 32, False, 16, 64, 4, 4, 4, True), ("bf16", 4, 32, False, 16, 64, 4, 4, 4, True),
         ("fp16", 4, 32, True, 16, 64, 4, 4, 4, True), ("bf16", 4, 32, True, 16, 64, 4, 4, 4, True),
         ("fp16", 4, -1, False, 16, 64, 4, 4, 4, False), ("bf16", 4, -1, True, 16, 64, 4, 4, 4, False),
         *((dtype, 8, group, zero, 16, 128, 4, 3, 4, group > 0) for group in (-1, 128, 64, 32)
           for zero in (False, True) for dtype in ("fp16", "bf16")),
         ("fp16", 3, 128, False, 16, 64, 2, 4, 4, False), ("bf16", 3, 128, False, 16, 64, 2, 4, 4, False),
         ("fp16", 2, 128, False, 16, 64, 2, 4, 4, False), ("bf16", 2, 64, True, 16, 64, 2, 4, 4, False),
         ("fp16", 4, 128, False, 32, 64, 4, 3, 2, True), ("bf16", 4, 128, False, 32, 64, 4, 3, 2, True),
         ("fp16", 4, 128, True, 64, 64, 4, 3, 1, True), ("bf16", 4, 128, False, 64, 64, 4, 3, 1, True),
         *((dtype, 4, group, zero, 64, 64, 4, 3, 1, True) for group in (64, 32) for zero in (False, True)
           for dtype in ("fp16", "bf16")),
         *((dtype, 8, group, False, 64, 64, 4, 3, 1, True) for group in (-1, 128, 64, 32)
           for dtype in ("fp16", "bf16")),
         ("bf16", 3, 128, False, 64, 64, 4, 3, 1, True)]


def compiled() -> list[Compiled]:
    return [_case(*tile) for tile in TILES] + [_dense("bf16", 4, 128, True), _dense("fp16", 3, -1, False),
                                               _dense("bf16", 8, -1, False), _join("bf16", 32, False),
                                               _join("bf16", 128, True), _join("fp16", 32, True)]


def _dense(dtype: str, bits: int, group: int, zero: bool) -> Compiled:
    kept = ("BITS", "RUN", "FIELDS", "GROUPS", "NEAR", "ZERO", "PROGRAMS", "TILE")
    every = constants(bits, group, zero, False, dtype == "bf16", True)
    known = {name: every[name] for name in kept}
    types = {"q_ptr": "*i16", "scale_ptr": f"*{dtype}", "zero_ptr": "*i16" if zero else f"*{dtype}",
             "out_ptr": f"*{dtype}"}
    return Compiled(f"dequantize {dtype} {bits} bits, group {group}", dequantize_integers_kernel, types, known, 4, 1,
                    odd=("chunks",), copies=False)


def _join(dtype: str, group: int, zero: bool) -> Compiled:
    every = layout(8, group)
    known = {"PARTS": 8, "NEAR": every.near, "ROWS": group == -1, "ZERO": zero, "OFFSET": 128, "BIAS": True,
             "TILE": 128, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_G": 128}
    types = {"parts_ptr": "*fp32", "sums_ptr": "*bf16", "scale_ptr": f"*{dtype}", "bias_ptr": f"*{dtype}",
             "zero_ptr": "*i16" if zero else f"*{dtype}", "y_ptr": f"*{dtype}"}
    name = f"parts joined, 8 bits {dtype}, group {group}{', zeros' if zero else ''}"
    return Compiled(name, join_kernel, types, known, 4, 1, odd=("M",), matrix="HMMA", copies=False)


def _case(dtype: str, bits: int, group: int, zero: bool, m: int, n: int, warps: int, stages: int, parts: int,
          swap: bool) -> Compiled:
    scaled = m > 16 and group in (32, 64)
    known = constants(bits, group, zero, False, dtype == "bf16", scaled, m <= 16)
    types = {"x_ptr": f"*{dtype}", "q_ptr": "*i16", "scale_ptr": f"*{dtype}",
             "y_ptr": "*fp32" if parts > 1 else f"*{dtype}", "zero_ptr": "*i16" if zero else f"*{dtype}",
             "bias_ptr": f"*{dtype}", "sums_ptr": "*bf16"}
    name = f"int_linear {dtype} {bits} bits, group {group}{', zeros' if zero else ''}, {m}x{n}, {warps} warps"
    return Compiled(name, int_linear_kernel, types,
                    known | {"PARTS": parts, "EVEN_K": True, "SWAP": swap, "BLOCK_M": m, "BLOCK_N": n}, warps, stages,
                    odd=("M", "chunks", "per_part"), weights=n * layout(bits, group).chunk,
                    limit=_limit(dtype, bits, group, zero, m), matrix="HGMMA" if swap else "HMMA")


def _limit(dtype: str, bits: int, group: int, zero: bool, m: int) -> float:
    if m > 16 and (bits == 8 or group in (32, 64)):
        return 0.0  # more work than decoding a tile of 16: docs/kernels.md has the arithmetic
    return LIMITS.get((dtype, bits), 0.0)

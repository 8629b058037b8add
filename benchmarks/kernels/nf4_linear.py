"""The linear layer on bitsandbytes' 4-bit weights: its machine code, its checks, its timings."""

from __future__ import annotations

from benchmarks.kernels._nf4 import cases, checks
from tests.kernels.offline import Compiled

from llmops_kernels._dequantize import dequantize_pairs_kernel
from llmops_kernels.nf4_linear import nf4_linear_kernel, program

__all__ = ["cases", "checks", "compiled"]

#         dtype, double quantization, BLOCK_M, BLOCK_N, warps, stages, parts
TILES = [("fp16", False, 16, 128, 4, 3, 4), ("bf16", False, 16, 128, 4, 3, 4), ("bf16", True, 16, 128, 4, 3, 4),
         ("bf16", False, 32, 128, 4, 3, 4), ("fp16", False, 64, 128, 8, 3, 1), ("bf16", True, 64, 128, 8, 3, 1)]


def compiled() -> list[Compiled]:
    dense = {"q_ptr": "*u8", "absmax_ptr": "*fp32", "table_ptr": "*fp32", "out_ptr": "*bf16"}
    return [_case(*tile) for tile in TILES] + [
        Compiled("dequantize bf16 NF4", dequantize_pairs_kernel, dense, {"BLOCKSIZE": 64, "BLOCK": 2048}, 8, 1,
                 copies=False)]


def _case(dtype: str, nested: bool, m: int, n: int, warps: int, stages: int, parts: int) -> Compiled:
    types = {"x_ptr": f"*{dtype}", "q_ptr": "*u8", "absmax_ptr": "*fp32", "nested_ptr": "*u8" if nested else "*fp32",
             "nested_table_ptr": "*fp32", "offset_ptr": "*fp32", "table_ptr": "*fp32", "zero_ptr": "*i32",
             "bias_ptr": "*fp32", "y_ptr": "*fp32" if parts > 1 else f"*{dtype}"}
    constants = {"BLOCKSIZE": 64, "NESTED": nested, "BIAS": False, "PARTS": parts, "EVEN_K": True,
                 "PROGRAM": program("nf4", dtype == "bf16"), "BLOCK_M": m, "BLOCK_N": n}
    name = f"nf4_linear {dtype}{', nested absmax' if nested else ''}, {m}x{n}, {warps} warps"
    return Compiled(name, nf4_linear_kernel, types, constants, warps, stages,
                    odd=("M", "stride_off", "quads", "per_part"), weights=n * 256, limit=5.5, matrix="HGMMA",
                    copies=not nested)

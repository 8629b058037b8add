"""The weight-only integer linear layer without a GPU: the kernel in the interpreter, the op on the CPU, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.processes import interpreted

DECODE = {"BLOCK_M": 16, "BLOCK_N": 64, "PARTS": 1, "num_warps": 4, "num_stages": 2}
SPLIT = DECODE | {"PARTS": 3}
MIDDLE = {"BLOCK_M": 32, "BLOCK_N": 128, "PARTS": 1, "num_warps": 4, "num_stages": 2}
LARGE = {"BLOCK_M": 64, "BLOCK_N": 128, "PARTS": 2, "num_warps": 8, "num_stages": 2}
#      bits, group, every M, N, K, dtype, zero point, bias, tile (None: the op's own rule), seed
CASES: list[list[Any]] = [
    [4, 128, [1, 2, 3, 15, 16], 200, 640, "bfloat16", False, False, SPLIT], [4, 128, [3], 128, 512, "float16", True, True, SPLIT],
    [4, 64, [3], 72, 576, "float16", False, False, DECODE], [4, 32, [2], 130, 224, "bfloat16", True, False, SPLIT],
    [4, -1, [16], 64, 300, "float16", True, False, SPLIT], [4, 128, [17, 33], 136, 384, "float16", False, True, MIDDLE],
    [4, 64, [64, 129], 130, 320, "bfloat16", True, False, LARGE], [4, 128, [1, 17, 64], 72, 512, "bfloat16", False, False, None],
    [4, 128, [3], 72, 256, "float16", False, False, SPLIT, 1], [8, -1, [1, 16], 72, 500, "bfloat16", False, True, SPLIT],
    [8, 32, [3], 64, 160, "float16", True, False, DECODE], [8, 128, [17], 130, 384, "bfloat16", True, False, MIDDLE],
    [8, 64, [33], 64, 192, "float16", False, False, LARGE], [3, 128, [3], 72, 640, "bfloat16", False, False, SPLIT],
    [3, 32, [2], 64, 512, "float16", True, False, DECODE], [3, -1, [17], 64, 600, "float16", False, True, MIDDLE],
    [2, 64, [3], 72, 448, "float16", True, False, SPLIT], [2, -1, [1], 64, 260, "bfloat16", False, False, DECODE],
    [6, 128, [3], 64, 256, "float16", False, False, DECODE]]


def test_the_kernel_matches_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_int_linear.py", CASES), strict=True):
        limit = 3e-3 if case[5] == "bfloat16" else 5e-4
        assert result["error"] <= limit and result["worst_row"] <= 1.5 * limit, (case, result)
        assert result["repeat"] == 0.0 and result["spilled"] == 0, (case, result)

"""int8 times int8: sums exact as integers, so the kernel gives the reference's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.processes import interpreted
from tests.kernels.traced import assert_traces

from llmops.ops import int8_matmul
from llmops_kernels import _scaled_matmul
from llmops_kernels.int8_linear import int8_linear, ops, rule, w8a8
from llmops_kernels.quantize_tokens import quantize_tokens

SWAPPED = {"SWAP": 1, "BLOCK_N": 64}
SPLIT = {"SPLIT": 3, "BLOCK_K": 64}
#       M, N, K, dtype, bias, tiles beside the rule's, seed; N and K off every tile
CASES: list[list[Any]] = [
    *(["int8", m, 72, 200, "fp32", False, {}, m] for m in (0, 1, 2, 3, 15, 16, 17, 33, 64, 129)),
    *(["int8", m, 136, 528, "fp32", False, SPLIT, seed] for m in (1, 17) for seed in (0, 1)),
    ["int8", 3, 72, 200, "fp32", False, SWAPPED, 0], ["int8", 33, 136, 300, "fp32", False, SWAPPED | SPLIT, 0],
    ["int8", 130, 264, 256, "fp32", False, {"BLOCK_M": 64, "GROUP_M": 2}, 1],
    *(["int8", m, 72, 256, dtype, True, tiles, 2] for m, tiles in ((2, {}), (17, SPLIT)) for dtype in ("bf16", "fp16")),
    ["int8", 2, 1, 1, "fp32", False, {}, 0], ["int8", 2, 33, 0, "fp32", True, {}, 0],
    ["into", 0], ["far", "a"], ["far", "w"]]


def test_sums_are_exact_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_linears.py", CASES), strict=True):
        assert result["repeats"], (case, result)
        if case[0] != "int8" or case[4] == "fp32" and not case[5]:
            assert result["equal"], (case, result)
        limit = {"bf16": 3e-3, "fp16": 5e-4}.get(str(case[4]) if case[0] == "int8" else "", 1e-6)
        assert result["error"] <= limit and result["rows"] <= 1.5 * limit, (case, result)


def test_the_reference_is_what_llmops_scores_with() -> None:
    made = torch.Generator().manual_seed(0)
    w, scale = torch.randint(-128, 128, (40, 2100), generator=made, dtype=torch.int8), torch.rand(40, 1, generator=made)
    x = torch.randn(7, 2100, generator=made)
    held = {"weight": w, "weight_scale": scale}
    a, s = quantize_tokens(x)
    assert torch.equal(int8_linear(a, s, w, scale, dtype=torch.float32), int8_matmul.int8_matmul(x, held, "reference"))
    bias = torch.randn(40, generator=made)
    assert torch.equal(w8a8(x.bfloat16(), w, scale, bias),
                       int8_matmul.int8_matmul(x.bfloat16(), held, "reference", bias))


def test_the_rule_fills_a_chip_and_its_shared_memory() -> None:
    for m in (1, 16, 17, 64, 65, 256, 4096):
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (64, 64)):
            tiles = _scaled_matmul.fitting(rule(m, n, k, 132), 99 * 1024)
            stage = (tiles["BLOCK_M"] + tiles["BLOCK_N"]) * tiles["BLOCK_K"]
            assert stage * tiles["num_stages"] <= 99 * 1024 and tiles["num_stages"] >= 2
            programs = -(-m // tiles["BLOCK_M"]) * -(-n // tiles["BLOCK_N"]) * tiles["SPLIT"]
            assert programs >= 96 or n * k == 4096, (m, n, k, tiles)


def test_it_traces() -> None:
    a, s = quantize_tokens(torch.randn(5, 96))
    w, scale, bias = torch.randint(-128, 128, (40, 96), dtype=torch.int8), torch.rand(40, 1), torch.randn(40)
    assert_traces(ops.int8_linear.default, (a, s, w, scale, bias, torch.bfloat16), w8a8, torch.randn(5, 96).half(), w,
                  scale, bias)


def test_what_does_not_fit_is_said() -> None:
    a, s = torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 1)
    w, scale = torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 1)
    for bad, message in (((a.float(), s, w, scale), "a is float32"), ((a, s, w[:, :32], scale), r"w is int8 \(8, 32\)"),
                         ((a, s.half(), w, scale), "a_scale is float16"),
                         ((a, s[:1], w, scale), r"a_scale is float32 \(1, 1\)"),
                         ((a, s, w, scale.view(-1)), r"w_scale is float32 \(8,\)"), ((a.t(), s, w, scale), "w is int8"),
                         ((a, s, torch.zeros(64, 8, dtype=torch.int8).t(), scale), "w has strides"),
                         ((a, s, w.to("meta"), scale), "w is on meta"),
                         ((a, s, w, scale, torch.zeros(7)), r"bias is float32 \(7,\)")):
        with pytest.raises(ValueError, match=message):
            int8_linear(*bad)
    wide = torch.zeros(1, 131073, dtype=torch.int8)
    with pytest.raises(ValueError, match="expected at most 131072"):
        int8_linear(wide, s[:1], wide, scale[:1])
    with pytest.raises(ValueError, match="dtype is torch.int32"):
        int8_linear(a, s, w, scale, dtype=torch.int32)

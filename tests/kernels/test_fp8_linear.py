"""E4M3 times E4M3 with scales by tensor, row and block, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.processes import interpreted
from tests.kernels.traced import assert_traces

from llmops.ops import fp8_matmul
from llmops_kernels.fp8_linear import fp8_linear, launch, ops, rule, scales_of, w8a8_fp8
from llmops_kernels.quantize_tokens import quantize_tokens

FP8 = torch.float8_e4m3fn
KINDS = ("tensor", "channel", "block")
SPLIT = {"SPLIT": 3}
#       kind, M, N, K, dtype, bias, tiles beside the rule's, seed; N and K off every tile
CASES: list[list[Any]] = [
    *(["fp8", KINDS[i % 3], m, 72, 200, ("bf16", "fp16", "fp32")[i % 3], False, {}, m]
      for i, m in enumerate((0, 1, 2, 3, 15, 16, 17, 33, 64, 129))),
    *(["fp8", kind, m, 136, 528, "fp16", True, SPLIT, seed]
      for kind, m in (("tensor", 1), ("channel", 17), ("block", 3)) for seed in (0, 1)),
    ["fp8", "block", 65, 200, 300, "bf16", True, {}, 0], ["fp8", "channel", 2, 72, 256, "fp16", False, {"SWAP": 0}, 0],
    ["fp8", "block", 17, 260, 512, "fp32", False, {"GROUP_M": 2, "BLOCK_N": 64}, 1],
    ["fp8", "block", 2, 1, 1, "fp32", False, {}, 0], ["fp8", "channel", 2, 33, 0, "fp32", True, {}, 0]]
LIMITS = {"bf16": 3e-3, "fp16": 5e-4, "fp32": 1e-6}


def test_results_match_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_linears.py", CASES), strict=True):
        assert result["repeats"], (case, result)
        limit = LIMITS[case[5]]
        assert result["error"] <= limit and result["rows"] <= 1.5 * limit, (case, result)


def test_the_reference_is_what_llmops_scores_with() -> None:
    made = torch.Generator().manual_seed(0)
    w = torch.randn(200, 384, generator=made).to(FP8)
    x = torch.randn(7, 384, generator=made)
    bias = torch.randn(200, generator=made)
    for kind, shape in (("tensor", (1,)), ("channel", (200, 1)), ("block", (2, 3))):
        scale = torch.rand(shape, generator=made) + 0.1
        held = {"weight": w, "weight_scale": scale}
        wanted = fp8_matmul.fp8_matmul(x, held, kind, bias)
        a, s = quantize_tokens(x, FP8, group_size=128 if kind == "block" else -1)
        assert torch.allclose(fp8_linear(a, s, w, scale, bias, dtype=torch.float32), wanted, rtol=1e-5, atol=1e-4)
        wanted = fp8_matmul.fp8_matmul(x.half(), held, kind, bias)
        assert torch.allclose(w8a8_fp8(x.half(), w, scale, bias), wanted, rtol=2e-3, atol=1e-3)


def test_few_tokens_are_the_second_operand() -> None:
    """A first operand of fewer than 64 rows would be computed in fp16."""
    for m in (1, 16, 33, 64, 65, 4096):
        tiles = rule(m, 4096, 4096, 132)
        assert (tiles["BLOCK_N"] if tiles["SWAP"] else tiles["BLOCK_M"]) >= 64
        assert tiles["BLOCK_K"] == 128 and 128 % tiles["BLOCK_N"] == 0  # what block scales need


def test_it_traces() -> None:
    x, w = torch.randn(5, 256).half(), torch.randn(40, 256).to(FP8)
    for scale in (torch.rand(1), torch.rand(40, 1), torch.rand(1, 2)):
        a, s = quantize_tokens(x, FP8, group_size=128 if scale.shape == (1, 2) else -1)
        assert_traces(ops.fp8_linear.default, (a, s, w, scale, None, torch.float16), w8a8_fp8, x, w, scale)


def test_what_does_not_fit_is_said() -> None:
    a, s = torch.zeros(2, 256).to(FP8), torch.ones(2, 1)
    w, scale = torch.zeros(300, 256).to(FP8), torch.ones(300, 1)
    for bad, message in (((a.float(), s, w, scale), "a is float32"),
                         ((a, s, w[:, :128], scale), r"w is float8_e4m3fn \(300, 128\)"),
                         ((a, s, w, torch.ones(3, 1)), r"w_scale is \(3, 1\) for w \(300, 256\); expected \(1,\), "
                                                       r"\(300, 1\) or \(3, 2\)"),
                         ((a, s, w, torch.ones(3, 2)), r"a_scale is \(2, 1\) with w_scale \(3, 2\); expected \(2, 2\)"),
                         ((a, torch.ones(2, 2), w, scale), r"a_scale is \(2, 2\).*expected \(2, 1\)"),
                         ((a, s, w, scale.half()), "w_scale is float16"),
                         ((a, s.to("meta"), w, scale), "a_scale is on meta"),
                         ((a, s, w.to(torch.float8_e5m2), scale), "w is float8_e5m2")):
        with pytest.raises(ValueError, match=message):
            fp8_linear(*bad)
    assert [scales_of(w, torch.ones(shape)) for shape in ((1,), (300, 1), (3, 2))] == [0, 1, 2]
    with pytest.raises(ValueError, match="expected BLOCK_K 128"):
        launch(a, torch.ones(2, 2), w, torch.ones(3, 2), None, torch.float16, rule(1, 300, 256, 132) | {"BLOCK_K": 64})

"""Quantization by token: bit for bit the reference's, which is bit for bit what llmops scores on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.processes import interpreted
from tests.kernels.traced import assert_traces

from llmops.ops import fp8_matmul, int8_matmul
from llmops_kernels.quantize_tokens import ops, quantize_tokens

FP8 = torch.float8_e4m3fn
KINDS = (("int8", -1), ("fp8", -1), ("fp8", 128))
#       M, K, dtype, group, source, special, seed; K of one, off the group, and wider than one program holds
CASES: list[list[Any]] = [
    *(["quantize", m, 200, *kind, "bf16", "", m] for m in (0, 1, 2, 3, 15, 16, 17, 33) for kind in KINDS),
    *(["quantize", m, 136, "int8", -1, "fp16", "", 0] for m in (64, 129)),
    *(["quantize", 3, k, dtype, group, source, "", 1] for k, source in ((1, "bf16"), (1000, "fp32"), (17000, "fp16"))
      for dtype, group in KINDS),
    *(["quantize", 3, 300, dtype, group, "fp32", special, 0] for special in ("zeros", "ties", "tiny", "nan")
      for dtype, group in KINDS),
    ["quantize", 2, 17000, "int8", -1, "bf16", "nan", 0], ["far", "quantize"]]


def test_codes_and_scales_are_the_references_bits_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_row_ops.py", CASES), strict=True):
        assert result["equal"] and result["repeats"], (case, result)


def test_the_reference_is_what_llmops_scores_with() -> None:
    x = torch.randn(9, 384, generator=torch.Generator().manual_seed(0)) * 3
    x[2] = 0
    for dtype in (torch.float32, torch.bfloat16):
        codes, scale = quantize_tokens(x.to(dtype))
        wanted = int8_matmul.quantize_rows(x.to(dtype))
        assert torch.equal(codes, wanted[0]) and torch.equal(scale, wanted[1])
        for group in (-1, 128):
            codes, scale = quantize_tokens(x.to(dtype), FP8, group_size=group)
            wanted = fp8_matmul.quantize_tokens(x.to(dtype), None if group == -1 else group)
            assert torch.equal(codes.float(), wanted[0].float()) and torch.equal(scale, wanted[1])


def test_the_corrected_quotient_is_the_rounded_one() -> None:
    """The GPU's path, which the interpreter cannot take: float64 stands in for the fused multiply-add."""
    made = np.random.default_rng(0)
    top = np.concatenate([np.exp(made.uniform(-50, 60, 100_000)), 127 * 2.0 ** np.arange(-60, 60)]).astype(np.float32)
    top[:1000] = (top[:1000].view(np.uint32) | 0x7FFFFF).view(np.float32)  # all ones, division's hardest case
    for largest in (np.float32(127), np.float32(448)):
        s = top / largest
        inverse = np.float32(1) / s
        for share in (made.uniform(-1, 1, len(top)), (made.integers(-127, 127, len(top)) + 0.5) / 127):
            v = (top * share).astype(np.float32)
            q = v * inverse
            rest = (v.astype(np.float64) - q.astype(np.float64) * s).astype(np.float32)
            corrected = (rest.astype(np.float64) * inverse + q).astype(np.float32)
            assert np.array_equal(corrected, v / s)
            shifted = (corrected + np.float32(12582912)).view(np.int32).astype(np.int8)  # the low byte is the code
            if largest == 127:
                assert np.array_equal(shifted, np.rint(v / s).astype(np.int8))


def test_it_traces() -> None:
    x = torch.randn(5, 300)
    for dtype, group in ((torch.int8, -1), (FP8, 128)):
        assert_traces(ops.quantize_tokens.default, (x, dtype, group),
                      lambda x, dtype=dtype, group=group: quantize_tokens(x, dtype, group_size=group), x)


def test_what_does_not_fit_is_said() -> None:
    x = torch.zeros(2, 256)
    with pytest.raises(ValueError, match="x is int8.*expected float16 or bfloat16 or float32"):
        quantize_tokens(x.to(torch.int8))
    with pytest.raises(ValueError, match=r"x is float32 \(2, 16, 16\)"):
        quantize_tokens(x.view(2, 16, 16))
    with pytest.raises(ValueError, match="rows contiguous"):
        quantize_tokens(x.t())
    with pytest.raises(ValueError, match="dtype is torch.uint8; expected one of"):
        quantize_tokens(x, torch.uint8)
    for dtype, group in ((torch.int8, 128), (FP8, 64)):
        with pytest.raises(ValueError, match=f"group_size is {group} for"):
            quantize_tokens(x, dtype, group_size=group)

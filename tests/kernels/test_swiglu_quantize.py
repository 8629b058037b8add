"""SwiGLU with quantization, against float64: within half a step of the grid it is rounded to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.processes import interpreted
from tests.kernels.traced import assert_traces

from llmops_kernels.quantize_tokens import quantize_tokens
from llmops_kernels.swiglu_quantize import ops, swiglu_quantize

FP8 = torch.float8_e4m3fn
KINDS = (("int8", -1), ("fp8", -1), ("fp8", 128))
#       M, K, dtype, group, source, seed
CASES: list[list[Any]] = [
    *(["swiglu", m, 200, *KINDS[m % 3], ("bf16", "fp16")[m % 2], m] for m in (0, 1, 2, 3, 15, 16, 17, 33, 64, 129)),
    *(["swiglu", 2, k, *kind, "bf16", k] for k in (9, 1000, 9000, 17000) for kind in KINDS),
    ["far", "swiglu"]]


def test_results_match_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_row_ops.py", CASES), strict=True):
        assert result["equal"] and result["repeats"], (case, result)
        assert result.get("steps", 0.0) <= 0.501, (case, result)


def test_it_is_the_steps_one_by_one() -> None:
    both = torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    gate, up = both[:, :256].bfloat16(), both[:, 256:].bfloat16()
    for dtype, group in ((torch.int8, -1), (FP8, 128)):
        found = swiglu_quantize(gate, up, dtype, group_size=group)
        wanted = quantize_tokens(torch.nn.functional.silu(gate.float()) * up.float(), dtype, group_size=group)
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(found, wanted, strict=True))


def test_it_traces() -> None:
    gate, up = torch.randn(5, 300).half(), torch.randn(5, 300).half()
    assert_traces(ops.swiglu_quantize.default, (gate, up, FP8, 128),
                  lambda gate, up: swiglu_quantize(gate, up, FP8, group_size=128), gate, up)


def test_what_does_not_fit_is_said() -> None:
    x = torch.zeros(2, 256, dtype=torch.float16)
    with pytest.raises(ValueError, match="gate is float32.*expected float16 or bfloat16"):
        swiglu_quantize(x.float(), x.float())
    with pytest.raises(ValueError, match=r"up is bfloat16 \(2, 256\); expected float16 \(2, 256\)"):
        swiglu_quantize(x, x.bfloat16())
    with pytest.raises(ValueError, match="up is float16"):
        swiglu_quantize(x, x[:1])
    with pytest.raises(ValueError, match="up has strides"):
        swiglu_quantize(x, torch.zeros(256, 2, dtype=torch.float16).t())
    with pytest.raises(ValueError, match="group_size is 128"):
        swiglu_quantize(x, x, group_size=128)

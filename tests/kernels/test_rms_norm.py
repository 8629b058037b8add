"""RMSNorm with addition and quantization, against float64 RMSNorm: within half a step of the grid it is rounded to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.processes import interpreted
from tests.kernels.traced import assert_traces

from llmops_kernels.quantize_tokens import quantize_tokens
from llmops_kernels.rms_norm import WIDEST, add_rms_norm, add_rms_norm_quantize, ops, rms_norm_quantize

FP8 = torch.float8_e4m3fn
KINDS = (("int8", -1), ("fp8", -1), ("fp8", 128))
#       M, K, dtype (None: none), group, source, with addition, seed
CASES: list[list[Any]] = [
    *(["norm", m, 200, *KINDS[m % 3], ("bf16", "fp16")[m % 2], m % 5 < 3, m] for m in (0, 1, 2, 3, 15, 16, 17, 33, 64)),
    *(["norm", m, 200, None, -1, ("bf16", "fp16")[m % 2], True, m] for m in (0, 1, 2, 3, 17, 129)),
    *(["norm", 2, k, *kind, "bf16", add, 1] for k in (1, 1000, 5000) for kind in KINDS for add in (True, False)),
    ["far", "norm"]]


def test_results_match_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_row_ops.py", CASES), strict=True):
        assert result["equal"] and result["repeats"], (case, result)
        assert result.get("steps", 0.0) <= 0.501, (case, result)
        assert result.get("error", 0.0) <= (3e-3 if "bf16" in case else 5e-4), (case, result)


def test_it_is_the_steps_one_by_one() -> None:
    """Up to what rounding the norm to bfloat16 in between changes, which is up to one code in a few of a hundred."""
    made = torch.Generator().manual_seed(0)
    x, r = (torch.randn(7, 512, generator=made).to(torch.bfloat16) for _ in range(2))
    weight = (torch.rand(512, generator=made) + 0.5).to(torch.bfloat16)
    y, h = add_rms_norm(x, r, weight, 1e-5)
    assert torch.equal(h, x + r)
    wanted = torch.nn.functional.rms_norm((x + r).float(), (512,), weight.float(), 1e-5)
    assert float((y.float() - wanted).norm() / wanted.norm()) < 3e-3
    codes, scale, again = add_rms_norm_quantize(x, r, weight, 1e-5)
    assert torch.equal(again, h)
    assert all(torch.equal(a, b) for a, b in zip(rms_norm_quantize(h, weight, 1e-5), (codes, scale), strict=True))
    late = quantize_tokens(y)[0]
    assert int((late.int() - codes.int()).abs().max()) <= 1 and float((late != codes).float().mean()) < 0.2


def test_it_traces() -> None:
    x, r, weight = torch.randn(5, 300).half(), torch.randn(5, 300).half(), torch.ones(300).half()
    assert_traces(ops.add_rms_norm.default, (x, r, weight, 1e-6), lambda x, r: add_rms_norm(x, r, weight, 1e-6), x, r)
    assert_traces(ops.rms_norm_quantize.default, (x, weight, 1e-6, torch.int8, -1),
                  lambda x: rms_norm_quantize(x, weight, 1e-6), x)
    assert_traces(ops.add_rms_norm_quantize.default, (x, r, weight, 1e-6, FP8, 128),
                  lambda x, r: add_rms_norm_quantize(x, r, weight, 1e-6, FP8, group_size=128), x, r)


def test_what_does_not_fit_is_said() -> None:
    x, weight = torch.zeros(2, 256, dtype=torch.float16), torch.ones(256, dtype=torch.float16)
    with pytest.raises(ValueError, match="x is float32.*expected float16 or bfloat16"):
        add_rms_norm(x.float(), x.float(), weight, 1e-6)
    with pytest.raises(ValueError, match=r"residual is float16 \(2, 128\); expected float16 \(2, 256\)"):
        add_rms_norm(x, x[:, :128], weight, 1e-6)
    with pytest.raises(ValueError, match=r"weight is bfloat16 \(256,\); expected float16 or float32"):
        rms_norm_quantize(x, weight.bfloat16(), 1e-6)
    with pytest.raises(ValueError, match=r"weight is float16 \(256,\)"):
        rms_norm_quantize(x[:, :128], weight, 1e-6)
    with pytest.raises(ValueError, match=f"expected 1 to {WIDEST}"):
        rms_norm_quantize(torch.zeros(1, WIDEST + 1, dtype=torch.float16), weight, 1e-6)
    with pytest.raises(ValueError, match="group_size is 128"):
        rms_norm_quantize(x, weight, 1e-6, group_size=128)
    with pytest.raises(ValueError, match="residual is on meta; expected cpu"):
        add_rms_norm(x, x.to("meta"), weight, 1e-6)

"""The ops of the quantized KV cache: kernels in the interpreter beside float64, references beside what models store."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.kv_case import empty_cache, vectors
from tests.kernels.processes import interpreted

from llmops.methods.quantize.kv import dequantize_kv, quantize_kv
from llmops_kernels.kv_append import kv_append, kv_rope_append
from llmops_kernels.kv_attention import kv_attention, splits_of
from llmops_kernels.reference.kv_append import dequantize, quantize

FORMATS = ("int8", "fp8", "int4")
NOW = torch.zeros(1, dtype=torch.int64)
#               op, format, dtype, B, H, (G,) T, D, (N, more)
APPENDED: list[list[Any]] = [
    ["append", "int8", "float16", 3, 2, 4, 128], ["append", "int8", "bfloat16", 2, 1, 3, 64],
    ["append", "fp8", "bfloat16", 3, 2, 4, 128], ["append", "fp8", "float16", 2, 3, 1, 16],
    ["append", "int4", "float16", 3, 2, 4, 128], ["append", "int4", "bfloat16", 1, 2, 3, 32],
    ["append", "int4", "bfloat16", 2, 1, 2, 256],
]
TURNED: list[list[Any]] = [["rope", "int8", "bfloat16", 2, 2, 3, 2, 64], ["rope", "fp8", "float16", 1, 1, 2, 3, 128],
                           ["rope", "int4", "bfloat16", 2, 1, 4, 1, 64]]
ATTENDED: list[list[Any]] = [
    ["attention", "int8", "bfloat16", 2, 2, 4, 1, 128, 200, {}],
    ["attention", "int8", "float16", 3, 1, 5, 3, 64, 150, {"first": True, "mask": True}],
    ["attention", "fp8", "float16", 2, 1, 4, 1, 128, 128, {"window": 40, "mask": True}],
    ["attention", "fp8", "bfloat16", 1, 2, 1, 20, 64, 70, {"softcap": 20.0}],
    ["attention", "int4", "float16", 3, 2, 4, 1, 64, 140, {"first": True}],
    ["attention", "int4", "bfloat16", 2, 1, 6, 2, 128, 256, {"mask": True, "window": 100}],
    ["attention", "int4", "float16", 1, 1, 17, 1, 32, 33, {"softcap": 30.0}],
]
EMPTY: list[list[Any]] = [["none", format, B, T] for format in FORMATS for B, T in ((2, 0), (0, 1))]


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    cases = [*APPENDED, *TURNED, *ATTENDED, *EMPTY, ["far", "int8"], *(["wrong", format] for format in FORMATS)]
    results = interpreted("interpret_kv.py", cases)
    assert [result["case"] for result in results] == cases
    return results


def test_no_token_and_no_row_change_nothing(found: list[dict[str, Any]]) -> None:
    for result in of(found, "none"):
        B, T = result["case"][2:]
        assert result["same"] and result["shapes"] == [[B, 6, T, 32], [B, T, 6, 32]], result


def of(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [result for result in found if result["case"][0] == name]


def test_appended_codes_are_those_of_the_reference(found: list[dict[str, Any]]) -> None:
    for result in of(found, "append") + of(found, "rope"):
        # 8 bits bit for bit; 4 bits are summed in another order, and RoPE is float32 beside float64: ties fall apart
        exact = result["case"][0] == "append" and result["case"][1] != "int4"
        assert result["share"] <= (0.0 if exact else 0.01) and result["steps"] <= (0 if exact else 1), result
        assert result["scales"] or result["case"][0] == "rope" or result["case"][1] == "int4", result
        assert result.get("error", 0.0) <= (3e-3 if result["case"][2] == "bfloat16" else 3e-4), result


def test_attention_over_codes_is_that_over_what_they_stand_for(found: list[dict[str, Any]]) -> None:
    for result in of(found, "attention"):
        limit = 3e-3 if result["case"][2] == "bfloat16" else 1e-3 if result["case"][1] == "int4" else 5e-4
        assert result["error"] <= limit and result["worst_row"] <= 4 * limit and result["repeat"], result


def test_offsets_go_past_two_to_the_31(found: list[dict[str, Any]]) -> None:
    assert [(result["same"], result["error"] < 1e-3) for result in of(found, "far")] == [(True, True)]


def test_what_is_not_finite_does_not_come_back_finite(found: list[dict[str, Any]]) -> None:
    assert [result["finite"] for result in of(found, "wrong")] == [[False, False, True]] * 3


@pytest.mark.parametrize("format", FORMATS)
def test_the_reference_stores_what_models_store(format: str) -> None:
    x = vectors(0, 2, 3, 5, 64, torch.float32)
    codes, scales = quantize(x, format)
    wanted = quantize_kv(x, format)
    assert torch.equal(codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    assert torch.equal(scales, torch.cat(wanted.tensors[1:], -1))
    assert torch.equal(dequantize(codes, scales, format), dequantize_kv(wanted))
    long = dequantize(codes, scales, format, torch.float64)
    assert float((long - x).norm() / x.norm()) < {"int8": 0.02, "fp8": 0.04, "int4": 0.12}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_ops_are_known_to_the_compiler(format: str) -> None:
    held = empty_cache(2, 2, 9, 32, format)
    key, value = vectors(1, 2, 2, 3, 32, torch.bfloat16), vectors(2, 2, 2, 3, 32, torch.bfloat16)
    kv_append(key, value, *held, NOW, format)
    query, angle = torch.randn(2, 4, 1, 32, dtype=torch.bfloat16), torch.rand(1, 1, 32)
    start, single = torch.tensor([3]), (query, key[:, :, :1], value[:, :, :1], angle.cos(), angle.sin())
    # "test_schema" multiplies what an op changes by a number, which torch cannot do to E4M3; all of them take seconds
    tried = "ALL" if format == "int8" else "test_faketensor"
    for op, arguments in ((torch.ops.llmops.kv_append, (key, value, *held, NOW, format)),
                          (torch.ops.llmops.kv_rope_append, (*single, *held, start, format)),
                          (torch.ops.llmops.kv_attention, (query, *held, start, None, None, 0.2, 0, 0.0, format))):
        torch.library.opcheck(op, arguments, test_utils=tried)

    def step(start: torch.Tensor) -> torch.Tensor:
        turned = kv_rope_append(*single, *held, start, format)
        return kv_attention(turned, *held, start + 1, scale=0.2, format=format) * 2

    wanted = step(start)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(start), wanted)


def test_what_does_not_fit_is_refused() -> None:
    held = empty_cache(2, 2, 9, 32, "int8")
    x = vectors(1, 2, 2, 3, 32, torch.bfloat16)
    query = torch.zeros(2, 4, 1, 32)

    def refused(message: str, call: Any, *arguments: Any, **more: Any) -> None:
        with pytest.raises(ValueError, match=message):
            call(*arguments, **more)

    refused("format 'int3'; expected one of int8, fp8, int4", kv_append, x, x, *held, NOW, "int3")
    refused("k_codes are torch.int8 .*expected torch.uint8", kv_append, x, x, *held, NOW, "int4")
    refused("heads of 24", kv_append, x[..., :24], x[..., :24], *held, NOW, "int8")
    refused("expected both .batch, heads, tokens, D", kv_append, x, x[:, :, :2], *held, NOW, "int8")
    refused("start is torch.float32", kv_append, x, x, *held, NOW.float(), "int8")
    refused("start is torch.int64 .3,", kv_append, x, x, *held, torch.zeros(3, dtype=torch.int64), "int8")
    refused("start is on meta; expected cpu", kv_append, x, x, *held, NOW.to("meta"), "int8")
    refused("v_scales are torch.float32", kv_append, x, x, *held[:3], held[3].float(), NOW, "int8")
    refused("cos is .1, 3, 16.; expected .2 or 1, 3, 32.", kv_rope_append, x, x, x, torch.zeros(1, 3, 16),
            torch.zeros(1, 3, 16), *held, NOW, "int8")
    refused("query is .2, 3, 3, 32.; expected", kv_rope_append, x[:, :1].expand(2, 3, 3, 32), x, x, x[:1, 0], x[:1, 0],
            *held, NOW, "int8")
    refused("query has 3 heads over 2", kv_attention, query[:, :3], *held, NOW, scale=1.0, format="int8")
    refused("mask is torch.float32", kv_attention, query, *held, NOW, None, torch.zeros(2, 1, 1, 9), scale=1.0,
            format="int8")
    refused("length is torch.int64 .3,", kv_attention, query, *held, torch.tensor([1, 1, 1]), scale=1.0, format="int8")


def test_segments_fill_the_device_and_depend_on_room_alone() -> None:
    assert splits_of(8, 8192, 64, 264) == 33  # batch 1, 8 heads: all of 132 processors twice
    assert splits_of(256, 8192, 64, 264) == 2 and splits_of(4096, 8192, 64, 264) == 1
    assert splits_of(1, 100, 64, 264) == 2 and splits_of(1, 1 << 20, 64, 264) == 128


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_results_match_float64_on_the_gpu() -> None:
    from benchmarks.kernels import kv_append as appends
    from benchmarks.kernels import kv_attention as attentions

    for check in (*appends.checks("cuda"), *attentions.checks("cuda")):
        assert check.error <= check.limit, check

"""2:4 weights of four bits: packed and back, and the product against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.kernels.sparse24_int4_linear import weight
from tests.kernels.processes import interpreted
from tests.kernels.traced import assert_traces

from llmops_kernels.reference import sparse24_int4_linear as reference
from llmops_kernels.sparse24_int4_linear import Sparse24Int4, ops, pack, sparse24_int4_linear

#       M, N, K, dtype, one scale a row, bias, tiles beside the rule's, seed; N and K off every tile and chunk
CASES: list[list[Any]] = [
    *(["sparse_int4", m, 40, 212, ("bf16", "fp16")[i % 2], i % 3 == 0, i % 4 > 1, {}, i]
      for i, m in enumerate((0, 1, 2, 3, 15, 16, 17, 33, 64, 129))),
    *(["sparse_int4", m, 72, 780, dtype, rows, True, {"SPLIT": 3}, seed]
      for m, dtype, rows in ((1, "bf16", False), (17, "fp16", True)) for seed in (0, 1)),
    ["sparse_int4", 2, 33, 4, "bf16", False, True, {}, 1]]


def test_results_match_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_linears.py", CASES), strict=True):
        assert result["equal"] and result["repeats"], (case, result)
        limit = 3e-3 if "bf16" in case else 5e-4
        assert result["error"] <= limit and result["rows"] <= 1.5 * limit, (case, result)


def test_packing_is_exact_and_takes_three_eighths() -> None:
    for n, k, rows in ((1, 4, True), (5, 252, False), (16, 512, False)):
        codes, scale, dense = weight(n, k, rows, 0, torch.float16)
        packed = pack(codes, scale)
        assert torch.equal(reference.unpack(*packed, torch.float32).double(), dense)
        if k == 512:
            assert (packed.codes.nbytes + packed.places.nbytes) * 8 == codes.numel() * 3
    packed = pack(torch.tensor([[0, -8, 0, 7]], dtype=torch.int8), torch.ones(1, 1))
    assert packed.codes.tolist() == [[8 | 7 << 4]] and int(packed.places[0, 0]) == 1 | 3 << 2


def test_on_a_cpu_it_is_the_product_with_the_rounded_weight() -> None:
    codes, scale, dense = weight(48, 256, False, 0, torch.float16)
    x, bias = torch.randn(5, 256).half(), torch.randn(48).half()
    wanted = torch.nn.functional.linear(x, dense.half(), bias)
    assert torch.equal(sparse24_int4_linear(x, pack(codes, scale), bias), wanted)


def test_it_traces() -> None:
    codes, scale, _ = weight(40, 256, False, 0, torch.float16)
    packed, x = pack(codes, scale), torch.randn(5, 256).half()
    assert_traces(ops.sparse24_int4_linear.default, (x, *packed, None),
                  lambda x, *parts: sparse24_int4_linear(x, Sparse24Int4(*parts)), x, *packed)


def test_what_does_not_fit_is_said() -> None:
    codes, scale, _ = weight(8, 256, False, 0, torch.float16)
    packed, x = pack(codes, scale), torch.zeros(2, 256, dtype=torch.float16)
    dense = codes.clone()
    dense[3, 8:12] = 1
    with pytest.raises(ValueError, match="the first in row 3, columns 8 to 11"):
        pack(dense, scale)
    with pytest.raises(ValueError, match="four bits hold -8 to 7"):
        pack(codes * 2, scale)
    with pytest.raises(ValueError, match=r"scale is \(8, 2\); expected \(8, 1\) or \(8, 1\)"):
        pack(codes[:, :128], scale)
    with pytest.raises(ValueError, match="codes are torch.int16"):
        pack(codes.short(), scale)
    for wrong, message in ((packed._replace(scale=packed.scale[:, :1].expand(8, 3).contiguous()), "scale is float16"),
                           (packed._replace(codes=packed.codes[:, :8]), "codes is uint8"),
                           (packed._replace(scale=packed.scale.bfloat16()), "scale is bfloat16"),
                           (packed._replace(places=packed.places.to("meta")), "places is on meta")):
        with pytest.raises(ValueError, match=message):
            sparse24_int4_linear(x, wrong)
    with pytest.raises(ValueError, match="x is float32"):
        sparse24_int4_linear(x.float(), packed)

"""2:4 weights: packed and back, and the product against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.kernels.sparse24_linear import weight
from tests.kernels.processes import interpreted
from tests.kernels.traced import assert_traces

from llmops_kernels.reference import sparse24_linear as reference
from llmops_kernels.sparse24_linear import Sparse24, ops, pack, sparse24_linear

#       M, N, K, dtype, bias, tiles beside the rule's, seed; N and K off every tile and chunk
CASES: list[list[Any]] = [
    *(["sparse", m, 40, 212, ("bf16", "fp16")[i % 2], i % 4 > 1, {}, i]
      for i, m in enumerate((0, 1, 2, 3, 15, 16, 17, 33, 64, 129))),
    *(["sparse", m, 72, 780, dtype, True, {"SPLIT": 3}, seed] for m, dtype in ((1, "bf16"), (17, "fp16"))
      for seed in (0, 1)),
    ["sparse", 3, 72, 300, "fp16", False, {"SWAP": 1}, 0], ["sparse", 2, 33, 4, "bf16", True, {}, 1]]


def test_results_match_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for case, result in zip(CASES, interpreted("interpret_linears.py", CASES), strict=True):
        assert result["equal"] and result["repeats"], (case, result)
        limit = 3e-3 if "bf16" in case else 5e-4
        assert result["error"] <= limit and result["rows"] <= 1.5 * limit, (case, result)


def test_packing_is_exact_and_takes_nine_sixteenths() -> None:
    for n, k in ((1, 4), (5, 252), (16, 512), (3, 1028)):
        w = weight(n, k, seed=k)
        w[n // 2, :4] = torch.tensor([0.0, 0.0, float("nan"), -0.0])
        values, places = reference.pack(w)
        back = reference.unpack(values, places)
        assert torch.equal(back.nan_to_num(7), w.nan_to_num(7))
        if k == 512:
            assert (values.nbytes + places.nbytes) * 16 == w.nbytes * 9
    w = torch.tensor([[0, 0, 0, 3, 1, 2, 0, 0]], dtype=torch.float16)
    values, places = reference.pack(w)
    assert values.tolist() == [[0, 3, 1, 2]]
    assert places[0, :2].tolist() == [0 | 3 << 2, 0 | 1 << 2] and places.shape == (1, 32)


def test_on_a_cpu_it_is_the_dense_product() -> None:
    w, x, bias = weight(48, 256, 0, torch.float16), torch.randn(5, 256).half(), torch.randn(48).half()
    assert torch.equal(sparse24_linear(x, pack(w), bias), torch.nn.functional.linear(x, w, bias))
    assert sparse24_linear(x[:0], pack(w)).shape == (0, 48)


def test_it_traces() -> None:
    packed, x = pack(weight(40, 256, 0, torch.float16)), torch.randn(5, 256).half()
    bias = torch.randn(40).half()
    assert_traces(ops.sparse24_linear.default, (x, packed.values, packed.places, bias, None),
                  lambda x, values, places: sparse24_linear(x, Sparse24(values, places), bias), x, packed.values,
                  packed.places)


def test_what_does_not_fit_is_said() -> None:
    w = weight(8, 256, 0, torch.float16)
    packed, x = pack(w), torch.zeros(2, 256, dtype=torch.float16)
    dense = w.clone()
    dense[3, 8:12] = 1
    with pytest.raises(ValueError, match="1 of 512 groups.*the first in row 3, columns 8 to 11; prune it"):
        pack(dense)
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(8, 256\)"):
        pack(w.float())
    with pytest.raises(ValueError, match="K a multiple of 4"):
        pack(w[:, :254])
    with pytest.raises(ValueError, match="expected a CUDA device"):
        pack(w, prefill=True)
    with pytest.raises(ValueError, match=r"values is float16 \(8, 128\); expected bfloat16 \(any, 128\)"):
        sparse24_linear(x.bfloat16(), packed)
    with pytest.raises(ValueError, match=r"values is float16 \(8, 128\); expected float16 \(any, 64\)"):
        sparse24_linear(x[:, :128], packed)
    with pytest.raises(ValueError, match="places is uint8"):
        sparse24_linear(x, packed._replace(places=packed.places[:, :16]))
    with pytest.raises(ValueError, match="bias is float32"):
        sparse24_linear(x, packed, torch.zeros(8))
    with pytest.raises(ValueError, match="places is on meta"):
        sparse24_linear(x, packed._replace(places=packed.places.to("meta")))

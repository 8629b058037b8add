"""The general integer matmul without a GPU: its results in the interpreter. Its machine code: test_offline.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.processes import interpreted

pytest.importorskip("triton")

#                bits, group, M, N, K, dtype, zero point; N and K off the tile (64 and 128) in most
RESULTS: list[list[Any]] = [
    [4, 128, 1, 64, 256, "bfloat16", False], [4, -1, 17, 72, 200, "float16", False],
    [4, 32, 3, 64, 160, "bfloat16", True], [4, 64, 16, 100, 192, "float16", True],
    [4, 100, 3, 40, 200, "float16", False], [3, 64, 3, 64, 192, "float16", False],
    [2, 32, 17, 50, 96, "float16", True], [8, -1, 16, 64, 256, "bfloat16", False],
    [8, 128, 17, 72, 384, "float16", True], [8, 32, 1, 80, 160, "bfloat16", False],
    [6, -1, 3, 33, 100, "float16", False], [4, 128, 70, 130, 256, "float16", False],
    [4, 128, 0, 64, 256, "bfloat16", False], [8, -1, 0, 33, 100, "float16", True],
]

def test_results_match_float64_in_the_interpreter() -> None:
    results = interpreted("interpret_int_matmul.py", RESULTS)
    assert [result["case"] for result in results] == RESULTS
    for result in results:
        limit = 3e-3 if result["case"][5] == "bfloat16" else 5e-4
        assert result["error"] <= limit and result["worst_row"] <= 1.5 * limit, result
        assert result["repeat"] == 0.0, result


def test_layout_and_checks_at_the_door() -> None:
    from llmops_kernels.int_matmul import int_matmul, pack_codes, unpack_codes

    codes = torch.randint(-8, 8, (5, 200), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    stored = pack_codes(codes, 4)
    assert stored.shape == (5, 128)
    assert int(stored[1, 3]) == (int(codes[1, 3]) + 8) | ((int(codes[1, 67]) + 8) << 4)
    assert torch.equal(unpack_codes(stored, 4, 200), codes)
    x, scale = torch.zeros(2, 200, dtype=torch.float16), torch.ones(5, 1)
    with pytest.raises(ValueError, match="expected .M, K. float16 or bfloat16"):
        int_matmul(x.float(), stored, scale, None, bits=4, group_size=200)
    with pytest.raises(ValueError, match="groups without a rest"):
        int_matmul(x, stored, scale, None, bits=4, group_size=64)
    with pytest.raises(ValueError, match="expected pack_codes' layout"):
        int_matmul(x, codes, scale, None, bits=4, group_size=200)
    with pytest.raises(ValueError, match="expected contiguous int8"):
        int_matmul(x, stored, scale, scale, bits=4, group_size=200)


def test_the_op_is_known_to_torch_without_running() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    import llmops_kernels.int_matmul  # noqa: F401 - registers the op

    with FakeTensorMode():
        x, codes = torch.empty(3, 256, dtype=torch.bfloat16), torch.empty(64, 128, dtype=torch.uint8)
        y = torch.ops.llmops.int_matmul(x, codes, torch.empty(64, 2), None, 4, 128)
    assert y.shape == (3, 64) and y.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", RESULTS, ids=str)
def test_results_match_float64_on_the_gpu(case: list[Any]) -> None:
    from llmops_kernels.int_matmul import int_matmul, pack_codes

    bits, group, m, n, k, dtype, zero = case
    made, half, typed = torch.Generator().manual_seed(1), 1 << (bits - 1), getattr(torch, dtype)
    codes = torch.randint(-half, half, (n, k), generator=made, dtype=torch.int8)
    size = k if group == -1 else group
    scale = torch.exp(torch.empty(n, k // size).uniform_(-6.9, 0, generator=made)).to(typed)
    points = torch.randint(-half, half, scale.shape, generator=made, dtype=torch.int8) if zero else None
    x = torch.randn(m, k, generator=made).to(typed)
    y = int_matmul(x.cuda(), pack_codes(codes, bits).cuda(), scale.cuda(), None if points is None else points.cuda(),
                   bits=bits, group_size=size).cpu()
    shifted = codes.double() if points is None else codes.double() - points.double().repeat_interleave(size, 1)
    exact = x.double() @ (shifted * scale.double().repeat_interleave(size, 1)).T
    assert float((y.double() - exact).norm() / exact.norm()) <= (3e-3 if dtype == "bfloat16" else 5e-4)

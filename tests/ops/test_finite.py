import pytest
import torch

from llmops.ops.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_entry_that_is_not_finite_shows(dtype: torch.dtype) -> None:
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(x) and all_finite(x[:0]) and all_finite(x.t())
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in ((0, 0), (17, 4), (39, 29)):
            worse = x.clone()
            worse[place] = bad
            assert not all_finite(worse)
            worse[3, 3] = -bad  # infinities that cancel
            assert not all_finite(worse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_entries_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    x = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x) and all_finite(-x)
    x[:32] *= -1
    assert all_finite(x)

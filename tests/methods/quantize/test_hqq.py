"""HQQ: below the plain asymmetric grid in its norm, group by group, as stored; whatever the size of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize import QuantizedWeight, hqq, packing, rtn
from llmops.methods.quantize.hqq import P


def weight(seed: int = 0, rows: int = 32, columns: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) * 0.02 + 0.005
    outliers = torch.rand(W.shape, generator=generator) < 0.01
    return W + outliers * torch.randn(W.shape, generator=generator) * 0.2


def lost(made: QuantizedWeight, W: Tensor, group: int) -> Tensor:
    """(out, groups) sum |W - W_q|^p, by a loop over nothing but the definition."""
    return (made.dequantize().double() - W.double()).abs().pow(P).view(len(W), -1, group).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_below_the_plain_asymmetric_grid_in_its_norm(bits: int, group: int) -> None:
    W = weight()
    ours = lost(hqq(W, bits=bits, group_size=group), W, group)
    plain = lost(rtn(W, bits=bits, group_size=group, symmetric=False), W, group)
    assert torch.all(ours <= plain * (1 + 1e-6))
    assert ours.sum() < (0.98 if bits < 8 else 1.0) * plain.sum()


def test_more_iterations_never_lose_and_none_is_the_plain_grid() -> None:
    W = weight(1)
    totals = [float(lost(hqq(W, bits=3, group_size=32, iterations=n), W, 32).sum()) for n in (0, 1, 5, 20)]
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0]
    plain = rtn(W, bits=3, group_size=32, symmetric=False)
    none = hqq(W, bits=3, group_size=32, iterations=0)
    assert torch.equal(none.codes, plain.codes) and torch.equal(none.scale, plain.scale)


def test_the_size_of_the_weights_does_not_matter() -> None:
    W = weight(2)
    small, large = hqq(W, bits=3, group_size=32), hqq(W * 1024, bits=3, group_size=32)
    assert torch.equal(small.codes, large.codes) and torch.equal(small.scale * 1024, large.scale)


def test_zeros_stay_dead_groups_are_fine_and_it_is_deterministic() -> None:
    W = weight(3)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    W = W * mask
    W[0] = 0
    made, again = (hqq(W.bfloat16(), bits=2, group_size=32) for _ in range(2))
    assert torch.all(made.dequantize()[W == 0] == 0)
    assert torch.equal(made.codes, again.codes) and torch.equal(made.scale, again.scale)
    assert made.scale.dtype == torch.bfloat16 and not made.symmetric
    back = packing.unpack(packing.pack(made), bits=2, group_size=32)
    assert torch.equal(back.dequantize(), made.dequantize())


def test_refuses_with_what_was_given_and_expected() -> None:
    with pytest.raises(LlmopsError, match="weight holds NaN"):
        hqq(weight() * float("nan"), bits=4)
    with pytest.raises(LlmopsError, match="group_size 48 does not divide"):
        hqq(weight(), bits=4, group_size=48)
    with pytest.raises(LlmopsError, match="iterations is -1"):
        hqq(weight(), bits=4, iterations=-1)

"""Round to nearest: against an exhaustive search of the grid and against compressed-tensors, invariants, packing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from llmops.errors import LlmopsError, ModelError
from llmops.methods.quantize import QUANTIZERS, QuantizedWeight, grid, packing, rtn
from llmops.methods.quantize.grid import SHRINK, fit

SCHEMES = [(8, -1, True), (4, 128, True), (4, 32, False), (3, 64, True), (2, 32, False), (2, -1, True), (6, 32, True)]


def weight_of(rows: int = 16, columns: int = 128, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=made) * torch.logspace(-3, 1, rows).unsqueeze(1)
    W[1] = W[1].abs() + 0.5  # zero is outside the range of the row
    W[2] = -W[2].abs()
    W[3] = 0
    W[4, :32] = 0
    return W.to(dtype)


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_code_is_the_nearest_on_the_stored_grid(bits: int, group: int, symmetric: bool,
                                                     dtype: torch.dtype) -> None:
    W = weight_of(dtype=dtype)
    made = rtn(W, bits=bits, group_size=group, symmetric=symmetric)
    assert made.scale.dtype == dtype
    half = 1 << (bits - 1)
    size = W.shape[1] if group == -1 else group
    scale = made.scale.double().repeat_interleave(size, 1).unsqueeze(-1)
    zero = 0 if made.zero_point is None else made.zero_point.double().repeat_interleave(size, 1).unsqueeze(-1)
    grid = (torch.arange(-half, half).double() - zero) * scale  # (out, in, codes)
    error = (W.double().unsqueeze(-1) - grid).abs()
    chosen = error.gather(-1, (made.codes.long() + half).unsqueeze(-1)).squeeze(-1)
    assert torch.all(chosen <= error.min(-1).values + 2e-5 * scale.abs().squeeze(-1))  # a tie, divided in float32


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
def test_matches_compressed_tensors(bits: int, group: int, symmetric: bool) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    W = weight_of()
    W[3] = 1e-3  # an all-zero group has no zero point there: 0 / 0
    W[4] = 0.5
    size = W.shape[1] if group == -1 else group
    grouped = W.view(W.shape[0], -1, size)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel" if group == -1 else "group",
                            group_size=None if group == -1 else group)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    made = rtn(W, bits=bits, group_size=group, symmetric=symmetric)
    if symmetric or bits > 4:  # ours may lie the other way round, or up to the largest weight: no worse
        zeros = None if symmetric else zero
        theirs = dequantize(quantize(W, scale, zeros, args, dtype=torch.int8), scale, zeros, args=args)
        lost = [(each - W).view_as(grouped).square().sum(-1) for each in (made.dequantize(), theirs)]
        assert torch.all(lost[0] <= lost[1] * (1 + 1e-5) + 1e-12)
        assert lost[0].sum() < (0.95 if bits <= 4 else 0.99) * lost[1].sum()
        scale, zero = made.scale, zero if made.zero_point is None else made.zero_point
    codes = quantize(W, scale, None if symmetric else zero, args, dtype=torch.int8)
    torch.testing.assert_close(made.scale, scale, rtol=1e-6, atol=0)
    differing = made.codes != codes  # a last-bit difference of the scale may turn a tie
    assert differing.float().mean() < 1e-3
    if not symmetric:
        assert made.zero_point is not None and torch.equal(made.zero_point, zero.to(torch.int8))
    theirs = dequantize(codes, scale, None if symmetric else zero, args=args)
    assert torch.allclose(made.dequantize()[~differing], theirs[~differing], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [5, 8])
def test_above_four_bits_the_largest_weight_lies_on_a_code_where_that_errs_less(bits: int) -> None:
    """Against each of the three scales; in small groups it is much of the squared error."""
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits))
    G, top = W.view(len(W), -1, 32), (1 << (bits - 1)) - 1
    errors = torch.stack([((torch.round(G / s).clamp(-top - 1, top) * s - G) ** 2).sum(-1) for part in (0.0, 0.5, 1.0)
                          for s in [G.abs().amax(-1, keepdim=True) / (top + part)]])
    made = rtn(W, bits=bits, group_size=32)
    ours = (made.dequantize() - W).view_as(G).square().sum(-1)
    assert torch.allclose(ours, errors.min(0).values, rtol=1e-3) and bool((made.scale > 0).all())
    assert ours.sum() < 0.92 * errors[1].sum()  # half a step above the last code, as compressed-tensors has it
    searched = (rtn(W, bits=bits, group_size=32, clip="mse").dequantize() - W).square().sum()
    assert searched < ours.sum()


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
def test_the_searched_clip_is_the_best_of_its_grid_in_every_group(bits: int, group: int, symmetric: bool) -> None:
    W = weight_of(dtype=torch.bfloat16)
    made = rtn(W, bits=bits, group_size=group, symmetric=symmetric, clip="mse")
    size = W.shape[1] if group == -1 else group
    half = 1 << (bits - 1)
    G = W.float().view(len(W), -1, size)
    wide = QuantizedWeight(made.codes, made.scale.float(), made.zero_point, bits, group)
    ours = (G - wide.dequantize().view_as(G)).square().sum(-1)
    best = torch.full_like(ours, float("inf"))
    turns = (1, -1) if symmetric and bits <= 4 else (1,)  # a negative scale turns the grid round
    for p, turn in ((p, turn) for p in SHRINK for turn in turns):
        low, high = (G.amin(-1).clamp(max=0) * p), (G.amax(-1).clamp(min=0) * p)
        span = 2 * torch.maximum(-low, high) if symmetric else high - low
        scale = (span / (2 * half - 1)).bfloat16().float().clamp(min=1e-30) * turn
        zero = 0 * low if symmetric else torch.round(-half - low / scale).clamp(-half, half - 1)
        codes = (torch.round(G / scale.unsqueeze(-1)) + zero.unsqueeze(-1)).clamp(-half, half - 1)
        error = ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1) - G).square().sum(-1)
        best = torch.minimum(best, error)
    assert torch.all(ours <= best * 1.0001 + 1e-9)
    plain = rtn(W, bits=bits, group_size=group, symmetric=symmetric)
    lost = [float((each.dequantize().double() - W.double()).square().sum()) for each in (made, plain)]
    assert lost[0] <= lost[1] * (0.9 if bits == 2 else 1.001)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("numbers", "beside"), [(96, 5), (1 << 10, 64), (1 << 9, 3)])
def test_rows_and_groups_searched_a_few_at_a_time_get_the_same_grids(symmetric: bool, numbers: int, beside: int,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    W, weights = weight_of(), torch.rand(4, 32, generator=torch.Generator().manual_seed(5)) + 0.1

    def found() -> list[grid.Grid]:
        G = W.view(16, 4, 32)
        return [grid.fit(G, 4, symmetric, torch.float32, "mse", importance, quick=quick)
                for importance in (None, weights) for quick in (True, False)]

    whole = found()
    monkeypatch.setattr(grid, "AT_ONCE", numbers)
    monkeypatch.setattr(grid, "_BESIDE", beside)
    for few, all_at_once in zip(found(), whole, strict=True):
        assert torch.equal(few.scale, all_at_once.scale)
        assert symmetric or torch.equal(few.zero, all_at_once.zero)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, True), (4, False), (8, True)])
def test_the_quick_search_is_nearly_as_good_as_the_whole_one_by_weighted_error(bits: int, symmetric: bool) -> None:
    draw = torch.Generator().manual_seed(7)
    G = torch.randn(64, 4, 32, generator=draw) ** 3
    importance = torch.rand(4, 32, generator=draw) + 0.1

    def lost(**how: Any) -> Tensor:
        made = grid.fit(G, bits, symmetric, torch.float32, "mse", **how)
        return (made.nearest(G) - G).square().mul(importance).sum(-1)

    whole, quick, blind = lost(importance=importance), lost(importance=importance, quick=True), lost()
    assert float(quick.sum()) < 1.01 * float(whole.sum())
    assert float(whole.sum()) < float(blind.sum()) * (0.995 if bits < 8 else 1.0001)


def test_the_searched_clip_keeps_zeros_and_refuses_unknown_names() -> None:
    sparse = weight_of() * (torch.rand(16, 128, generator=torch.Generator().manual_seed(3)) > 0.5)
    for symmetric in (True, False):
        made = rtn(sparse, bits=2, group_size=32, symmetric=symmetric, clip="mse")
        assert torch.all(made.dequantize()[sparse == 0] == 0)
    with pytest.raises(LlmopsError, match='unknown clip "mae"; expected absmax or mse'):
        rtn(sparse, bits=4, clip="mae")


def test_error_falls_with_bits_and_with_smaller_groups() -> None:
    W = weight_of(dtype=torch.bfloat16)

    def error(bits: int, group: int, symmetric: bool = True) -> float:
        made = rtn(W, bits=bits, group_size=group, symmetric=symmetric)
        return float((made.dequantize().double() - W.double()).norm())

    assert error(8, -1) < error(4, -1) < error(3, -1) < error(2, -1)
    assert error(4, 32) < error(4, 64) < error(4, -1)
    one_sided = W[2:3]
    lopsided = [rtn(one_sided, bits=4, group_size=-1, symmetric=s).dequantize() - one_sided for s in (True, False)]
    assert lopsided[1].norm() < 0.7 * lopsided[0].norm()  # half the symmetric grid lies where there are no weights


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_on_the_grid_come_back_exactly_and_zero_stays_zero(symmetric: bool) -> None:
    made = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (4, 64), generator=made, dtype=torch.int8)
    codes[:, 0], codes[:, 1] = -8, 7  # the range is used in full
    W = codes.float() * 0.25
    again = rtn(W, bits=4, group_size=-1, symmetric=symmetric).dequantize()
    assert torch.equal(again, W)
    assert torch.equal(rtn(-W, bits=4, group_size=-1, symmetric=symmetric).dequantize(), -W)  # the grid turned round
    assert torch.equal(rtn(W, bits=4, group_size=-1, symmetric=symmetric, clip="mse").dequantize(), W)
    sparse = weight_of() * (torch.rand(16, 128, generator=made) > 0.5)
    assert torch.all(rtn(sparse, bits=3, group_size=32, symmetric=symmetric).dequantize()[sparse == 0] == 0)


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
def test_deterministic_and_back_from_the_stored_form(bits: int, group: int, symmetric: bool) -> None:
    W = weight_of(dtype=torch.bfloat16)
    first, second = (rtn(W.clone(), bits=bits, group_size=group, symmetric=symmetric) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
    back = packing.unpack(packing.pack(first), bits=bits, group_size=group)
    assert torch.equal(back.codes, first.codes) and torch.equal(back.scale, first.scale)
    assert back.symmetric == symmetric
    assert torch.equal(back.dequantize(), first.dequantize())
    stored = packing.pack(first)
    bytes_stored = sum(t.numel() * t.element_size() for name, t in stored.items() if name != "weight_shape")
    assert bytes_stored == pytest.approx(first.bits_per_weight * W.numel() / 8)


def test_refuses_with_what_was_given_and_expected() -> None:
    with pytest.raises(LlmopsError, match="group_size 48 does not divide the 128 input features.*such as 128"):
        rtn(weight_of(), bits=4, group_size=48)
    with pytest.raises(LlmopsError, match="bits is 1; expected 2 to 8"):
        rtn(weight_of(), bits=1)
    with pytest.raises(LlmopsError, match="NaN or infinity"):
        rtn(torch.full((2, 32), float("nan")), bits=4)
    made = rtn(weight_of(), bits=4, group_size=32)
    with pytest.raises(ModelError, match=r"layers\.0: packed .* expected"):
        packing.unpack(packing.pack(made), bits=3, group_size=32, name="layers.0")
    with pytest.raises(ValueError, match=r"scale is \(16, 4\); expected \(16, 1\)"):
        QuantizedWeight(made.codes, made.scale, None, 4, -1)


def test_the_name_stays_the_function_whoever_imports_the_file_first() -> None:
    package = sys.modules["llmops.methods.quantize"]
    module = sys.modules["llmops.methods.quantize.rtn"]
    package.rtn = module  # type: ignore[attr-defined]  # what the import system does
    assert package.rtn is module.rtn is QUANTIZERS["rtn"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_quick_search_finds_what_all_ranges_do_but_for_a_hundredth(bits: int, size: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    G = torch.randn(256, 2, size, generator=generator) * torch.rand(256, 2, 1, generator=generator).exp()
    G[::3] = G[::3].pow(3)  # long tails, which want narrow ranges
    importance = torch.rand(2, size, generator=generator) + 0.1

    def error(quick: bool) -> float:
        grid = fit(G, bits, True, torch.float32, "mse", importance, quick=quick)
        return float(((grid.nearest(G) - G).square() * importance).sum())

    assert error(quick=False) <= error(quick=True) <= 1.01 * error(quick=False)

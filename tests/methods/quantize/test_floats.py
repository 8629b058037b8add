"""4- and 8-bit float weights: against exhaustive search, compressed-tensors' arithmetic, and OBQ in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from llmops.errors import LlmopsError, ModelError
from llmops.methods.quantize import awq_clip, awq_scales, gptq, rtn
from llmops.methods.quantize.float_packing import pack_floats, pack_int8, unpack_floats, unpack_int8
from llmops.methods.quantize.floats import E2M1, FLOATS, FloatFormat, FloatWeight, bound, round_e2m1, round_e4m3
from llmops.methods.quantize.grid import fit
from llmops.models.number_formats import FORMATS, weights

KINDS = tuple(FLOATS)
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[torch.isfinite(E4M3)]


def made(rows: int = 200, columns: int = 256, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows and columns of very different sizes, zeros among them. 200 rows: the last block of 128 is not full."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 0, rows).unsqueeze(1)
    W *= torch.logspace(0, -1, columns)[torch.randperm(columns, generator=generator)]
    W[:, ::7] = 0
    W[3] = 0
    return W.to(dtype)


def hessian(columns: int = 256, tokens: int = 600) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 0.5, columns)
    X = torch.randn(tokens, columns, generator=generator) @ mix
    return 2 / tokens * X.t() @ X


def rise(weight: FloatWeight, W: Tensor, H: Tensor) -> float:
    return norm(weight.dequantize().double() - W.double(), H)


def norm(D: Tensor, H: Tensor) -> float:
    """tr(D H D^T)."""
    return float((D @ H.double() * D).sum())


def args_of(kind: str) -> QuantizationArgs:
    return QuantizationArgs(**weights(kind))


@pytest.mark.parametrize(("values", "rounded"), [(torch.tensor([*E2M1, *(-v for v in E2M1)]), round_e2m1),
                                                 (E4M3, round_e4m3)])
def test_rounding_is_to_the_nearest_number_and_at_ties_to_the_even_one(values: Tensor, rounded: object) -> None:
    values = values.unique()
    between = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, between, torch.randn(4000) * values.abs().max() / 3,
                   values.abs().max() * torch.tensor([2, -9])])
    distance = (x.double().unsqueeze(1) - values.double()).abs()
    least = distance.min(1).values
    found = rounded(x)  # type: ignore[operator]
    assert torch.equal((found.double() - x.double()).abs(), least) and set(found.tolist()) <= set(values.tolist())
    ties = rounded(between)  # type: ignore[operator]
    for tie, low, high in zip(ties.tolist(), values[:-1].tolist(), values[1:].tolist(), strict=True):
        both = sorted((low, high), key=abs)  # of two neighbours, the one whose place from zero is even
        places = values[values >= 0].tolist()
        assert tie == (both[0] if places.index(abs(both[0])) % 2 == 0 else both[1])
    assert not bool(torch.signbit(found[found == 0]).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_codes_are_those_of_compressed_tensors(kind: str, dtype: torch.dtype) -> None:
    """Its scales from its own minima and maxima; its decompression of our tensors; its bytes for the same numbers."""
    W = made(256, dtype=dtype)  # its blocks are whole, for its scales cannot be asked otherwise
    ours, args = rtn(W, bits=FLOATS[kind]), args_of(kind)
    blocks = {"fp8-tensor": W.view(1, 1, -1), "fp8-channel": W.unsqueeze(1),
              "fp8-block": W.view(2, 128, 2, 128).transpose(1, 2).flatten(2), "mxfp4": W.view(256, -1, 32),
              "nvfp4": W.view(256, -1, 16)}[kind].float()
    gparam = generate_gparam(W.float().min(), W.float().max()) if kind == "nvfp4" else None
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=gparam)
    filled = blocks.abs().amax(-1) > 0  # it gives groups of zeros an arbitrary scale
    stored = ours.scale.float() if kind != "mxfp4" else torch.exp2(ours.scale.float() - 127)
    expected = scale.to(dtype).float() if kind.startswith("fp8") else scale.float()
    if kind == "mxfp4":  # what it calls a scale is the exponent until it is compressed
        expected = torch.exp2(scale.float() - 127) if float(scale.max()) > 64 else scale.float()
    tiny = expected < 2**-8  # below, it lets E4M3 scales become 0
    assert torch.equal(stored.view(filled.shape)[filled & ~tiny], expected.view(filled.shape)[filled & ~tiny])
    if gparam is not None:
        assert torch.equal(ours.global_scale, gparam)
    parts = pack_floats(ours)
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind])
    theirs = compressor.decompress(dict(parts), QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    assert torch.equal(theirs, ours.dequantize().to(theirs.dtype))
    back = unpack_floats(parts, kind)
    assert torch.equal(back.codes.view(torch.uint8), ours.codes.view(torch.uint8))
    assert torch.equal(back.dequantize(), ours.dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_the_nearest_of_all_numbers_and_zeros_stay(kind: str) -> None:
    W = made()
    weight = rtn(W, bits=FLOATS[kind])
    unit = FloatWeight(torch.zeros_like(weight.codes), weight.scale, weight.global_scale, kind)
    ones = torch.full_like(weight.codes, 2) if FLOATS[kind].bits == 4 else torch.ones(W.shape).to(torch.float8_e4m3fn)
    scale = replace(unit, codes=ones).dequantize().double()  # what a code of 1 stands for
    values = torch.tensor([*E2M1, *(-v for v in E2M1)]).double() if FLOATS[kind].bits == 4 else E4M3.double()
    error = (weight.dequantize().double() - W.double()).abs()
    chunk = 50
    for first in range(0, len(W), chunk):
        part = slice(first, first + chunk)
        best = torch.stack([(value * scale[part] - W[part].double()).abs() for value in values]).amin(0)
        assert bool((error[part] <= best + 1e-6 * W[part].abs() + 1e-12).all())  # at ties float32 decides
    assert bool((weight.dequantize()[W == 0] == 0).all())


def test_rows_share_scales_by_tensor_row_and_block() -> None:
    W = made()
    assert [tuple(rtn(W, bits=FLOATS[kind]).scale.shape) for kind in KINDS] == [
        (1,), (200, 1), (2, 2), (200, 8), (200, 16)]
    block = rtn(W, bits=FLOATS["fp8-block"])
    assert float(block.scale[1, 0]) == pytest.approx(float(W[128:, :128].abs().max()) / 448, rel=1e-6)
    measured = {kind: rtn(W, bits=FLOATS[kind]).bits_per_weight for kind in KINDS}
    assert measured["mxfp4"] == 4.25 and measured["nvfp4"] == pytest.approx(4.5, abs=0.001)
    assert measured["fp8-tensor"] == pytest.approx(8 + 32 / W.numel())


def test_the_scale_of_mxfp4_by_three_rules() -> None:
    """Largest weights of a group from 4 to 8: floor clamps above 6, even from 7 on takes the next power, up above 6."""
    peaks = torch.tensor([4.0, 5.9, 6.0, 6.1, 6.99, 7.0, 7.9])
    W = torch.ones(7, 32) * 0.3
    W[:, 0] = peaks
    powers = {rule: torch.exp2(rtn(W, bits=replace(FLOATS["mxfp4"], power=rule)).scale.float() - 127).view(-1).tolist()
              for rule in ("floor", "even", "up")}
    assert powers == {"floor": [1.0] * 7, "even": [1.0] * 5 + [2.0] * 2, "up": [1.0] * 3 + [2.0] * 4}
    with pytest.raises(LlmopsError, match='rounding of scales "down"; expected even, floor, up'):
        rtn(W, bits=replace(FLOATS["mxfp4"], power="down"))


@pytest.mark.parametrize("kind", KINDS)
def test_searching_the_range_and_solving_never_lose_against_rounding(kind: str) -> None:
    W, H = made(), hessian()
    plain = rtn(W, bits=FLOATS[kind])
    searched = rtn(W, bits=FLOATS[kind], clip="mse")
    assert float((searched.dequantize() - W).square().sum()) <= float((plain.dequantize() - W).square().sum())
    solved, _ = gptq(W, H, bits=FLOATS[kind])
    clipped = awq_clip(W, H, bits=FLOATS[kind])
    assert rise(solved, W, H) < 0.8 * rise(plain, W, H) and rise(clipped, W, H) <= rise(plain, W, H)
    scales = awq_scales([W], H, bits=FLOATS[kind], steps=4)
    assert scales.loss <= scales.identity_loss
    again, _ = gptq(W, H, bits=FLOATS[kind])
    assert torch.equal(again.codes.view(torch.uint8), solved.codes.view(torch.uint8))
    assert bool((solved.dequantize()[W == 0] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_matches_optimal_brain_quantization_in_float64(kind: str) -> None:
    """Column by column, the inverse updated by its own formula, each group's grid fitted as its turn comes."""
    W0, H = made(160), hessian()
    W, form = W0.double().clone(), bound(FLOATS[kind], W0)
    assert isinstance(form, FloatFormat)
    size = W.shape[1] if form.group_size == -1 else form.group_size
    damped = H.double() + 0.01 * float(H.diagonal().mean()) * torch.eye(len(H))
    inverse, expected = torch.linalg.inv(damped), torch.zeros_like(W)
    for j in range(W.shape[1]):
        if j % size == 0:
            grid = fit(W[:, j:j + size].float().unsqueeze(1), form, True, torch.float32)
        expected[:, j] = grid.nearest(W[:, j].float().view(-1, 1, 1)).view(-1).double()
        expected[:, j][W0[:, j] == 0] = 0
        W -= ((W[:, j] - expected[:, j]) / inverse[j, j]).unsqueeze(1) * inverse[j].unsqueeze(0)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0
        inverse[j, :j] = inverse[j, j + 1:] = inverse[:j, j] = inverse[j + 1:, j] = 0
    ours, _ = gptq(W0, H, bits=FLOATS[kind], order="none", damping=0.01)
    same = (ours.dequantize().double() - expected).abs() <= 1e-5 * expected.abs() + 1e-12
    assert float(same.double().mean()) > 0.995  # float32 turns a tie now and then, and what follows it
    assert rise(ours, W0, H) == pytest.approx(norm(expected - W0.double(), H), rel=0.01)


def test_a_scale_for_the_whole_weight_can_be_shared() -> None:
    small, large = made(64, 128), made(64, 128, seed=1) * 8
    reach = float(large.abs().max())
    for kind in ("fp8-tensor", "nvfp4"):
        shared = replace(FLOATS[kind], reach=reach)
        pair = [rtn(W, bits=shared) for W in (small, large)]
        if kind == "nvfp4":
            assert torch.equal(pair[0].global_scale, pair[1].global_scale)
        else:
            assert torch.equal(pair[0].scale, pair[1].scale)
        assert torch.equal(pair[1].dequantize(), rtn(large, bits=FLOATS[kind]).dequantize())


def test_int8_parts_and_what_does_not_fit() -> None:
    W = made(16, 64)
    weight = replace(rtn(W, bits=8), activation_bits=8)
    back = unpack_int8(pack_int8(weight))
    assert torch.equal(back.codes, weight.codes) and back.activation_bits == 8
    with pytest.raises(ModelError, match=r"layer: weight torch.int8 \(16, 64\), scale \(4, 1\)"):
        unpack_int8({"weight": weight.codes, "weight_scale": weight.scale[:4]}, "layer")
    for kind in KINDS:
        parts = pack_floats(rtn(made(), bits=FLOATS[kind]))
        with pytest.raises(ModelError, match="layer: scale .* expected"):
            unpack_floats(parts | {"weight_scale": torch.ones(5, 3)}, kind, "layer")
        with pytest.raises(ModelError, match="layer: torch.int32"):
            unpack_floats({name: tensor.to(torch.int32) for name, tensor in parts.items()}, kind, "layer")
    with pytest.raises(ValueError, match="scale is"):
        FloatWeight(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8), None, "mxfp4")


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_what_cannot_be_rounded(kind: str) -> None:
    W = made()
    with pytest.raises(LlmopsError, match="holds NaN or infinity"):
        rtn(torch.where(W.max() == W, torch.inf, W), bits=FLOATS[kind])
    if FLOATS[kind].group_size != -1:
        with pytest.raises(LlmopsError, match="does not divide the 264 input features"):
            rtn(torch.ones(8, 264), bits=FLOATS[kind])
    zeros = rtn(torch.zeros(4, 128), bits=FLOATS[kind])
    assert bool((zeros.dequantize() == 0).all())


def test_scales_that_their_type_cannot_hold() -> None:
    with pytest.raises(LlmopsError, match="need scales beyond torch.float16"):
        rtn(torch.full((2, 32), 6e7), bits=FLOATS["fp8-channel"], dtype=torch.float16)

"""GPTQ's and AWQ's layouts against hand-packed words, a decoder that shares no code, and themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmops.errors import LlmopsError, ModelError
from llmops.formats.decode import _fields, _unshuffled
from llmops.methods.quantize import QuantizedWeight, packing, rtn
from llmops.methods.quantize.float_packing import PARTS as FLOAT_PARTS
from llmops.models.layouts import (
    LAYOUTS,
    as_stored,
    foreign_scheme,
    foreign_schemes,
    layout_of,
    to_awq,
    to_gptq,
    zeros_fit_v1,
)
from llmops.models.schemes import LayerScheme

ROWS, COLUMNS = 64, 256
SCHEMES = [LayerScheme(bits, group, symmetric) for bits in (2, 3, 4, 8) for group in (32, 128, -1)
           for symmetric in (True, False)]


def weight(scheme: LayerScheme, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    W = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(scheme.bits)) * 0.05
    return rtn(W.to(dtype), bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric)


def same(found: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> bool:
    return found.keys() == parts.keys() and all(
        found[name].dtype == parts[name].dtype and torch.equal(found[name], parts[name]) for name in parts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gptq_gives_back_codes_scales_and_zeros(scheme: LayerScheme) -> None:
    parts = packing.pack(weight(scheme))
    v2 = not scheme.symmetric and not zeros_fit_v1(parts["weight_zero_point"], scheme.bits, ROWS)
    written = to_gptq(parts, scheme, "layer", v2=v2)
    assert written["qweight"].shape == (COLUMNS * scheme.bits // 32, ROWS)
    assert written["scales"].dtype == torch.float16
    assert same(as_stored(written, "gptq_v2" if v2 else "gptq", scheme, "layer", torch.bfloat16), parts)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.bits == 4])
def test_awq_gives_back_codes_scales_and_zeros(scheme: LayerScheme) -> None:
    parts = packing.pack(weight(scheme))
    written = to_awq(parts, scheme, "layer")
    assert written["qweight"].shape == (COLUMNS, ROWS // 8) and written["qweight"].dtype == torch.int32
    assert same(as_stored(written, "awq", scheme, "layer", torch.bfloat16), parts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_decoder_finds_the_weights_that_were_meant(scheme: LayerScheme) -> None:
    q = weight(scheme)
    parts = {name: tensor.numpy() for name, tensor in to_gptq(packing.pack(q), scheme, "layer", v2=True).items()}
    codes, zeros = _fields(parts["qweight"].T, scheme.bits), _fields(parts["qzeros"], scheme.bits)
    found = parts["scales"][parts["g_idx"]].T.astype(np.float64) * (codes - zeros[parts["g_idx"]].T)
    groups = q.scale.double().repeat_interleave(COLUMNS // q.scale.shape[1], 1).numpy()
    zero = 0 if q.zero_point is None else q.zero_point.repeat_interleave(COLUMNS // q.scale.shape[1], 1).numpy()
    assert np.array_equal(found, groups * (q.codes.numpy().astype(np.int64) - zero))
    if scheme.bits == 4:
        packed = to_awq(packing.pack(q), scheme, "layer")
        assert np.array_equal(_unshuffled(_fields(packed["qweight"].numpy(), 4)), codes.T)


def test_words_are_the_published_ones() -> None:
    """One output's first eight 4-bit codes; the first 11 codes of 3 bits; one input's eight outputs in AWQ's order."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(8, 4)  # unsigned 0..15 along the input
    q = QuantizedWeight(codes, torch.ones(8, 1), None, 4, -1)
    gptq = to_gptq(packing.pack(q), LayerScheme(4, -1, True), "layer")
    assert gptq["qweight"][0, 0].item() == 0x76543210
    assert gptq["qzeros"].tolist() == [[0x77777777]]  # zero point 8, stored as 7
    three = QuantizedWeight(torch.tensor([[0] * 10 + [-1] + [0] * 21] * 32, dtype=torch.int8), torch.ones(32, 1), None,
                            3, -1)
    words = to_gptq(packing.pack(three), LayerScheme(3, -1, True), "layer")["qweight"][:, 0].tolist()
    stream = sum(code << (3 * place) for place, code in enumerate([4] * 10 + [3] + [4] * 21))
    assert [word & 0xFFFFFFFF for word in words] == [(stream >> shift) & 0xFFFFFFFF for shift in (0, 32, 64)]
    by_output = QuantizedWeight(torch.arange(-8, 0, dtype=torch.int8)[:, None].repeat(1, 32), torch.ones(8, 1), None, 4,
                                -1)
    assert to_awq(packing.pack(by_output), LayerScheme(4, -1, True), "layer")["qweight"][0, 0].item() == 0x75316420


def test_a_zero_point_of_0_needs_the_second_version() -> None:
    q = QuantizedWeight(torch.zeros(32, 32, dtype=torch.int8), torch.ones(32, 1),
                        torch.full((32, 1), -8, dtype=torch.int8), 4, -1)
    parts, scheme = packing.pack(q), LayerScheme(4, -1, False)
    assert not zeros_fit_v1(parts["weight_zero_point"], 4, 32)
    assert same(as_stored(to_gptq(parts, scheme, "layer", v2=True), "gptq_v2", scheme, "layer", torch.float32), parts)
    wrapped = to_gptq(parts, scheme, "layer", v2=True) | {"qzeros": torch.full((1, 4), -1, dtype=torch.int32)}
    with pytest.raises(ModelError, match="layer: a zero point of 0 in the first GPTQ layout"):
        as_stored(wrapped, "gptq", scheme, "layer", None)


def test_groups_out_of_order_are_refused() -> None:
    parts = to_gptq(packing.pack(weight(LayerScheme(4, 32, True))), LayerScheme(4, 32, True), "layer")
    parts["g_idx"] = parts["g_idx"].flip(0)
    with pytest.raises(ModelError, match="layer: its g_idx puts input features into groups out of their order"):
        as_stored(parts, "gptq", LayerScheme(4, 32, True), "layer", None)


def test_scales_that_the_model_type_cannot_hold_keep_theirs() -> None:
    scheme = LayerScheme(4, 32, True)
    written = to_gptq(packing.pack(weight(scheme, dtype=torch.float16)), scheme, "layer")
    kept = as_stored(written, "gptq", scheme, "layer", torch.bfloat16)["weight_scale"]
    assert kept.dtype == torch.float16 and torch.equal(kept, written["scales"].t())
    assert as_stored(written, "gptq", scheme, "layer", torch.float32)["weight_scale"].dtype == torch.float32


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_int_quantized_is_read(group: int, symmetric: bool) -> None:
    q = weight(LayerScheme(8, group, symmetric))
    stored = {"weight": q.codes, "weight_scale": q.scale} | ({} if symmetric else {"weight_zero_point": q.zero_point})
    assert same(as_stored(stored, "int-quantized", LayerScheme(8, group, symmetric), "layer", None), packing.pack(q))


def test_what_a_layout_cannot_hold_is_refused() -> None:
    five = packing.pack(weight(LayerScheme(5, 32, True)))
    with pytest.raises(LlmopsError, match="5 bits; GPTQ's layout holds 2, 3, 4, 8"):
        to_gptq(five, LayerScheme(5, 32, True), "layer")
    with pytest.raises(LlmopsError, match="5 bits; AWQ's layout holds 4 alone"):
        to_awq(five, LayerScheme(5, 32, True), "layer")
    odd = packing.pack(rtn(torch.randn(12, 32), bits=4))
    with pytest.raises(LlmopsError, match="layer is 12 x 32, whose 4-bit codes do not fill whole 32-bit words"):
        to_gptq(odd, LayerScheme(4, -1, True), "layer")
    with pytest.raises(LlmopsError, match="layer has 12 outputs; AWQ's layout takes them by eights"):
        to_awq(odd, LayerScheme(4, -1, True), "layer")


@pytest.mark.parametrize(("block", "match"), [
    ({"quant_method": "gptq", "bits": 5}, "5 bits, packed in int32; expected gptq or gptq_v2 at 2, 3, 4 or 8"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format 'marlin'"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv' at 4 bits; expected version gemm"),
    ({"quant_method": "bitsandbytes"}, "quantization bitsandbytes in format None; expected pack-quantized, int-")])
def test_configs_that_cannot_be_read_say_why(block: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        foreign_scheme(block)


def test_layers_of_a_gptq_checkpoint_may_differ() -> None:
    """As GPTQModel reads `dynamic`: the first pattern that matches from the start of the name, else the block."""
    block = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "dynamic": {
        r"+:.*\.q_proj$": {"bits": 3}, r".*\.0\..*": {"bits": 8, "group_size": -1, "sym": False}, "-:.*down_proj": {}}}
    names = ["layers.0.q_proj", "layers.0.o_proj", "layers.1.o_proj"]
    assert foreign_schemes(block, names) == dict(zip(names, [
        LayerScheme(3, 128, True), LayerScheme(8, -1, False), LayerScheme(4, 128, True)], strict=True))
    with pytest.raises(ModelError, match="layers.1.down_proj is stored packed, and '-:.*down_proj' of .* that it is"):
        foreign_schemes(block, ["layers.1.down_proj"])
    with pytest.raises(ModelError, match="says 5 bits; expected 2, 3, 4 or 8"):
        foreign_schemes({**block, "dynamic": {"x": {"bits": 5}}}, ["x"])


def test_layouts_by_config() -> None:
    assert layout_of({"quant_method": "gptq", "bits": 4}) == "gptq"
    assert layout_of({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}) == "gptq_v2"
    gptq = {"quant_method": "gptq", "bits": 3, "group_size": -1, "sym": False}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
    assert foreign_scheme(gptq) == LayerScheme(3, -1, False) and foreign_scheme(awq) == LayerScheme(4, 64, False)
    assert set(LAYOUTS) == {"pack-quantized", "int-quantized", "gptq", "gptq_v2", "awq", *FLOAT_PARTS}

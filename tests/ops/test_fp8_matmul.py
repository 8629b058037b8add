"""float8 weights and activations: against float64, compressed-tensors' rounding, and number by number."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.methods.quantize import rtn
from llmops.methods.quantize.float_packing import pack_floats
from llmops.methods.quantize.floats import FLOATS
from llmops.models.number_formats import activations
from llmops.ops import fp8_matmul as op

SCALES = ["tensor", "channel", "block"]


def layer(scales: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, dense float64)."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator) * torch.logspace(-1, 0, rows).unsqueeze(1)
    weight = rtn(W.to(dtype), bits=FLOATS[f"fp8-{scales}"])
    return pack_floats(weight), weight.dequantize(torch.float64)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (200, 128), (700, 512)])  # the last: more than one chunk
def test_is_the_product_of_what_was_rounded(scales: str, rows: int, columns: int) -> None:
    held, dense = layer(scales, rows, columns)
    x = torch.randn(2, 3, columns) * torch.tensor([0.01, 1, 30]).view(1, 3, 1)
    x[..., 5] *= 20
    bias = torch.randn(rows)
    y = op.fp8_matmul(x, held, scales, bias)
    codes, scale = op.quantize_tokens(x.view(6, columns), 128 if scales == "block" else None)
    rounded = (codes.double().view(6, scale.shape[1], -1) * scale.double().unsqueeze(-1)).view(2, 3, columns)
    exact = rounded @ dense.t()
    assert float((y.double() - bias.double() - exact).abs().max() / exact.abs().max()) < 2e-6
    assert torch.equal(y, op.fp8_matmul(x, held, scales, bias))
    half = op.fp8_matmul(x.to(torch.bfloat16), held, scales)
    assert half.dtype == torch.bfloat16 and half.shape == (2, 3, rows)


@pytest.mark.parametrize("scales", SCALES)
def test_activations_are_rounded_as_compressed_tensors_rounds_them(scales: str) -> None:
    x, args = torch.randn(2, 5, 256) * 3, QuantizationArgs(**(activations(f"fp8-{scales}") or {}))
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    theirs = fake_quantize(x, scale, zero, args)
    codes, ours = op.quantize_tokens(x.view(10, 256), 128 if scales == "block" else None)
    assert torch.equal((codes.float().view(10, ours.shape[1], -1) * ours.unsqueeze(-1)).view(2, 5, 256), theirs)


def test_every_code_is_widened_exactly_and_the_largest_is_kept() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(op.widened(codes).nan_to_num(7e7), codes.float().nan_to_num(7e7))
    found, scale = op.quantize_tokens(torch.tensor([[1e30, -1e30, 1.0, 0.0], [0.0] * 4]))
    assert found.float().tolist() == [[448.0, -448.0, 0.0, 0.0], [0.0] * 4] and float(scale[1, 0]) == 1.0


@pytest.mark.parametrize("scales", SCALES)
def test_a_token_does_not_depend_on_its_neighbours(scales: str) -> None:
    held, _ = layer(scales, 64, 128)
    x = torch.randn(4, 128)
    loud = x.clone()
    loud[3] *= 1e4
    assert torch.equal(op.fp8_matmul(x, held, scales)[:3], op.fp8_matmul(loud, held, scales)[:3])


def test_what_is_refused_and_no_tokens() -> None:
    held, _ = layer("channel", 32, 48)
    assert op.fp8_matmul(torch.zeros(2, 0, 48), held, "channel").shape == (2, 0, 32)
    with pytest.raises(ValueError, match="x has 48 inputs; expected a multiple of 128"):
        op.quantize_tokens(torch.zeros(2, 48), 128)
    with pytest.raises(LlmopsError, match="kernel triton for float8"):
        op.choose("triton")
    with pytest.raises(LlmopsError, match='unknown kernel "cutlass"'):
        op.choose("cutlass")
    assert op.choose() == "reference" and op.describe("reference") == "reference (fp8 codes widened as they are used)"

"""4-bit float weights: every byte against compressed-tensors, every weight against the dense one."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from torch import Tensor
from torch.nn import functional as F

from llmops.errors import LlmopsError
from llmops.methods.quantize import rtn
from llmops.methods.quantize.float_packing import pack_floats
from llmops.methods.quantize.floats import FLOATS
from llmops.ops import fp4_matmul as op

KINDS = ["mxfp4", "nvfp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(kind: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """(parts, dense float32): scales over four decades."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows).unsqueeze(1)
    weight = rtn(W, bits=FLOATS[kind])
    return pack_floats(weight), weight.dequantize()


def test_every_byte_is_two_numbers_low_half_first() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    held = {"weight_packed": every, "weight_scale": torch.full((16, 1), 127, dtype=torch.uint8)}
    assert torch.equal(op.dequantize(held, torch.float32), unpack_fp4_from_uint8(every, 16, 32, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_multiplied_out_in_float32_and_rounded_once(kind: str, dtype: torch.dtype) -> None:
    held, dense = layer(kind, 96, 128)
    assert torch.equal(op.dequantize(held, dtype), dense.to(dtype))
    assert torch.equal(op.dequantize(held, dtype, 10, 30), dense[10:30].to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_dense_layer_to_the_bit(kind: str, dtype: torch.dtype, bias: bool) -> None:
    held, dense = layer(kind, 96, 128)
    x, b = torch.randn(2, 3, 128).to(dtype), torch.randn(96).to(dtype) if bias else None
    y = op.fp4_matmul(x, held, b)
    assert torch.equal(y, F.linear(x, dense.to(dtype), b)) and y.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_rows_make_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, dense = layer(kind, 100, 128)
    x = torch.randn(5, 128)
    monkeypatch.setattr(op, "CHUNK", 128 * 16)
    y = op.fp4_matmul(x, held, torch.ones(100))
    assert float((y - F.linear(x, dense) - 1).abs().max()) < 1e-4 * float(y.abs().max())


def test_what_is_refused_and_no_tokens() -> None:
    held, _ = layer("mxfp4", 32, 64)
    assert op.fp4_matmul(torch.zeros(0, 64), held).shape == (0, 32)
    with pytest.raises(LlmopsError, match="kernel triton for 4-bit floats"):
        op.choose("triton")
    with pytest.raises(LlmopsError, match='unknown kernel "marlin"'):
        op.choose("marlin")
    assert op.choose() == "reference"
    assert op.describe("reference") == "reference (fp4 codes multiplied out as they are used)"

"""int8 weights with int8 activations by token: exact sums, no token that sees another, and compressed-tensors' rule."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.models.number_formats import activations
from llmops.ops import int8_matmul as op

SHAPES = [(128, 256), (33, 100), (16, 2600), (1, 7)]
NAMES = ["reference", "torch:int_mm", *(["torch:qlinear"] if op.qlinear_is_exact() else [])]


def layer(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    codes[0] = 127
    codes[-1] = -128
    return {"weight": codes, "weight_scale": (torch.rand(rows, 1, generator=generator) / 100 + 1e-3).to(dtype)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_sums_are_those_of_integers(name: str, rows: int, columns: int) -> None:
    parts = layer(rows, columns)
    codes = torch.randint(-127, 128, (9, columns), dtype=torch.int8)
    codes[0], codes[1] = 127, -127
    exact = codes.to(torch.int64) @ parts["weight"].to(torch.int64).t()
    found = op.accumulate(codes, op.prepare(parts, name), name)
    assert torch.equal(found, exact.float()) and int(exact.abs().max()) > 100 * columns


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_way_gives_the_same_bits_and_those_of_a_plain_computation(name: str, dtype: torch.dtype) -> None:
    parts = layer(48, 320, torch.bfloat16)
    x = (torch.randn(2, 3, 320) * torch.tensor([0.01, 1, 30]).view(1, 3, 1)).to(dtype)
    bias = torch.randn(48).to(dtype)
    y = op.int8_matmul(x, op.prepare(parts, name), name, bias)
    assert y.dtype == dtype and y.shape == (2, 3, 48)
    assert torch.equal(y, op.int8_matmul(x, parts, "reference", bias))
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    rounded = torch.round((x.float() / scale.float()).double()) * scale
    dense = parts["weight"].double() * parts["weight_scale"].double()
    plain = rounded @ dense.t() + bias.double()
    step = 2e-6 if dtype == torch.float32 else 2.0**-8
    assert bool(((y.double() - plain).abs() <= step * plain.abs() + 1e-5 * scale * 3).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_token_does_not_depend_on_its_neighbours(name: str) -> None:
    """What scaling the whole batch at once (fbgemm's `linear_dynamic`) gets wrong: an outlier coarsens the others."""
    held = op.prepare(layer(64, 128), name)
    x = torch.randn(6, 128)
    alone = torch.cat([op.int8_matmul(row[None], held, name) for row in x])
    loud = x.clone()
    loud[5] *= 1e4
    assert torch.equal(op.int8_matmul(x, held, name), alone)
    assert torch.equal(op.int8_matmul(loud, held, name)[:5], alone[:5])


def test_codes_are_rounded_to_even_and_fill_the_range() -> None:
    codes, scale = op.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0] * 5]))
    assert codes.tolist() == [[127, 0, 2, -2, -127], [0] * 5] and scale[0].tolist() == [1.0]
    codes, scale = op.quantize_rows(torch.randn(50, 64).to(torch.bfloat16))
    assert codes.abs().amax(1).tolist() == [127] * 50 and scale.dtype == torch.float32


def test_with_its_divisor_it_is_what_compressed_tensors_computes() -> None:
    x, args = torch.randn(2, 5, 64), QuantizationArgs(**(activations("w8a8") or {}))
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    theirs = fake_quantize(x, scale, zero, args)
    codes, ours = op.quantize_rows(x.view(10, 64), top=127.5)
    assert torch.equal((codes.float() * ours).view(2, 5, 64), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_come_back_exactly(name: str) -> None:
    for rows, columns in SHAPES:
        parts = layer(rows, columns, torch.bfloat16)
        back = op.recover(op.prepare(parts, name), name)
        assert back.keys() == parts.keys() and all(torch.equal(back[key], parts[key]) for key in parts)


def test_the_choice_and_what_it_is_called() -> None:
    small, large = (op.choose(size, size, device="cpu") for size in (64, 1024))
    assert (small, large) == (("torch:int_mm", "torch:qlinear") if op.qlinear_is_exact() else ("reference",) * 2)
    assert op.choose(64, 64, device="cpu", kernel="torch") == small
    assert op.choose(64, 64, device="cpu", kernel="reference") == "reference" == op.choose(64, 63, device="cuda",
                                                                                                    kernel="torch")
    assert op.choose(64, 64, device="cuda", kernel="torch") == "torch:int_mm"
    assert op.choose(64, 64, device="cuda") == op.choose(64, 63, device="cuda", kernel="ops") == "triton"
    assert op.choose(64, 64, device="cpu", kernel="ops") == "ops" and op.choose(64, 64, device="meta") == "reference"
    assert op.describe("reference") == "reference (int8 activations by token)"
    with pytest.raises(LlmopsError, match="kernel triton for int8 weights"):
        op.choose(64, 64, device="cpu", kernel="triton")
    with pytest.raises(LlmopsError, match='unknown kernel "fbgem"'):
        op.choose(64, 64, device="cpu", kernel="fbgem")


def test_a_machine_that_saturates_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(codes: Tensor, packed: Tensor, rows: int) -> Tensor:
        return torch.full((codes.shape[0], rows), 32767.0)

    monkeypatch.setattr(op, "_qlinear", saturating)
    op.qlinear_is_exact.cache_clear()
    try:
        assert op.choose(64, 64, device="cpu") == "reference"
    finally:
        monkeypatch.undo()
        op.qlinear_is_exact.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name: str) -> None:
    assert op.int8_matmul(torch.zeros(0, 100), op.prepare(layer(33, 100), name), name).shape == (0, 33)

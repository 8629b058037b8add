"""Every way to run a packed linear layer, against float64 and the dequantized weight; and the choice between them."""

from __future__ import annotations

import pytest
import torch

from llmops.errors import LlmopsError
from llmops.ops import int_matmul as op
from llmops.ops.bitstream import pack_bits

SHAPES = [(128, 256), (16, 128), (48, 384), (33, 100), (100, 128)]  # the last two are off every kernel's grid


def layer(bits: int, group: int, rows: int, columns: int, symmetric: bool, dtype: torch.dtype, outlier: float = 1.0
          ) -> tuple[torch.Tensor, op.IntWeight, torch.Tensor]:
    """(packed codes, IntWeight, dense float64): all codes occur, scales spread over three decades."""
    made = torch.Generator().manual_seed(0)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=made, dtype=torch.int8)
    codes.view(-1)[: 2 * half] = torch.arange(-half, half, dtype=torch.int8)
    size = columns if group == -1 else group
    scale = torch.exp(torch.empty(rows, columns // size).uniform_(-6.9, 0, generator=made))
    scale[rows // 2] *= outlier
    scale = scale.to(dtype)
    zero = None if symmetric else torch.randint(-half, half, scale.shape, generator=made, dtype=torch.int8)
    packed_zero = None if zero is None else pack_bits(zero.t().contiguous(), bits).t().contiguous()
    dense = codes.double() if zero is None else codes.double() - zero.double().repeat_interleave(size, 1)
    weight = op.IntWeight(scale, packed_zero, bits, group, rows, columns)
    return pack_bits(codes, bits), weight, dense * scale.double().repeat_interleave(size, 1)


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("bits", "group"), [(8, -1), (4, 32), (4, 128), (4, -1), (3, 64), (2, 32), (8, 32), (6, -1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_choice_is_within_bfloat16_of_float64(rows: int, columns: int, bits: int, group: int,
                                                    symmetric: bool) -> None:
    if group != -1 and columns % group:
        group = -1
    packed, weight, dense = layer(bits, group, rows, columns, symmetric, torch.bfloat16)
    for kernel in ("auto", "reference", *(("ops",) if (rows, columns) in SHAPES[2:4] else ())):
        name = op.choose(rows, columns, bits=bits, group_size=group, symmetric=symmetric, device="cpu", kernel=kernel)
        prepared = op.prepare(packed, weight, name)
        for m in (1, 3, 16, 33):
            x = torch.randn(m, columns, generator=torch.Generator().manual_seed(m)) + 0.5  # a mean: zero points show
            for dtype in (torch.bfloat16, torch.float32, torch.float16):
                y = op.int_matmul(x.to(dtype), prepared, weight, name)
                assert y.dtype == dtype
                limit = 5e-3 if m * rows >= 100 else 1e-2  # among few outputs, one that cancels weighs heavily
                assert relative(y, x.to(dtype).double() @ dense.T) <= limit, (name, m, dtype)
        assert torch.equal(op.recover(prepared, weight, name), packed)


def test_a_row_of_large_weights_does_not_hide_the_others() -> None:
    packed, weight, dense = layer(4, 128, 128, 256, True, torch.bfloat16, outlier=30)
    prepared = op.prepare(packed, weight, op.INT4)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    y, exact = op.int_matmul(x, prepared, weight, op.INT4), x.double() @ dense.T
    assert float(((y.double() - exact).norm(dim=0) / exact.norm(dim=0)).max()) <= 2e-2


def test_the_reference_in_float32_is_exact_to_rounding_and_deterministic() -> None:
    packed, weight, dense = layer(3, 32, 64, 96, False, torch.float32)
    prepared = op.prepare(packed, weight, op.REFERENCE)
    x = torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(0))
    y = op.int_matmul(x, prepared, weight, op.REFERENCE)
    assert y.shape == (2, 7, 64) and relative(y, x.double() @ dense.T) <= 1e-6
    assert torch.equal(y, op.int_matmul(x.clone(), prepared, weight, op.REFERENCE))
    assert relative(op.dequantize(packed, weight), dense) <= 1e-7


def test_empty_batches_strided_input_and_bias() -> None:
    packed, weight, dense = layer(4, 32, 32, 64, True, torch.bfloat16)
    for name in (op.INT4, op.REFERENCE):
        prepared = op.prepare(packed, weight, name)
        assert op.int_matmul(torch.zeros(2, 0, 64), prepared, weight, name).shape == (2, 0, 32)
        wide = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
        bias = torch.arange(32.0)
        y = op.int_matmul(wide[:, ::2], prepared, weight, name, bias)
        assert relative(y, wide[:, ::2].double() @ dense.T + bias.double()) <= 5e-3
        with pytest.raises(ValueError, match=r"x is \(2, 63\); expected \(..., 64\)"):
            op.int_matmul(torch.zeros(2, 63), prepared, weight, name)


@pytest.mark.parametrize(("case", "expected"), [
    ((128, 256, 8, -1, True), op.INT8), ((100, 128, 8, -1, True), op.INT8), ((128, 100, 8, -1, True), op.REFERENCE),
    ((128, 136, 8, -1, True), op.REFERENCE), ((128, 256, 8, 32, True), op.REFERENCE),
    ((128, 256, 8, -1, False), op.REFERENCE), ((128, 256, 6, -1, True), op.INT8),
    ((128, 256, 4, 128, True), op.INT4), ((128, 256, 3, -1, False), op.INT4), ((128, 512, 4, 512, True), op.INT4),
    ((100, 256, 4, 128, True), op.REFERENCE), ((128, 256, 4, 16, True), op.REFERENCE),
    ((128, 100, 4, -1, True), op.REFERENCE)])
def test_choice_follows_what_the_cpu_kernels_take(case: tuple[int, int, int, int, bool], expected: str) -> None:
    rows, columns, bits, group, symmetric = case
    chosen = {kernel: op.choose(rows, columns, bits=bits, group_size=group, symmetric=symmetric, device="cpu",
                                kernel=kernel) for kernel in ("auto", "torch", "reference")}
    assert chosen == {"auto": expected, "torch": expected, "reference": op.REFERENCE}


def test_choice_off_the_cpu_and_names() -> None:
    scheme = {"bits": 4, "group_size": 128, "symmetric": True}
    assert op.choose(128, 256, **scheme, device="cuda") == op.TRITON
    assert op.choose(128, 256, bits=4, group_size=16, symmetric=True, device="cuda") == "triton:general"
    assert op.choose(128, 256, bits=4, group_size=256, symmetric=True, device="cpu", kernel="ops") == op.OPS
    assert op.describe(op.TRITON, 3) == "triton" and op.describe(op.TRITON, 6) == "triton (6-bit codes in 8-bit slots)"
    assert op.describe("triton:general", 3) == "triton:general (3-bit codes in 4-bit slots)"
    assert op.choose(128, 256, **scheme, device="cuda", kernel="torch") == op.REFERENCE
    assert op.choose(128, 256, **scheme, device="mps") == op.REFERENCE
    with pytest.raises(LlmopsError, match="kernel triton on device cpu"):
        op.choose(128, 256, **scheme, device="cpu", kernel="triton")
    with pytest.raises(LlmopsError, match='unknown kernel "tritn".*did you mean "triton"'):
        op.choose(128, 256, **scheme, device="cpu", kernel="tritn")
    assert op.describe(op.INT4, 3) == "torch:int4pack (3-bit codes in 4-bit slots)"
    assert op.describe(op.INT4, 4) == "torch:int4pack" and op.describe(op.INT8, 8) == "torch:int8pack"
    assert op.describe(op.REFERENCE, 3) == "reference"

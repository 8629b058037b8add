"""Keys and values in 8 and 4 bits, against the definitions spelled out number by number."""

from __future__ import annotations

import math

import pytest
import torch

from llmops.errors import LlmopsError
from llmops.methods.quantize import dequantize_kv, quantize_kv
from llmops.methods.quantize.kv import QuantizedKV, rotation, round_kv
from llmops.methods.quantize.options import KV_DTYPES

D = 16


def vectors(seed: int = 0, width: int = D) -> torch.Tensor:
    """(2, 3, 5, width): batch, heads, tokens; the vectors' sizes differ by a thousand, and some lean to one side."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 1, 5)[:, None]
    x = torch.randn(2, 3, 5, width, generator=generator) * sizes
    x[1] += 2 * sizes
    return x


def bf16(number: float) -> float:
    return float(torch.tensor(number).to(torch.bfloat16))


def e4m3() -> list[float]:
    """Every finite number of E4M3, from its bits: bias 7, subnormals, and NaN where all of them are set."""
    found = []
    for bits in range(128):
        exponent, mantissa = bits >> 3, bits & 7
        if bits == 127:
            continue
        found.append(mantissa / 8 * 2 ** -6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return found


E4M3 = e4m3()


def nearest_e4m3(number: float) -> float:
    """Ties go to the even mantissa, which is the even place in the list."""
    size = min(abs(number), 448.0)
    best = min(range(len(E4M3)), key=lambda place: (abs(E4M3[place] - size), place % 2))
    return math.copysign(E4M3[best], number)


def sign(*numbers: int) -> int:
    return (-1) ** sum(number.bit_count() for number in numbers)


def turned(x: list[float], back: bool = False) -> list[float]:
    """x times the rotation of 16, written out."""
    R = [[sign(i & j, i & (i >> 1)) / 4 for j in range(D)] for i in range(D)]
    return [sum(x[i] * (R[j][i] if back else R[i][j]) for i in range(D)) for j in range(D)]


def by_hand(x: list[float], dtype: str) -> list[float]:
    if dtype == "int4":
        x = turned(x)
        low = bf16(min(x))
        step = bf16((max(x) - low) / 15) or 1.0
        return turned([low + step * min(max(round((each - low) / step), 0), 15) for each in x], back=True)
    most = {"int8": 127, "fp8": 448}[dtype]
    scale = bf16(max(map(abs, x)) / most) or 1.0
    if dtype == "fp8":
        return [scale * nearest_e4m3(each / scale) for each in x]
    return [scale * min(max(round(each / scale), -127), 127) for each in x]


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_every_number_is_what_the_definition_says(dtype: str) -> None:
    x = vectors().double()
    found = dequantize_kv(quantize_kv(x, dtype), torch.float64).view(-1, D)
    wanted = torch.tensor([by_hand(row, dtype) for row in x.view(-1, D).tolist()], dtype=torch.float64)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_layout_of_the_codes() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 15.0]])
    packed = quantize_kv(x @ rotation(4, x.device).T, "int4")
    assert packed.codes.tolist() == [[0 | 2 << 4, 1 | 15 << 4]]  # element i low, element i + D/2 high
    assert packed.scale.tolist() == [[1.0]] and packed.minimum is not None and packed.minimum.tolist() == [[0.0]]
    eight = quantize_kv(torch.tensor([[-1.0, 0.5, 0.0, 254.0]]), "int8")
    assert eight.codes.tolist() == [[0, 0, 0, 127]] and eight.scale.tolist() == [[2.0]] and eight.minimum is None
    assert quantize_kv(x, "fp8").codes.view(torch.uint8)[0, -1] == 0x7E  # the largest number: 448


def test_every_code_of_fp8_is_its_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    found = dequantize_kv(QuantizedKV(codes, torch.ones(256, 1, dtype=torch.bfloat16)))[:, 0]
    number = ~codes.float()[:, 0].isnan()
    assert int(number.sum()) == 254 and torch.equal(found[number], codes.float()[number, 0])
    assert torch.equal(found[:127], torch.tensor(E4M3))


@pytest.mark.parametrize(("dtype", "bytes_each"), [("int8", D + 2), ("fp8", D + 2), ("int4", D // 2 + 4)])
def test_bytes_are_those_of_the_codes(dtype: str, bytes_each: int) -> None:
    x = vectors()
    stored = quantize_kv(x, dtype)
    assert sum(part.untyped_storage().nbytes() for part in stored.tensors) == bytes_each * x.numel() // D
    assert all(part.shape[:-1] == x.shape[:-1] for part in stored.tensors)


@pytest.mark.parametrize("width", [2, 16, 64, 96, 128, 10])
def test_the_rotation_is_one_and_shares_out_what_stands_alone(width: int) -> None:
    R = rotation(width, torch.device("cpu"), torch.float64)
    assert torch.allclose(R @ R.T, torch.eye(width, dtype=torch.float64))
    block = width & -width
    most = (R.abs().amax(), (torch.ones(width, dtype=torch.float64) @ R).abs().amax())
    assert float(most[0]) == pytest.approx(block ** -0.5)  # a single channel
    assert float(most[1]) <= 2 ** 0.5 + 1e-9  # an offset of 1: no number larger than sqrt 2, where it could be sqrt D
    x = vectors(5, width).double()
    assert torch.allclose((x @ R) @ (x @ R).mT, x @ x.mT)  # what queries see of keys


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_no_number_is_further_off_than_half_a_step(dtype: str) -> None:
    x = vectors(1)
    error = (dequantize_kv(quantize_kv(x, dtype)) - x).abs()
    if dtype == "int4":  # of what is rounded: x R
        R = rotation(D, x.device)
        error, x = ((dequantize_kv(quantize_kv(x, dtype)) - x) @ R).abs(), x @ R
    most = x.abs().amax(-1, keepdim=True)
    if dtype == "fp8":
        bound = torch.maximum(x.abs() / 16, most / 448 * 2 ** -10) + most * 2 ** -8  # half of 2^-3, and of a subnormal
    else:
        step = most / 127 if dtype == "int8" else (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
        bound = step / 2 + most * 2 ** -8  # a minimum of 8 bits is off by 2^-9 of itself, 15 steps of a scale as well
    assert bool((error <= bound).all())


def test_four_bits_with_a_minimum_lose_less_than_a_symmetric_grid_and_eight_lose_little() -> None:
    x = vectors(2, 64)
    lost = {dtype: float((round_kv(x, dtype) - x).square().sum() / x.square().sum()) for dtype in KV_DTYPES}
    scale = x.abs().amax(-1, keepdim=True) / 7.5
    symmetric = float(((x / scale).round().clamp(-8, 7) * scale - x).square().sum() / x.square().sum())
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 15
    asymmetric = float((((x - low) / step).round() * step + low - x).square().sum() / x.square().sum())
    assert asymmetric < 0.7 * symmetric
    x[..., 3] *= 8  # a channel that is always large, as some of keys are
    low, step = x.amin(-1, keepdim=True), (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    unturned = float((((x - low) / step).round() * step + low - x).square().sum())
    assert float((round_kv(x, "int4") - x).square().sum()) < 0.5 * unturned
    assert lost["int8"] < 1e-4 and lost["fp8"] < 1e-3


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_tokens_and_heads_do_not_touch_each_other_and_the_same_gives_the_same(dtype: str) -> None:
    x = vectors(3)
    whole = quantize_kv(x, dtype)
    for token in range(x.shape[2]):
        alone = quantize_kv(x[1:, 2:, token:token + 1], dtype)
        for part, one in zip(whole.tensors, alone.tensors, strict=True):
            assert torch.equal(part[1:, 2:, token:token + 1].float(), one.float())


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_zeros_constants_and_what_is_no_number(dtype: str) -> None:
    x = torch.zeros(4, D)
    x[1] = 3.0
    x[2, 5], x[3, 7] = float("nan"), float("inf")
    found = dequantize_kv(quantize_kv(x, dtype))
    assert torch.equal(found[0], x[0]) and torch.allclose(found[1], x[1], rtol=2 ** -7)
    assert found[2].isnan().any() and not found[3].isfinite().any()  # seen by everybody, not clipped into a number


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_the_type_stays_and_a_gradient_passes(dtype: str) -> None:
    assert round_kv(vectors().bfloat16(), dtype).dtype == torch.bfloat16
    x = vectors().requires_grad_()
    rounded = round_kv(x, dtype)
    weights = vectors(4)
    (rounded * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    assert torch.allclose(rounded.detach(), dequantize_kv(quantize_kv(x, dtype)), atol=1e-6)


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(LlmopsError, match='unknown type of keys and values "int3"; expected one of int8, fp8, int4'):
        quantize_kv(vectors(), "int3")
    with pytest.raises(LlmopsError, match="heads of 15 numbers .* even head_dim for int4"):
        quantize_kv(vectors()[..., :15], "int4")

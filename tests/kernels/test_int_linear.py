"""The weight-only integer linear layer without a GPU: the kernel in the interpreter, the op on the CPU, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.processes import interpreted

from llmops_kernels.int_linear import Packed, int_linear, launch, layout, pack, tiles, unpack

DECODE = {"BLOCK_M": 16, "BLOCK_N": 64, "PARTS": 1, "num_warps": 4, "num_stages": 2}
SPLIT = DECODE | {"PARTS": 3}
WIDE = SPLIT | {"BLOCK_N": 128, "SWAP": 1, "PARTS": 1}
MIDDLE = {"BLOCK_M": 32, "BLOCK_N": 128, "PARTS": 1, "num_warps": 4, "num_stages": 2}
LARGE = {"BLOCK_M": 64, "BLOCK_N": 128, "PARTS": 2, "SWAP": 1, "num_warps": 8, "num_stages": 2}
DENSE = {"DENSE": 1}
#      bits, group, every M, N, K, dtype, zero point, bias, tile (None: the op's own rule), seed, type of scales
CASES: list[list[Any]] = [
    [4, 128, [0, 1, 2, 3, 15, 16], 200, 640, "bfloat16", False, False, SPLIT],
    [4, 128, [3], 128, 512, "float16", True, True, SPLIT],
    [4, 64, [3], 72, 576, "float16", False, False, DECODE],
    [4, 32, [2], 130, 224, "bfloat16", True, False, SPLIT],
    [4, -1, [16], 64, 300, "float16", True, False, SPLIT],
    [4, 128, [17, 33], 136, 384, "float16", False, True, MIDDLE],
    [4, 64, [0, 64, 129], 130, 320, "bfloat16", True, False, LARGE],
    [4, 128, [0, 1, 17, 64], 72, 512, "bfloat16", False, False, None],
    [4, 128, [3], 72, 256, "float16", False, False, SPLIT, 1],
    [8, -1, [0, 1, 16], 72, 500, "bfloat16", False, True, SPLIT],
    [8, 32, [3], 64, 160, "float16", True, False, DECODE],
    [8, 128, [17], 130, 384, "bfloat16", True, False, MIDDLE],
    [8, 64, [33], 64, 192, "float16", False, False, LARGE],
    [3, 128, [0, 3], 72, 640, "bfloat16", False, False, SPLIT],
    [3, 32, [2], 64, 512, "float16", True, False, DECODE],
    [3, -1, [17], 64, 600, "float16", False, True, MIDDLE],
    [2, 64, [0, 3], 72, 448, "float16", True, False, SPLIT],
    [2, -1, [1], 64, 260, "bfloat16", False, False, DECODE],
    [6, 128, [3], 64, 256, "float16", False, False, DECODE],
    [8, 128, [3], 136, 512, "bfloat16", False, False, None],
    [8, 32, [3, 17], 136, 288, "bfloat16", True, False, None],
    [8, 32, [3], 136, 288, "bfloat16", False, True, None, 0, "float32"],
    [8, 32, [2], 130, 320, "float16", False, True, None],
    [8, 64, [2, 20], 130, 320, "bfloat16", True, True, WIDE],
    [8, -1, [0, 3], 72, 700, "bfloat16", True, True, SPLIT],
    [8, 64, [2, 33], 130, 320, "bfloat16", False, False, None],
    [8, 128, [2], 72, 512, "float16", True, False, None],
    [4, 32, [3, 40], 130, 352, "float16", True, False, None],
    [4, 64, [2, 17], 72, 320, "bfloat16", True, False, None, 0, "float32"],
    [4, 32, [33], 72, 288, "bfloat16", False, False, None, 0, "float32"],
    [3, 128, [17], 72, 512, "bfloat16", True, False, None],
    [4, 128, [40], 136, 640, "bfloat16", True, True, DENSE],
    [3, 64, [0, 40], 72, 576, "float16", False, False, DENSE],
    [8, -1, [40], 72, 300, "bfloat16", False, False, DENSE],
    [2, 32, [40], 72, 288, "float16", True, False, DENSE]]


def test_the_kernel_matches_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    far, *results = interpreted("interpret_int_linear.py", ["far", *CASES])
    assert far["error"] <= 5e-4
    for case, result in zip(CASES, results, strict=True):
        limit = 3e-3 if case[5] == "bfloat16" else 5e-4
        assert result["error"] <= limit and result["worst_row"] <= 2 * limit, (case, result)
        assert result["repeat"] == 0.0 and result["spilled"] == 0, (case, result)


def weight(bits: int, group: int, n: int = 72, k: int = 384, zero: bool = False, dtype: torch.dtype = torch.bfloat16
           ) -> tuple[Packed, torch.Tensor]:
    """A packed weight and the float64 matrix that it stands for."""
    made, half = torch.Generator().manual_seed(bits + group + n), 1 << (bits - 1)
    codes = torch.randint(-half, half, (n, k), generator=made).to(torch.int8)
    size = k if group == -1 else group
    scale = torch.exp(torch.empty(n, k // size).uniform_(-6.9, 0.0, generator=made)).to(dtype)
    points = torch.randint(-half, half, scale.shape, generator=made).to(torch.int8) if zero else None
    shifted = codes.double() if points is None else codes.double() - points.double().repeat_interleave(size, 1)
    return (pack(codes, scale, points, bits=bits, group_size=group),
            shifted * scale.double().repeat_interleave(size, 1))


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packing_is_exact_and_invertible(bits: int, group: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (100, 384), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes.view(-1)[: 2 * half] = torch.arange(-half, half).to(torch.int8)
    packed = pack(codes, torch.ones(100, 1 if group == -1 else 384 // group), bits=bits, group_size=group)
    assert torch.equal(unpack(packed.words, bits, group, 100, 384), codes)
    assert packed.words.is_contiguous() and packed.words.dtype == torch.int16
    field = 8 if bits > 4 else bits  # what is stored is what is promised: no wider slots
    assert packed.words.numel() * 16 == packed.words.shape[0] * 128 * packed.words.shape[1] * \
        layout(bits, group).chunk * field


@pytest.mark.parametrize("bits, group, zero", [(4, 128, False), (4, 32, True), (3, 64, True), (8, -1, False)])
def test_on_the_cpu_the_op_is_the_reference(bits: int, group: int, zero: bool) -> None:
    packed, dense = weight(bits, group, zero=zero)
    for m in (0, 1, 17):
        x = torch.randn(m, 384, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
        y = int_linear(x, packed)
        assert y.shape == (m, 72) and y.dtype == torch.bfloat16
        exact = x.double() @ dense.T
        assert float((y.double() - exact).norm()) <= 3e-3 * float(exact.norm())


def test_opcheck_and_full_graph_compile() -> None:
    packed, _ = weight(4, 128, zero=True)
    x, bias = torch.randn(3, 384).to(torch.bfloat16), torch.randn(72).to(torch.bfloat16)
    parts = (packed.words, packed.scale, packed.zero, bias, 4, 128, 72)
    torch.library.opcheck(torch.ops.llmops.int_linear.default, (x, *parts))
    bare = (packed.words, packed.scale, None, None, 4, 128, 72)
    torch.library.opcheck(torch.ops.llmops.int_linear.default, (x[:0], *bare))
    compiled = torch.compile(lambda x: int_linear(x, packed, bias) * 2, fullgraph=True, backend="aot_eager")
    for m in (3, 5):
        x = torch.randn(m, 384).to(torch.bfloat16)
        assert torch.equal(compiled(x), int_linear(x, packed, bias) * 2)


def test_what_does_not_fit_is_an_error() -> None:
    packed, _ = weight(4, 128)
    x = torch.zeros(2, 384, dtype=torch.bfloat16)
    op, parts, turned = torch.ops.llmops.int_linear, (packed.words, packed.scale), x.t().contiguous().t()
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        (r"x is float32 \(2, 384\); expected float16 or bfloat16", (x.float(), *parts, None, None, 4, 128, 72)),
        (r"strides .* expected its rows contiguous", (turned, *parts, None, None, 4, 128, 72)),
        (r"words is int16 .*; expected int16", (x[:, :256], *parts, None, None, 4, 128, 72)),
        (r"words is int32", (x, packed.words.int(), packed.scale, None, None, 4, 128, 72)),
        (r"words is int16 .*; expected int16 \(1, 1, 128, 3", (x, *parts, None, None, 3, 128, 72)),
        (r"group_size is 48; expected one of \[32, 64, 128\], or -1", (x, *parts, None, None, 4, 48, 72)),
        (r"bits is 9; expected 2 to 8", (x, *parts, None, None, 9, 128, 72)),
        (r"scale is bfloat16 .*; expected .* \(1, 2, 128, 4\)", (x, *parts, None, None, 4, 64, 72)),
        (r"zero is int8", (x, *parts, torch.zeros(1, 2, 128, 2, dtype=torch.int8), None, 4, 128, 72)),
        (r"bias is bfloat16 \(71,\)", (x, *parts, None, torch.zeros(71, dtype=x.dtype), 4, 128, 72)),
        (r"words is on meta; expected cpu", (x, packed.words.to("meta"), packed.scale, None, None, 4, 128, 72)),
        (r"scale has strides", (x, packed.words, packed.scale.mT.contiguous().mT, None, None, 4, 128, 72))]
    for message, arguments in wrong:
        with pytest.raises((ValueError, RuntimeError), match=message):
            op(*arguments)
    with pytest.raises(ValueError, match=r"expected \(M, 384\)"):
        int_linear(x[:, :100], packed)
    with pytest.raises(ValueError, match="expected int8, whole groups"):
        pack(torch.zeros(4, 100, dtype=torch.int8), torch.ones(4, 2), bits=4, group_size=64)


def test_the_rule_fills_the_chip_and_never_asks_for_too_much() -> None:
    for bits in (2, 3, 4, 8):
        for group in (32, 128, -1):
            for n, k in ((4096, 4096), (28672, 8192), (72, 300)):
                for m in (1, 16, 17, 64, 300):
                    tile = tiles(m, n, k, bits, group, 132)
                    made = -(-n // tile["BLOCK_N"]) * -(-m // tile["BLOCK_M"]) * tile["PARTS"]
                    assert tile["BLOCK_M"] >= min(m, 64) and 128 % tile["BLOCK_N"] == 0 and 1 <= tile["PARTS"] <= 16
                    if (bits, n, m) == (4, 4096, 1):
                        assert made >= 132
    assert tiles(4096, 4096, 4096, 4, 128, 132) == {"DENSE": 1}


def test_many_tokens_go_through_a_dense_matmul() -> None:
    packed, dense = weight(4, 128)
    x = torch.randn(600, 384, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    y = launch(x, packed.words, packed.scale, None, None, 4, 128, 72)
    exact = x.double() @ dense.T
    assert float((y.double() - exact).norm()) <= 3e-3 * float(exact.norm())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_follows_its_inputs() -> None:
    packed, dense = weight(4, 128)
    on = Packed(packed.words.cuda(), packed.scale.cuda(), None, 4, 128, 72, 384)
    x = torch.zeros(3, 384, dtype=torch.bfloat16, device="cuda")
    int_linear(x, on)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int_linear(x, on)
    for seed in (0, 1):
        x.copy_(torch.randn(3, 384, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        exact = x.cpu().double() @ dense.T
        assert float((y.cpu().double() - exact).norm()) <= 3e-3 * float(exact.norm())

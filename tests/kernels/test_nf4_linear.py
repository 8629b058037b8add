"""The 4-bit linear layer of bitsandbytes' format without a GPU: the kernel in the interpreter, its assembly, a peer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.processes import interpreted
from tests.kernels.ptx import emulate, numbers

from llmops_kernels.nf4_linear import launch, nf4_linear, of_bitsandbytes, program, tiles
from llmops_kernels.reference.nf4_linear import TABLES

ONE = {"BLOCK_M": 16, "BLOCK_N": 128, "PARTS": 1, "num_warps": 4, "num_stages": 2}
SPLIT, LARGE = ONE | {"PARTS": 2}, ONE | {"BLOCK_M": 64, "num_warps": 8}
#      table, blocksize, nested absmax, every M, N, K, dtype, bias, tile (None: the op's own rule), seed
CASES: list[list[Any]] = [
    ["nf4", 64, False, [0, 1, 2, 3, 15, 16], 136, 512, "float16", False, SPLIT],
    ["nf4", 64, True, [0, 3, 17], 130, 320, "bfloat16", True, SPLIT],
    ["nf4", 64, False, [33, 64, 129], 72, 256, "bfloat16", False, LARGE],
    ["nf4", 64, False, [3], 72, 256, "float16", False, SPLIT, 1],
    ["fp4", 128, False, [3], 72, 384, "float16", True, ONE],
    ["nf4", 256, True, [0, 2], 64, 512, "bfloat16", False, None],
    ["nf4", 32, False, [0, 2], 64, 96, "float16", False, None],  # blocks too small for the kernel: dense
    ["nf4", 64, True, [0, 2], 72, 192, "bfloat16", True, {"DENSE": 1}]]


def test_the_kernel_matches_float64_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    below: list[list[Any]] = [["joined", [3], ONE], ["joined", [2, 17], {"DENSE": 1}]]
    far, *results = interpreted("interpret_nf4_linear.py", [["far"], *CASES, *below])
    assert far["error"] <= 5e-4
    assert [result["error"] for result in results[len(CASES):]] == [0.0, 0.0]
    for case, result in zip(CASES, results[:len(CASES)], strict=True):
        assert result["error"] <= (3e-3 if case[6] == "bfloat16" else 5e-4), (case, result)
        assert result["repeat"] == 0.0 and result["spilled"] == 0, (case, result)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", sorted(TABLES))
def test_the_assembly_looks_every_code_up(kind: str, bf16: bool) -> None:
    every = np.arange(1 << 16, dtype=np.uint32)  # two bytes: all pairs of codes twice, at every place
    words = every | np.random.default_rng(0).permutation(every) << np.uint32(16)
    registers = emulate(program(kind, bf16), {"$4": words, "$5": np.zeros_like(words)})
    exact = torch.tensor(TABLES[kind]).to(torch.bfloat16 if bf16 else torch.float16).double().numpy()
    for byte in range(4):
        code = (words >> np.uint32(8 * byte) & np.uint32(255)).astype(np.int64)
        got = numbers(registers[f"${byte}"], "bf16x2" if bf16 else "f16x2")
        assert np.array_equal(got, np.stack([exact[code >> 4], exact[code & 15]], axis=1))


@pytest.mark.parametrize("kind, nested, blocksize", [("nf4", False, 64), ("nf4", True, 64), ("fp4", True, 128)])
def test_a_weight_of_bitsandbytes_is_read_as_it_is(kind: str, nested: bool, blocksize: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    made = torch.Generator().manual_seed(0)
    dense = torch.randn(96, 256, generator=made) * 0.02
    codes, state = functional.quantize_4bit(dense, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
    back = functional.dequantize_4bit(codes, state).double()
    assert float((back - dense.double()).norm() / dense.norm()) < 0.2  # the peer quantized what we think it did
    x, bias = torch.randn(5, 256, generator=made).to(torch.bfloat16), torch.randn(96, generator=made)
    exact = x.double() @ back.T + bias.double()
    y = nf4_linear(x, codes, state, bias)
    assert float((y.double() - exact).norm() / exact.norm()) <= 3e-3
    y = launch(x, codes, *of_bitsandbytes(state), bias, kind, blocksize, 96, tile={"DENSE": 1})
    assert float((y.double() - exact).norm() / exact.norm()) <= 3e-3


def arguments(nested: bool = False) -> list[Any]:
    x, codes = torch.randn(3, 256).to(torch.bfloat16), torch.randint(0, 256, (64 * 128, 1), dtype=torch.uint8)
    if nested:
        return [x, codes, torch.rand(1), torch.randint(0, 256, (256,), dtype=torch.uint8), torch.rand(256),
                torch.tensor(0.5), None, "nf4", 64, 64]
    return [x, codes, torch.rand(256), None, None, None, torch.rand(64), "nf4", 64, 64]


def test_opcheck_and_full_graph_compile() -> None:
    for nested in (False, True):
        given = arguments(nested)
        torch.library.opcheck(torch.ops.llmops.nf4_linear.default, tuple(given))
        compiled = torch.compile(lambda *given: torch.ops.llmops.nf4_linear(*given) * 2, fullgraph=True,
                                 backend="aot_eager")
        assert torch.equal(compiled(*given), torch.ops.llmops.nf4_linear(*given) * 2)
    given[0] = given[0][:0]
    assert torch.ops.llmops.nf4_linear(*given).shape == (0, 64)


@pytest.mark.parametrize("place, value, message", [
    (0, torch.zeros(3, 256), "x is float32"), (1, torch.zeros(10, dtype=torch.uint8), "expected .* uint8 with 8192"),
    (1, torch.zeros(8192, dtype=torch.int8), "codes are torch.int8"),
    (2, torch.rand(255), r"absmax is float32 \(255,\)"),
    (2, torch.rand(256).half(), "absmax is float16"), (3, torch.zeros(256, dtype=torch.uint8), "some are missing"),
    (7, "nf3", r"kind is 'nf3'; expected one of"), (8, 48, "blocksize is 48"), (9, 65, "expected .*uint8"),
    (5, torch.rand(64), "some are missing"),
    (6, torch.rand(63), r"bias is float32 \(63,\)"), (2, torch.rand(256, device="meta"), "absmax is on meta")])
def test_what_does_not_fit_is_an_error(place: int, value: Any, message: str) -> None:
    given = arguments()
    given[place] = value
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.llmops.nf4_linear(*given)


def test_the_rule_fills_the_chip() -> None:
    for n, k in ((4096, 4096), (28672, 8192), (72, 300)):
        for m in (1, 16, 17, 64, 200):
            tile = tiles(m, n, k, 132)
            assert 1 <= tile["PARTS"] <= 16 and tile["BLOCK_M"] >= min(m, 64)
    assert -(-4096 // 128) * tiles(1, 4096, 4096, 132)["PARTS"] >= 132
    assert tiles(4096, 4096, 4096, 132) == {"DENSE": 1}

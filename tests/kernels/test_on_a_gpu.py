"""What only a GPU can show, for every op with a benchmark: checks there, repeated; graphs replayed on other inputs.

Skipped without one. `benchmarks/gpu.py` runs the same checks before it times anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks import offline
from benchmarks.kernels import fp8_linear as fp8_cases
from benchmarks.kernels import int8_linear as int8_cases
from benchmarks.kernels import sparse24_linear as sparse_cases
from benchmarks.kernels._data import activations
from torch import Tensor

from llmops_kernels.fp8_linear import w8a8_fp8
from llmops_kernels.int8_linear import w8a8
from llmops_kernels.rms_norm import add_rms_norm_quantize
from llmops_kernels.sparse24_linear import pack, sparse24_linear
from llmops_kernels.swiglu_quantize import swiglu_quantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("op", offline.ops())
def test_checks_hold_and_repeat(op: str) -> None:
    checks = importlib.import_module(f"benchmarks.kernels.{op}").checks
    first, second = list(checks("cuda")), list(checks("cuda"))
    assert all(check.error <= check.limit for check in first), first
    assert [check.error for check in first] == [check.error for check in second]


def calls(m: int) -> dict[str, Callable[[Tensor], Any]]:
    """A call per op, of activations (m, 512)."""
    w, scale = (part.cuda() for part in int8_cases.weights(264, 512, 0))
    fp8 = {kind: [part.cuda() for part in fp8_cases.weights(264, 512, kind, 0)] for kind in fp8_cases.KINDS}
    packed = pack(sparse_cases.weight(264, 512, 0).cuda())
    residual, weight = activations(m, 512, 9).cuda(), torch.ones(512, dtype=torch.bfloat16, device="cuda")
    return {"int8": lambda x: w8a8(x, w, scale), "2:4": lambda x: sparse24_linear(x, packed),
            **{f"fp8 {kind}": lambda x, kind=kind: w8a8_fp8(x, *fp8[kind]) for kind in fp8_cases.KINDS},
            "norm": lambda x: add_rms_norm_quantize(x, residual, weight, 1e-6),
            "swiglu": lambda x: swiglu_quantize(x[:, :256], x[:, 256:])}


def same(made: Any, wanted: Any) -> bool:
    pairs = zip(made, wanted, strict=True) if isinstance(made, tuple) else [(made, wanted)]
    return all(torch.equal(a.float(), b.float()) for a, b in pairs)


@pytest.mark.parametrize("m", [1, 16, 33, 129])
def test_a_graph_replays_on_changed_inputs(m: int) -> None:
    for name, call in calls(m).items():
        x, other = (activations(m, 512, seed).cuda() for seed in (1, 2))
        wanted = call(other)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = call(x)
        x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert same(made, wanted), name


@pytest.mark.parametrize("m", [1, 33, 129])
def test_compiled_whole_it_gives_the_same_bits(m: int) -> None:
    x = activations(m, 512, 1).cuda()
    for name, call in calls(m).items():
        torch._dynamo.reset()
        made, wanted = torch.compile(call, fullgraph=True)(x), call(x)
        assert same(made, wanted), name


def test_an_offset_past_2_to_the_31_is_right() -> None:
    """2^31 + 2^25 int8 weights, 2 GiB of them."""
    n, k = 1 << 16, (1 << 15) + 512
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    x, scale = activations(3, k, 1).cuda(), torch.ones(n, 1, device="cuda")
    last = slice(n - 256, n)
    assert torch.equal(w8a8(x, w, scale)[:, last], w8a8(x, w[last].contiguous(), scale[last]))


def test_tensors_on_two_devices_are_refused() -> None:
    w, scale = int8_cases.weights(16, 64, 0)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        w8a8(activations(1, 64, 0).cuda(), w, scale)

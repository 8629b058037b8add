"""`torch.compile(fullgraph=True)` with its own backend, on a CPU: ops between fused loops, at sizes that change."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from benchmarks.kernels import int8_linear as int8_cases
from tests.kernels.kv_case import empty_cache
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode

from llmops_kernels.int8_linear import w8a8
from llmops_kernels.int_linear import int_linear, pack
from llmops_kernels.kv_append import kv_rope_append
from llmops_kernels.kv_attention import kv_attention
from llmops_kernels.rms_norm import add_rms_norm

K, D = 128, 32


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(format: str) -> Any:
    """A step of decode in small: norm, int8 product, RoPE and append, attention, int4 product, what was added to."""
    w, scale = int8_cases.weights(3 * K, K, 0)
    codes = torch.randint(-8, 8, (K, K), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    packed = pack(codes, drawn(K, 1, seed=2).abs() * 0.01, None, bits=4, group_size=-1)
    one = torch.ones(K, dtype=torch.bfloat16)

    def run(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, *cache: Tensor) -> Tensor:
        tokens = x.shape[0]
        y, h = add_rms_norm(x * 2, x, one, 1e-6)
        query, key, value = (part.view(1, tokens, K // D, D).transpose(1, 2) for part in w8a8(y, w, scale).chunk(3, 1))
        turned = kv_rope_append(query, key, value, cos, sin, *cache, start, format)
        attended = kv_attention(turned, *cache, start + tokens, scale=D ** -0.5, format=format)
        return h + int_linear(attended.reshape(tokens, K), packed)

    return run


def arguments(tokens: int, format: str) -> list[Tensor]:
    angle = drawn(1, tokens, D // 2, seed=tokens).repeat(1, 1, 2)
    cache = empty_cache(1, K // D, 40, D, format)
    for part in cache:
        part.zero_()
    return [drawn(tokens, K, seed=3).bfloat16(), angle.cos(), angle.sin(), torch.zeros(1, dtype=torch.int64), *cache]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch's own modules
def test_compiled_by_inductor_it_gives_the_same_bits() -> None:
    run = block("int8")
    with fresh_cache(), config.patch(compile_threads=1), torch.no_grad():  # no pool of processes that stays
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, dynamic=True)
        for tokens in (3, 5, 2):
            given, again = arguments(tokens, "int8"), arguments(tokens, "int8")
            found, wanted = compiled(*given), run(*again)
            assert wanted.isfinite().all() and torch.equal(found, wanted), tokens
            assert all(torch.equal(one, other) for one, other in zip(given, again, strict=True))  # the cache, too
    torch._dynamo.reset()


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
def test_results_lie_in_memory_as_the_compiler_is_told(format: str) -> None:
    """Queries as models give them, heads and tokens exchanged: what comes back is contiguous all the same."""
    query, key = (drawn(2, 3, heads, D).bfloat16().transpose(1, 2) for heads in (4, 2))
    angle, start, cache = drawn(1, 3, D), torch.zeros(1, dtype=torch.int64), empty_cache(2, 2, 8, D, format)

    def run(query: Tensor, key: Tensor, angle: Tensor, start: Tensor, *cache: Tensor) -> tuple[Tensor, Tensor]:
        turned = kv_rope_append(query, key, key, angle, angle, *cache, start, format)
        return turned, kv_attention(query, *cache, start + 3, scale=1.0, format=format)

    found = run(query, key, angle, start, *cache)
    with FakeTensorMode() as mode:
        told = run(*(mode.from_tensor(part) for part in (query, key, angle, start, *cache)))
    for real, fake in zip(found, told, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)

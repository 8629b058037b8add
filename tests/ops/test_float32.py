"""Wider float32 products: as exact as MKL's, the same every time, and only where they were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmops.ops import float32
from llmops.ops.float32 import EXACT, Products, linear, narrower, wider


def setting() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(64, 96, 128), (300, 256, 520)])
def test_products_are_as_exact_as_float32_is(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    torch.manual_seed(0)
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    before = setting()
    with Products():
        found = a @ b
        added = torch.ones(rows, columns).addmm_(a, b)
    assert setting() == before
    assert error(found, a.double() @ b.double()) < EXACT
    assert error(added - 1, a.double() @ b.double()) < EXACT
    with Products():
        assert torch.equal(a @ b, found)


def test_what_is_not_exact_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A oneDNN that takes the liberty it is given is found out by the first product."""
    if not wider():
        pytest.skip("this CPU has no wider products")
    monkeypatch.setattr(float32, "EXACT", 1e-9)
    wider.cache_clear()
    try:
        assert not wider()
        with Products():
            assert setting() != "bf16"
    finally:
        wider.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_gradients_are_those_of_torch(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "wider", lambda: True)  # the way through our function, whatever the CPU
    torch.manual_seed(1)
    layer, x, g = nn.Linear(64, 48, bias=bias), torch.randn(2, 9, 64, requires_grad=True), torch.randn(2, 9, 48)
    leaves = [x, *layer.parameters()]
    exact = torch.autograd.grad(layer(x), leaves, g)
    y = linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, layer(x))
    for mine, theirs in zip(torch.autograd.grad(y, leaves, g), exact, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    alone = torch.autograd.grad(linear(x.detach(), layer.weight), [layer.weight], g)
    torch.testing.assert_close(alone[0], exact[1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), y)


def test_other_types_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "wider", lambda: True)
    x, W = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    assert type(linear(x.bfloat16(), W.bfloat16()).grad_fn).__name__ != "_LinearBackward"
    assert type(linear(x, W).grad_fn).__name__ == "_LinearBackward"


def test_bfloat16_is_taken_only_where_the_cpu_has_it() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("needs Linux to see what the CPU has")
    assert not narrower() or "avx512_bf16" in flags.read_text()

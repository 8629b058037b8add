"""A gradient through packed integers: that of the dense layer, with nothing dense kept."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llmops.methods.quantize import packing
from llmops.methods.quantize.rtn import rtn
from llmops.models.packed import PackedLinear


def layer(bits: int, group_size: int, symmetric: bool, kernel: str) -> tuple[PackedLinear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = rtn(torch.randn(64, 128, generator=generator), bits=bits, group_size=group_size, symmetric=symmetric)
    bias = torch.randn(64, generator=generator)
    made = PackedLinear(packing.pack(weight), bits=bits, group_size=group_size, bias=bias, kernel=kernel)
    return made, weight.dequantize(), bias


@pytest.mark.parametrize("kernel", ["reference", "auto"])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(2, 32, True), (3, 32, False), (4, -1, True),
                                                               (8, -1, True), (8, 32, False)])
def test_value_and_gradient_are_those_of_the_dense_layer(bits, group_size, symmetric, kernel):
    packed, W, bias = layer(bits, group_size, symmetric, kernel)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = packed(ours), F.linear(theirs, W, bias)
    assert torch.equal(y, wanted)
    G = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(G)
    wanted.backward(G)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-5)


def test_nothing_dense_is_kept_for_the_backward_pass():
    packed, _, _ = layer(4, 32, True, "reference")
    kept = []
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        y = packed(x)
    assert kept == [] and y.grad_fn is not None
    assert sum(tensor.numel() * tensor.element_size() for tensor in packed.packed_tensors().values()) < 64 * 128


def test_without_a_gradient_the_kernel_runs():
    packed, _, _ = layer(4, 32, True, "auto")
    x = torch.randn(3, 128)
    assert packed(x).grad_fn is None
    with torch.no_grad():
        assert torch.equal(packed(x.requires_grad_()), packed(x.detach()))


def test_inputs_of_another_width_are_refused():
    packed, _, _ = layer(4, 32, True, "reference")
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 128\)"):
        packed(torch.randn(3, 96, requires_grad=True))

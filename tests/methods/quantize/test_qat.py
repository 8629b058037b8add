"""Fake quantization: what is seen is what is stored, and the gradients are those of the papers."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as peer

from llmops.errors import LlmopsError
from llmops.methods.quantize.qat import fake_quantize, latent_start, learned_scale, settle
from llmops.methods.quantize.rtn import rtn
from llmops.methods.quantize.weight import QuantizedWeight

SCHEMES = [(2, 32, True), (3, 32, True), (3, 16, False), (4, -1, True), (8, 64, False)]


def parent(bits: int, group_size: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16,
           seed: int = 0) -> tuple[torch.Tensor, QuantizedWeight]:
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
    return W, rtn(W.to(dtype), bits=bits, group_size=group_size, symmetric=symmetric)


def arguments(weight: QuantizedWeight) -> dict:
    return {"bits": weight.bits, "group_size": weight.group_size, "dtype": weight.scale.dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_it_begins_as_the_parent_wherever_in_their_cells_the_weights_begin(bits, group_size, symmetric, dtype):
    W, weight = parent(bits, group_size, symmetric, dtype)
    for start in (latent_start(weight), latent_start(weight, near=W), latent_start(weight, near=10 * W),
                  latent_start(weight, draw=torch.Generator().manual_seed(3))):
        seen = fake_quantize(start, weight.scale.float(), weight.zero_point, **arguments(weight))
        assert torch.equal(seen, weight.dequantize().float())
        assert torch.equal(settle(start, weight.scale.float(), weight.zero_point, **arguments(weight)).codes,
                           weight.codes)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_what_is_seen_is_what_is_stored_wherever_training_leads(bits, group_size, symmetric):
    _, weight = parent(bits, group_size, symmetric)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(24, 64, generator=generator) * 1.5
    scale = learned_scale(weight.scale.float(), torch.randn(weight.scale.shape, generator=generator) * 0.3)
    stored = settle(W, scale, weight.zero_point, **arguments(weight))
    assert torch.equal(fake_quantize(W, scale, weight.zero_point, **arguments(weight)), stored.dequantize().float())
    again = settle(stored.dequantize().float(), stored.scale.float(), stored.zero_point, **arguments(weight))
    assert torch.equal(again.codes, stored.codes) and stored.scale.dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_it_rounds_as_compressed_tensors_does(bits, group_size, symmetric):
    _, weight = parent(bits, group_size, symmetric, torch.float32)
    W = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    zero = torch.zeros_like(weight.scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    wanted = peer(W, weight.scale, zero, QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy))
    assert torch.equal(fake_quantize(W, weight.scale, weight.zero_point, **arguments(weight)), wanted)


def brute_force(W, scale, zero, bits, G):
    """Esser et al., eq. 3 and 5, one weight at a time; the range ends half a step further out."""
    by_weight, by_scale = torch.zeros_like(W), torch.zeros_like(scale)
    size = W.shape[1] // scale.shape[1]
    for row in range(W.shape[0]):
        for column in range(W.shape[1]):
            group = column // size
            shift = 0 if zero is None else int(zero[row, group])
            low, high = -(2 ** (bits - 1)) - shift, 2 ** (bits - 1) - 1 - shift
            v = float(W[row, column]) / float(scale[row, group])
            g = float(G[row, column])
            if low <= round(v) <= high:
                by_weight[row, column] = g
                by_scale[row, group] += g * (round(v) - v)
            else:
                by_scale[row, group] += g * (low if v < low else high)
    return by_weight, by_scale


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), SCHEMES)
def test_gradients_are_the_papers(bits, group_size, symmetric):
    _, weight = parent(bits, group_size, symmetric, torch.float32)
    generator = torch.Generator().manual_seed(5)
    W = (torch.randn(24, 64, generator=generator) * 1.5).requires_grad_()
    scale = weight.scale.clone().requires_grad_()
    G = torch.randn(24, 64, generator=generator)
    (fake_quantize(W, scale, weight.zero_point, **arguments(weight)) * G).sum().backward()
    by_weight, by_scale = brute_force(W.detach(), weight.scale, weight.zero_point, bits, G)
    assert torch.equal(W.grad, by_weight)
    torch.testing.assert_close(scale.grad, by_scale, rtol=1e-4, atol=1e-4)


def test_weights_at_the_last_code_are_trained_and_clipped_ones_are_not():
    weight = QuantizedWeight(torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8), torch.tensor([[0.3]]), None, 2, -1)
    W = (latent_start(weight) + torch.tensor([[1e-6, 0, 0, 1e-6]])).requires_grad_()
    fake_quantize(W, weight.scale, None, **arguments(weight)).sum().backward()
    assert W.grad.tolist() == [[1, 1, 1, 1]]
    far = torch.tensor([[-0.8, 0.0, 0.4, 0.5]], requires_grad=True)
    fake_quantize(far, weight.scale, None, **arguments(weight)).sum().backward()
    assert far.grad.tolist() == [[0, 1, 1, 0]]


def test_the_scale_keeps_its_sign_and_begins_where_it_was():
    start = torch.tensor([[0.1, -0.2, 3e-5]])
    assert torch.equal(learned_scale(start, torch.zeros_like(start)), start)
    assert torch.equal(learned_scale(start, torch.full_like(start, -9.0)).sign(), start.sign())


def test_groups_that_do_not_come_out_even_are_refused():
    with pytest.raises(LlmopsError, match="group_size 48 does not divide the 64 input features"):
        fake_quantize(torch.zeros(4, 64), torch.ones(4, 1), None, bits=4, group_size=48, dtype=torch.float32)

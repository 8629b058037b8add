"""AutoRound: never above its start, what is tuned is what is stored, and known optima."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from llmops.errors import LlmopsError, StepError
from llmops.methods.quantize import QuantizedWeight, autoround, packing, rtn
from llmops.methods.quantize.autoround import UNITS, Loss, Product, _Layer, _move, _travelled, inputs_of


def problem(seed: int = 0, batches: int = 3) -> tuple[dict[str, Tensor], Loss]:
    """Two layers in a row with a curve between them, and the squared error of what comes out."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"up": torch.randn(64, 32, generator=generator) * 0.2, "down": torch.randn(16, 64, generator=generator)}
    inputs = [torch.randn(40, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
              for _ in range(batches)]

    def out(product: Product, batch: int) -> Tensor:
        return product("down", torch.tanh(product("up", inputs[batch])))

    return weights, lambda given, batch: (out(given, batch) - out(of(weights), batch)).square().mean()


def of(weights: Mapping[str, Tensor]) -> Product:
    return lambda name, x: x @ weights[name].t()


def mean(loss: Loss, made: Mapping[str, QuantizedWeight], batches: int = 3) -> float:
    return sum(float(loss(of({name: each.dequantize() for name, each in made.items()}), batch))
               for batch in range(batches)) / batches


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 16, True), (3, 32, False), (4, -1, True), (2, -1, False)])
def test_what_is_tuned_is_what_is_stored_and_better_than_rounding(bits: int, group: int, symmetric: bool) -> None:
    weights, loss = problem()
    made, report = autoround(weights, loss, 3, bits=bits, group_size=group, symmetric=symmetric, iterations=60)
    plain = {name: rtn(W, bits=bits, group_size=group, symmetric=symmetric, clip="mse") for name, W in weights.items()}
    assert report.start == pytest.approx(mean(loss, plain), rel=1e-4)
    assert report.best == pytest.approx(mean(loss, made), rel=1e-4)
    assert report.best < 0.8 * report.start and report.iterate > 0
    for name, each in made.items():  # an offset turns a rounding, it does not travel: half a step, and a tie
        step = each.scale.abs().repeat_interleave(weights[name].shape[1] // each.scale.shape[1], 1)
        half = 1 << (bits - 1)
        inside = (each.codes > -half) & (each.codes < half - 1)
        assert torch.all(((each.dequantize() - weights[name]).abs() <= 1.001 * step)[inside])


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_written_steps_are_those_of_the_equations(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd through the equations themselves, `round` passed as if it were not there."""
    generator = torch.Generator().manual_seed(3)
    W, out = torch.randn(6, 64, generator=generator), torch.randn(6, 64, generator=generator)
    monkeypatch.setattr(sys.modules[_Layer.__module__], "AT_ONCE", 128)  # two rows
    for bits in (2, 3):
        layer = _Layer(W, bits=bits, group_size=16, symmetric=symmetric, dtype=torch.float32)
        layer.V.copy_((torch.rand(6, 4, 16, generator=generator) - 0.5) * UNITS)
        V, *factors = (each.clone().requires_grad_() for each in (layer.V / UNITS, *layer.factors))
        high = layer.high * factors[0]
        low = -high if symmetric else layer.low * factors[1]
        s = (layer.sign * (high - low) / (2**bits - 1)).unsqueeze(-1)
        bottom, top = (torch.as_tensor(end).expand(6, 4).unsqueeze(-1) for end in layer.grid().bounds())
        exact = layer.G / s + V
        steps = exact + (exact.round() - exact).detach()
        plain = (steps.clamp(bottom, top) * s).flatten(1)
        gradients = torch.autograd.grad(plain, (V, *factors), out)
        assert bool((gradients[0] == 0).any())  # where it was clamped
        torch.testing.assert_close(layer.rounded(), plain.detach())
        layer.gradient = out.clone()
        layer.settle(0.03, round(0.03 * UNITS))
        for mine, before, gradient, (least, most) in zip((layer.V / UNITS, *layer.factors), (V, *factors), gradients,
                                                         ((-0.5, 0.5), (0, 1), (0, 1)), strict=False):
            torch.testing.assert_close(mine, (before - 0.03 * gradient.sign()).clamp(least, most).detach(), atol=2e-5,
                                       rtol=0)
        assert layer.gradient is None


@pytest.mark.parametrize("narrow", [False, True])
def test_a_layer_moves_once_however_often_it_is_run(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sum of its gradients, also where one of its outputs leads nowhere; one that is not run stays. Backward
    products in bfloat16 change the sign of next to none."""
    monkeypatch.setattr(sys.modules[_Layer.__module__], "narrower", lambda: narrow)
    generator = torch.Generator().manual_seed(4)
    W = {name: torch.randn(16, 16, generator=generator) for name in ("twice", "idle")}
    x = torch.randn(5, 16, generator=generator)
    target = torch.randn(5, 16, generator=generator)

    def squared(made: Tensor) -> Tensor:
        return (torch.tanh(x @ made.t()) @ made.t() - target).square().mean()

    for lost in (False, True):
        layers = {name: _Layer(each, bits=3, group_size=8, symmetric=True, dtype=torch.float32)
                  for name, each in W.items()}
        made = layers["twice"].rounded().requires_grad_()
        expected = _Layer(W["twice"], bits=3, group_size=8, symmetric=True, dtype=torch.float32)
        (expected.gradient,) = torch.autograd.grad(squared(made), made)
        expected.settle(0.1, round(0.1 * UNITS))

        def loss(product: Product, batch: int, lost: bool = lost) -> Tensor:
            if lost:
                product("twice", x)
            return (product("twice", torch.tanh(product("twice", x))) - target).square().mean()

        _move(layers, loss, 0, 0, 10)
        same = float((layers["twice"].V == expected.V).float().mean())
        assert same > (0.95 if narrow else 0.99)  # but where a gradient is almost nothing
        assert torch.equal(layers["idle"].V, torch.zeros_like(layers["idle"].V))


@pytest.mark.parametrize("iterations", [1, 3, 50, 200, 5000])
def test_steps_in_whole_units_add_up_to_the_schedule(iterations: int) -> None:
    rates = [(1 - t / iterations) / iterations for t in range(iterations)]
    for t in {0, 1, iterations // 2, iterations}:
        assert abs(_travelled(t, iterations) - UNITS * sum(rates[:t])) <= 0.5 + 1e-6 * UNITS
    steps = [_travelled(t + 1, iterations) - _travelled(t, iterations) for t in range(iterations)]
    assert min(steps) >= 0 and sum(steps) >= UNITS // 2


def test_inputs_that_stand_for_a_hessian() -> None:
    generator = torch.Generator().manual_seed(5)
    for tokens in (200, 10):  # 10 tokens tell of 10 directions only
        X = torch.randn(tokens, 32, generator=generator)
        H = 2 / tokens * X.t() @ X
        R = inputs_of(H)
        torch.testing.assert_close(R.t() @ R, H, atol=1e-4, rtol=1e-4)
    with pytest.raises(StepError, match="could not be factorised"):
        inputs_of(torch.full((4, 4), float("nan")))


def test_never_above_the_start_even_when_every_step_makes_it_worse() -> None:
    weights, _ = problem()
    plain = {name: rtn(W, bits=3, group_size=16, clip="mse").dequantize() for name, W in weights.items()}

    def away(product: Product, batch: int) -> Tensor:  # least at plain rounding itself
        return torch.stack([(product(name, torch.eye(W.shape[1])).t() - W).square().sum()
                            for name, W in plain.items()]).sum()

    made, report = autoround(weights, away, 1, bits=3, group_size=16, iterations=20)
    assert report.best == report.start and report.iterate == 0
    for name in made:
        torch.testing.assert_close(made[name].dequantize(), plain[name])
    none, report = autoround(weights, away, 1, bits=3, group_size=16, iterations=0)
    assert report.iterate == 0
    torch.testing.assert_close(none["up"].dequantize(), plain["up"])


def test_the_same_seed_gives_the_same_codes_and_bfloat16_scales_come_back() -> None:
    weights, loss = problem()
    first, second = (autoround(weights, loss, 3, bits=3, group_size=16, iterations=20, seed=7, dtype=torch.bfloat16)[0]
                     for _ in range(2))
    for name, each in first.items():
        assert each.scale.dtype == torch.bfloat16
        assert torch.equal(each.codes, second[name].codes) and torch.equal(each.scale, second[name].scale)
        back = packing.unpack(packing.pack(each), bits=3, group_size=16)
        assert torch.equal(back.dequantize(), each.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero(symmetric: bool) -> None:
    weights, loss = problem()
    mask = torch.rand(64, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    weights["up"] *= mask
    weights["down"][0] = 0
    made, report = autoround(weights, loss, 3, bits=2, group_size=16, symmetric=symmetric, iterations=40)
    assert report.best < report.start
    assert torch.all(made["up"].dequantize()[~mask] == 0) and torch.all(made["down"].dequantize()[0] == 0)


def test_refuses_what_it_cannot_use() -> None:
    weights, loss = problem()
    with pytest.raises(LlmopsError, match="0 batches"):
        autoround(weights, loss, 0, bits=4)
    with pytest.raises(LlmopsError, match="weight holds NaN"):
        autoround({"up": weights["up"] * float("nan")}, loss, 1, bits=4)
    with pytest.raises(StepError, match="loss of the block is NaN"):
        autoround(weights, lambda product, batch: product("up", torch.eye(32)).sum() * float("nan"), 1, bits=4)

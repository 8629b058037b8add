"""Layers solved together: the same weights as one by one, and only where they really see the same input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmops.build.solving import Together
from llmops.errors import LlmopsError
from llmops.methods.quantize.gptq import factorize, gptq

HOW = {"bits": 3, "group_size": 32, "symmetric": True}
MORE = {"clip": "mse"}


def block() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    for name, rows in (("q_proj", 48), ("k_proj", 16), ("v_proj", 16), ("o_proj", 64)):
        model.register_module(name, nn.Linear(64, rows, bias=False))
    return model


def hessian(seed: int) -> Tensor:
    X = torch.randn(300, 64, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 0.5, 64)
    return X.t() @ X * (2 / 300)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each pass over the columns solves, as they come."""
    from llmops.build import solving

    seen: list[int] = []
    one, several = solving.gptq, solving.gptq_alike

    def alone(*given: Any, **named: Any) -> Any:
        seen.append(1)
        return one(*given, **named)

    def together(weights: Any, *given: Any, **named: Any) -> Any:
        seen.append(len(weights))
        return several(weights, *given, **named)

    monkeypatch.setattr(solving, "gptq", alone)
    monkeypatch.setattr(solving, "gptq_alike", together)
    return seen


def same(model: nn.Module, name: str, H: Any, found: Any) -> bool:
    alone, told = gptq(model.get_submodule(name).weight, H, **HOW, **MORE)
    apart = (found[0].codes != alone.codes).float().mean()  # products of other shapes may turn a tie
    return torch.allclose(found[0].scale, alone.scale, rtol=1e-5, atol=0) and float(apart) < 2e-3 \
        and found[1].loss == pytest.approx(told.loss, rel=1e-4)


def test_those_that_see_the_same_input_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, H = block(), factorize(hessian(0), group_size=32)
    passes, solve = counted(monkeypatch), Together(model, (), lambda _: HOW, **MORE)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert same(model, name, H, solve(name, model.get_submodule(name), H))
    assert passes == [3, 1] and not solve.ahead


def test_one_that_sees_another_input_is_solved_again_with_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, H, other = block(), factorize(hessian(0), group_size=32), factorize(hessian(1), group_size=32)
    passes, solve = counted(monkeypatch), Together(model, (), lambda _: HOW, **MORE)
    for name, factor in (("q_proj", H), ("k_proj", other), ("v_proj", H)):
        assert same(model, name, factor, solve(name, model.get_submodule(name), factor))
    assert passes == [3, 3, 3]


@pytest.mark.parametrize("case", ["ignored", "other bits", "not finite"])
def test_what_does_not_belong_to_it_stays_out(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, H = block(), factorize(hessian(0), group_size=32)
    if case == "not finite":
        model.get_submodule("v_proj").weight.data[0, 0] = float("nan")
    how = {**HOW, "bits": 4} if case == "other bits" else HOW
    passes = counted(monkeypatch)
    solve = Together(model, ["v_proj"] if case == "ignored" else (), lambda name: how if name == "v_proj" else HOW,
                     **MORE)
    for name in ("q_proj", "k_proj"):
        assert same(model, name, H, solve(name, model.get_submodule(name), H))
    assert passes == [2]
    if case == "not finite":  # it is named in its own turn, not in that of another
        with pytest.raises(LlmopsError, match="the weight holds NaN"):
            solve("v_proj", model.get_submodule("v_proj"), H)

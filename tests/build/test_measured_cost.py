"""Targets of energy, on a sensor that counts what was really run: its joules are the weights that were multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.runs import chat
from tests.twins import twin
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import llmops
from llmops.build import measured_cost
from llmops.errors import LlmopsError
from llmops.measure.sensors import NullSensor

WORK = {"prompt_tokens": 4, "new_tokens": 3, "repeats": 3}
ROWS = [chat(f"Where is {n}?", "here" if n % 2 else "there") for n in range(24)]


class Counting:
    """One joule for every weight of a layer in a decoder block, each time that the layer runs."""

    name, provenance, method, update_period_s = "counting", "measured", "weights multiplied", None

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}
        self.joules = 0.0

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.out_features != 512:  # the head is none of a block's
            self.joules += module.weight.numel()

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def read(self) -> dict[str, float]:
        return {"all": self.joules}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    sensor = Counting()
    monkeypatch.setattr(measured_cost, "probe", lambda *_: sensor)
    hook = register_module_forward_hook(sensor.hook)
    yield sensor
    hook.remove()


def weights(model: nn.Module) -> int:
    return sum(layer.weight.numel() for name, layer in model.named_modules()
               if isinstance(layer, nn.Linear) and name != "lm_head")


def test_as_many_layers_stay_as_the_joules_pay_for(counted: Counting) -> None:
    for share, layers in ((0.8, 3), (0.75, 3), (0.74, 2), (0.26, 1)):
        model, tokenizer = twin("llama", torch.float32)
        small = llmops.apply(model, tokenizer, {"prune": {"method": "depth", "joules": share, **WORK}})
        assert small.config.num_hidden_layers == layers, share
    assert counted.joules > 0


def test_the_widest_shape_within_the_joules_is_taken(counted: Counting) -> None:
    model, tokenizer = twin("llama", torch.float32)
    before = weights(model)
    narrow = llmops.apply(model, tokenizer, {"prune": {
        "method": "width", "joules": 0.7, "axes": ["intermediate"], "multiple": 8, "data": "c", "length": 32, **WORK}},
        ROWS)
    after = weights(narrow)
    one_step_more = after + 4 * 3 * 128 * 8  # layers, their three FFN matrices, hidden, channels
    assert after <= 0.7 * before < one_step_more


def test_a_share_that_no_layer_count_meets_and_a_machine_without_sensor(counted: Counting,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = twin("llama", torch.float32)
    with pytest.raises(LlmopsError, match=r"joules is 0.2; one layer of 4 still costs 0.250 of the whole"):
        llmops.apply(model, tokenizer, {"prune": {"method": "depth", "joules": 0.2, **WORK}})
    monkeypatch.setattr(measured_cost, "probe", lambda *_: NullSensor("no counter here"))
    with pytest.raises(LlmopsError, match="joules: no counter here; expected a sensor of energy"):
        llmops.apply(model, tokenizer, {"prune": {"method": "depth", "joules": 0.5, **WORK}})

"""Swaps against a model that was changed by hand, gradients against autograd on the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.twins import NAMES, tokens, twin
from torch import nn

from llmops.errors import LlmopsError
from llmops.methods.quantize import QuantizedWeight, rtn
from llmops.methods.quantize.sensitivity import divergence
from llmops.swaps import crop_gradients, swap_scores

ENDS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]]


def swap(model: Any, names: list[str], bits: int) -> dict[str, QuantizedWeight]:
    return {name: rtn(model.get_submodule(name).weight.detach(), bits=bits, group_size=32) for name in names}


def names_of(block: int, ends: list[str]) -> list[str]:
    return [f"model.layers.{block}.{end}" for end in ends]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_swap_costs_what_the_changed_model_differs_by(name: str) -> None:
    model, _ = twin(name, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    crops = tokens(5, 40)
    swaps = [swap(model, names_of(block, ends), bits) for block in (0, 2, 3) for ends in ENDS for bits in (2, 4)]
    if not model.config.tie_word_embeddings:
        swaps.append(swap(model, ["lm_head"], 2))
    found = swap_scores(model, crops, swaps, divergence, batch_size=2)
    for tried, cost in zip(swaps, found, strict=True):
        changed = copy.deepcopy(model)
        for key, weight in tried.items():
            changed.get_submodule(key).weight.copy_(weight.dequantize())
        by_hand = float(divergence(model(crops).logits, changed(crops).logits)) / crops.numel()
        assert cost == pytest.approx(by_hand, rel=1e-3, abs=1e-7)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert found == swap_scores(model, crops, swaps, divergence, batch_size=2)


@torch.no_grad()
def test_only_the_tokens_asked_for_are_counted() -> None:
    model, _ = twin("llama", torch.float32)
    crops, where = tokens(5, 24), torch.rand(5, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    tried = swap(model, names_of(2, ENDS[0]), 3)
    changed = copy.deepcopy(model)
    for key, weight in tried.items():
        changed.get_submodule(key).weight.copy_(weight.dequantize())
    by_hand = float(divergence(model(crops).logits[where], changed(crops).logits[where])) / int(where.sum())
    found = swap_scores(model, crops, [tried], divergence, where=where, batch_size=2)
    assert found[0] == pytest.approx(by_hand, rel=1e-3)
    gradients: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    nothing = torch.zeros_like(where)
    for some in (True, False):
        crop_gradients(model, crops, list(tried), lambda at, key, G, some=some: gradients[some].append(G),
                       where=where if some else nothing)
    assert all(float(G.abs().sum()) == 0 for G in gradients[False])
    assert all(float(G.abs().sum()) > 0 for G in gradients[True])


def test_a_stored_type_is_widened_for_the_while() -> None:
    model, _ = twin("llama")
    wide, _ = twin("llama", torch.float32)
    wide.load_state_dict(model.state_dict())
    tried = [swap(model, names_of(1, ENDS[0]), 3)]
    assert swap_scores(model, tokens(2, 16), tried, divergence, compute=torch.float32) == \
        swap_scores(wide, tokens(2, 16), tried, divergence)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_swap_across_blocks_is_refused() -> None:
    model, _ = twin("llama")
    with pytest.raises(LlmopsError, match="expected layers of one decoder block"):
        swap_scores(model, tokens(1, 8), [swap(model, names_of(0, ENDS[1]) + names_of(1, ENDS[1]), 4)], divergence)


@pytest.mark.parametrize("name", ["llama-untied-bias", "gemma2", "qwen3"])
def test_gradients_are_those_of_autograd_crop_by_crop(name: str) -> None:
    model, _ = twin(name, torch.float32)
    crops = tokens(3, 12)
    names = [key for key, layer in model.named_modules() if isinstance(layer, nn.Linear) and key != "lm_head"]
    found: dict[str, list[torch.Tensor]] = {key: [] for key in names}
    crop_gradients(model, crops, names, lambda at, key, G: found[key].append(G), batch_size=2, seed=4)
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    logits = torch.cat([model(batch).logits for batch in crops.split(2)])
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        labels = torch.cat([torch.multinomial(part.softmax(-1).flatten(0, 1), 1, generator=draw).view(len(part), -1)
                            for part in logits.split(2)])
    for crop in range(3):
        loss = nn.functional.cross_entropy(logits[crop], labels[crop], reduction="sum")
        exact = torch.autograd.grad(loss, [model.get_submodule(key).weight for key in names], retain_graph=True)
        for key, G in zip(names, exact, strict=True):
            torch.testing.assert_close(torch.cat(found[key])[crop], G, rtol=1e-3, atol=1e-5)

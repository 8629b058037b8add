"""Fused experts taken apart, put together again, and called what checkpoints call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.twins import COMMON, MIXTURES, tokens, twin
from torch import nn

from llmops.errors import LlmopsError
from llmops.models.arch import linear_layers, routers
from llmops.models.expert_names import expert_of
from llmops.models.experts import Experts, Routing, dense_experts, fuse_experts, split_experts, stored_names


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_split_experts_compute_the_same_bits_and_go_back_exactly(name: str) -> None:
    model, _ = twin(name)
    model.config._experts_implementation = "eager"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(tokens(2, 24)).logits
    paths = split_experts(model)
    assert len(paths) == (1 if name == "qwen2_moe" else 2) and torch.equal(model(tokens(2, 24)).logits, logits)
    inside = [full for full, _ in linear_layers(model) if expert_of(full) is not None]
    assert len(inside) == 12 * len(paths) and f"{paths[-1]}.3.down_proj" in inside
    assert not any(part.endswith("gate_up_proj") for part in model.state_dict())
    for full in inside:  # no longer views of one storage
        layer = model.get_submodule(full)
        layer.weight.data = layer.weight.data.clone()
    after = fuse_experts(model).state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert split_experts(twin("llama")[0]) == []


@pytest.mark.parametrize("name", MIXTURES)
def test_names_are_those_that_transformers_writes(name: str, tmp_path: Path) -> None:
    model, _ = twin(name)
    model.save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        written = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    split_experts(model)
    names = stored_names(model)
    assert set(names.values()) == set(written) and names.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, written[names[key]]), key
    assert stored_names(twin("llama")[0]) == {}


def test_only_the_chosen_experts_count_even_where_all_are_run() -> None:
    model, _ = twin("olmoe", torch.float32)
    path = split_experts(model)[0]
    experts = model.get_submodule(path)
    assert isinstance(experts, Experts)
    x, chosen = torch.randn(5, 128), torch.tensor([[0, 1]] * 5)
    weights = torch.rand(5, 2)
    seen: list[int] = []
    experts[3].down_proj.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    few = experts(x, chosen, weights)
    experts.everything = True
    assert torch.allclose(experts(x, chosen, weights), few, atol=1e-6) and seen == [5]
    expected = sum(weights[:, k, None] * experts[k](x) for k in (0, 1))
    assert torch.allclose(few, expected, atol=1e-6)


def test_other_kinds_of_experts_are_refused_by_name() -> None:
    import transformers as t

    config = t.GptOssConfig(**{**COMMON, "num_hidden_layers": 1}, num_local_experts=2, num_experts_per_tok=1,
                            layer_types=["full_attention"])
    model = t.AutoModelForCausalLM.from_config(config)
    with pytest.raises(LlmopsError, match=r"model\.layers\.0\.mlp\.experts \(GptOssExperts\) holds fused experts with "
                                          r"parameters .*gate_up_proj_bias.*is_transposed True.*expected exactly"):
        split_experts(model)


def test_an_act_that_is_not_what_it_seems_is_found_out() -> None:
    model, _ = twin("mixtral", torch.float32)
    experts = model.model.layers[1].mlp.experts
    experts._apply_gate = lambda both: both.chunk(2, dim=-1)[1]
    with pytest.raises(LlmopsError, match=r"layers\.1\.mlp\.experts .*taken apart, its experts give something else"):
        split_experts(model)


def test_routers_are_found_beside_experts_alone() -> None:
    assert routers(twin("mixtral")[0]) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert routers(twin("qwen2_moe")[0]) == ["model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate"]
    assert routers(twin("llama")[0]) == []


def test_some_dense_among_packed_is_refused() -> None:
    model, _ = twin("olmoe")
    path = split_experts(model)[0]
    every = [full for full, _ in linear_layers(model) if expert_of(full) is not None]
    assert dense_experts(model, every) == {}
    fused = dense_experts(model, [name for name in every if not name.endswith("down_proj")])
    assert [tuple(value.shape) for value in fused.values()] == [(4, 128, 128)] * 2
    with pytest.raises(LlmopsError, match=rf"{path}\.2\.up_proj is left dense and 7 of the same kind are not"):
        dense_experts(model, [name for name in every if name != f"{path}.2.up_proj"])


def test_counts_are_told_in_full_or_by_their_spread() -> None:
    routing = Routing(tokens=10_000)
    for number, count in enumerate((700, 49, 5000, 50)):
        for part in ("gate_proj", "down_proj"):
            assert routing.enough(f"m.experts.{number}.{part}", count) == (count >= 50)
    assert routing.enough("m.self_attn.q_proj", 0) and routing.floor == 50
    assert routing.events("rounded") == [
        "calibration tokens by expert: m.experts 700 49 5000 50",
        "1 of 4 experts saw fewer than 50 calibration tokens and are rounded: m.experts.1. More data or experts: all "
        "reaches them"]
    many = Routing(True, {f"m.{layer}.experts.{number}.up_proj": 100 + number for layer in range(2)
                          for number in range(200)})
    assert many.events("") == ["all calibration tokens sent to all experts: m.0.experts 100 to 299, median 200; "
                               "m.1.experts 100 to 299, median 200"]


def grabbed(model: nn.Module, path: str) -> list[Any]:
    """[(hidden states, chosen experts)] of every call of the experts at `path`."""
    calls: list[Any] = []
    experts = model.get_submodule(path)
    experts.register_forward_pre_hook(lambda _, args: calls.append((args[0].clone(), args[1].clone())))
    return calls

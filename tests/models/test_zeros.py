"""The zeros of a pruned model, place by place: found in every form of a weight, and kept by every call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.runs import chat
from tests.twins import twin

import llmops
from llmops.errors import LlmopsError, StepError
from llmops.methods.quantize import rtn
from llmops.models.quantized import pack
from llmops.models.zeros import keep_masks, linear_weights, lost_zeros, off_pattern, zero_bits

ROWS = [chat(f"Where is {n}?", "here" if n % 2 else "there") for n in range(24)]
SPARSE = {"prune": {"method": "wanda", "sparsity": 0.5, "data": "c", "length": 32}}
STEP = {"data": "c", "max_steps": 2, "learning_rate": 3e-3}


def pruned(name: str = "llama") -> tuple[Any, Any]:
    model, tokenizer = twin(name)
    return llmops.apply(model, tokenizer, SPARSE, ROWS), tokenizer


def test_one_zero_lost_is_found_and_named() -> None:
    model, _ = twin("llama", torch.float32)
    weights = dict(linear_weights(model))
    assert len(weights) == 28 and "lm_head" not in weights
    weights["model.layers.2.mlp.up_proj"][3, 5:8] = 0
    held = zero_bits(model)
    assert list(held) == ["model.layers.2.mlp.up_proj"] and lost_zeros(model, held) == (0, 3, "")
    mask = keep_masks(held, {"model.layers.2.mlp.up_proj": (256, 128)})["model.layers.2.mlp.up_proj"]
    assert (~mask).nonzero().tolist() == [[3, 5], [3, 6], [3, 7]]
    weights["model.layers.2.mlp.up_proj"][3, 6] = 1e-9
    assert lost_zeros(model, held) == (1, 3, "model.layers.2.mlp.up_proj")
    assert lost_zeros(torch.nn.Linear(2, 2), held)[:2] == (3, 3)  # a layer that is gone lost them, too


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_layers_count_by_what_their_codes_stand_for(symmetric: bool) -> None:
    model, _ = pruned()
    held = zero_bits(model)
    weights = {name: rtn(layer.weight, bits=4, group_size=32, symmetric=symmetric) for name, layer in
               model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"}
    assert lost_zeros(pack(model, weights), held)[0] == 0
    layer = model.model.layers[0].mlp.up_proj
    assert zero_bits(model).keys() == held.keys() and hasattr(layer, "packed_tensors")


def test_a_pattern_that_one_group_lacks_is_named() -> None:
    model, tokenizer = twin("llama")
    sparse = llmops.apply(model, tokenizer, {"prune": {"method": "magnitude", "pattern": "2:4"}})
    assert off_pattern(sparse, "2:4", ["lm_head"]) == ""
    with torch.no_grad():
        weight = sparse.model.layers[3].self_attn.k_proj.weight
        weight[0, (weight[0, :4] == 0).nonzero()[0]] = 1
    assert off_pattern(sparse, "2:4", ["lm_head"]) == "model.layers.3.self_attn.k_proj"
    assert off_pattern(sparse, "2:4", ["lm_head", "k_proj"]) == ""


@pytest.mark.parametrize("quantize", [
    {"method": "rtn", "scheme": "w4a16", "group_size": 32, "symmetric": False},
    {"method": "gptq", "scheme": "w3a16", "group_size": 32, "symmetric": False, "data": "c", "length": 32},
    {"method": "hqq", "scheme": "w4a16", "group_size": 32}])
def test_calls_in_a_notebook_keep_the_zeros_of_pruning_through_quantization_and_after(quantize: dict[str, Any]) -> None:
    model, tokenizer = pruned()
    held = zero_bits(model)
    small = llmops.apply(model, tokenizer, {"quantize": quantize}, ROWS)
    assert lost_zeros(small, held)[0] == 0
    tuned = llmops.apply(small, tokenizer, {"finetune": {"method": "full", **STEP}}, ROWS)
    assert lost_zeros(tuned, held)[0] == 0
    more = zero_bits(tuned)
    assert sum(int(bits.numel()) for bits in more.values()) >= sum(int(bits.numel()) for bits in held.values())


def test_a_quantized_model_is_pruned_among_its_codes_and_keeps_that_too() -> None:
    model, tokenizer = twin("llama")
    small = llmops.apply(model, tokenizer, {"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}})
    sparse = llmops.apply(small, tokenizer, SPARSE, ROWS)
    held = zero_bits(sparse)
    share = sum(int((w == 0).sum()) for _, w in linear_weights(sparse)) / sum(w.numel() for _, w in
                                                                              linear_weights(sparse))
    assert 0.5 <= share < 0.56
    tuned = llmops.apply(sparse, tokenizer, {"finetune": {"method": "lora", "rank": 2, **STEP}}, ROWS)
    assert lost_zeros(tuned, held)[0] == 0
    with pytest.raises(LlmopsError, match="would have to round again"):
        llmops.apply(tuned, tokenizer, {"prune": {"method": "width", "hidden": 64, "data": "c", "length": 32}}, ROWS)


def test_a_step_that_fills_zeros_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmops.build import variant
    from llmops.build.job import Job, Work

    def filling(job: Job, options: Any) -> Work:
        with torch.no_grad():
            job.model.model.layers[1].mlp.up_proj.weight.fill_(1.0)
        return Work(job.model, lambda folder: None)

    model, tokenizer = pruned()
    monkeypatch.setitem(variant.STEPS, ("finetune", "full"), filling)
    with pytest.raises(StepError, match=r"filled .* zeros of a pruned model, model.layers.1.mlp.up_proj first"):
        llmops.apply(model, tokenizer, {"finetune": {"method": "full", **STEP}}, ROWS)


def test_experts_of_a_pruned_mixture_keep_their_zeros_through_full_training() -> None:
    model, tokenizer = pruned("olmoe")
    held, before = zero_bits(model), copy.deepcopy(dict(linear_weights(model)))
    assert any(".experts.3.down_proj" in name for name in held)
    tuned = llmops.apply(model, tokenizer, {"finetune": {"method": "full", **STEP}}, ROWS)
    assert lost_zeros(tuned, held)[0] == 0
    after = dict(linear_weights(tuned))
    assert any(not torch.equal(after[name], weight) for name, weight in before.items() if ".experts." in name)


def test_layers_of_a_gpt2_can_go_and_its_masks_are_refused_by_name() -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    _, tokenizer = twin("llama")
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=4, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    short = llmops.apply(copy.deepcopy(model), tokenizer, {"prune": {
        "method": "depth", "layers": 2, "choose": "perplexity", "data": "c", "length": 32}}, ROWS)
    assert short.config.n_layer == 2 and len(short.transformer.h) == 2
    with pytest.raises(LlmopsError, match="GPT2LMHeadModel: their weights are in Conv1D, and only torch"):
        llmops.apply(copy.deepcopy(model), tokenizer, {"prune": {"method": "magnitude"}}, ROWS)

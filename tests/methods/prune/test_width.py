"""Width pruning: the choices against loops, cut models against the dense one with zeroed channels, plain reloads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tests.twins import MIXTURES, NAMES, config_of, tokens, twin

from llmops.build.cutting import cut_to
from llmops.build.shape_search import paths
from llmops.errors import LlmopsError
from llmops.importance import run_influence, width_importance
from llmops.methods.prune.depth import block_influence, in_rounds, least_run
from llmops.methods.prune.width import aggregate, keep_channels, keep_heads, widths_in_rounds
from llmops.models.arch import DIVIDED, decoder_layers
from llmops.models.narrow import Cut, narrow
from llmops.models.widths import Shape, norms_of, parameters_of, resized, shape_of
from llmops.recipe.model import DIVIDED as DIVIDED_FAMILIES


def everything(model: Any) -> Cut:
    shape = shape_of(model)
    _, layers = decoder_layers(model)
    count = len(layers)
    return Cut(shape, torch.arange(shape.hidden), [{"mlp": torch.arange(shape.intermediate)}] * count,
               [list(range(shape.heads))] * count, [list(range(shape.kv_heads))] * count)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# ------------------------------------------------------------------------------------------------------- the choices
def test_importance_over_crops_is_the_norm_of_means_or_their_mean() -> None:
    sizes = [torch.tensor([[3.0, 1.0], [4.0, 1.0]]), torch.tensor([[0.0, 1.0]])]
    assert aggregate(sizes, "l2").tolist() == pytest.approx([5.0, 3**0.5])
    assert aggregate(sizes, "mean").tolist() == pytest.approx([7 / 3, 1.0])


def test_channels_and_heads_that_stay_are_the_most_important_in_their_order() -> None:
    assert keep_channels(torch.tensor([1.0, 5, 5, 0, 9]), 3).tolist() == [1, 2, 4]
    heads = torch.tensor([1.0, 2, 3, 9, 8, 7, 0, 0, 0])  # three groups of three
    assert keep_heads(heads, 3, 2, 1) == ([3, 4], [1])
    assert keep_heads(heads, 3, 4, 2) == ([1, 2, 3, 4], [0, 1])
    with pytest.raises(LlmopsError, match="expected 1 to 3 groups, each with the same number of heads, 1 to 3"):
        keep_heads(heads, 3, 4, 3)
    with pytest.raises(LlmopsError, match="8 channels to keep of 5"):
        keep_channels(torch.ones(5), 8)


def test_rounds_fall_by_the_same_factor_and_end_at_the_target() -> None:
    assert widths_in_rounds(1024, 256, 2, 32) == [512, 256]
    assert widths_in_rounds(256, 256, 3, 32) == [256, 256, 256]
    assert in_rounds(12, 6, 3) == [10, 8, 6] and in_rounds(4, 4, 2) == [4] and in_rounds(6, 5, 3) == [5]


def test_the_run_that_goes_is_the_one_with_the_least_score() -> None:
    assert least_run([3.0, 1.0, 1.0, 2.0], 2) == [0, 1, 4]  # of equals the later one goes, deep layers carry less
    model, _ = twin("llama", torch.float32)
    ids = tokens(3, 24)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    found = run_influence(model, ids, 2, batch_size=2)
    assert found[:2] == pytest.approx([block_influence(states[i], states[i + 2]) for i in range(2)], abs=1e-5)


def test_paths_ascend_and_stay_within_the_model() -> None:
    full = Shape(256, 768, 8, 4, 64)
    for name, shapes in paths(full, ["hidden", "intermediate", "heads"], 32).items():
        costs = [(s.hidden * s.intermediate, s.heads) for s in shapes]
        assert costs == sorted(costs) and full not in shapes, name
        for shape in shapes:
            assert shape.hidden % 32 == shape.intermediate % 32 == 0 and shape.heads == 2 * shape.kv_heads
            assert 32 <= shape.hidden <= 256 and 1 <= shape.kv_heads <= 4


@pytest.mark.parametrize("heads", [(9, 3), (15, 5), (14, 7)])
def test_paths_of_a_model_whose_heads_divide_hidden_hold_only_shapes_that_open(heads: tuple[int, int]) -> None:
    full = Shape(heads[0] * 64, 1536, *heads, 64, divided=True)
    found = paths(full, ["hidden", "intermediate", "heads"], 32)
    assert {"intermediate", "heads", "all"} <= set(found)
    for shapes in found.values():
        for before, shape in zip(shapes, shapes[1:], strict=False):
            assert all(shape.sizes()[letter] >= size for letter, size in before.sizes().items())
        assert all(shape.hidden % shape.heads == shape.hidden % 32 == 0 and shape.hidden <= full.hidden
                   for shape in shapes)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2", "qwen3", "mistral"])
def test_transformers_still_refuses_the_same_configs(name: str) -> None:
    config = copy.deepcopy(twin(name)[0].config)
    assert (config.model_type in DIVIDED) == (config.model_type in DIVIDED_FAMILIES) == shape_of(twin(name)[0]).divided
    config.head_dim, config.hidden_size = 64, config.num_attention_heads * 32 + 1
    try:
        config.validate()
        refused = False
    except StrictDataclassError:
        refused = True
    assert refused == (config.model_type in DIVIDED)


# -------------------------------------------------------------------------------------------------------- importance
def test_importance_matches_what_plain_hooks_see() -> None:
    model, _ = twin("qwen3", torch.float32)
    ids, seen = tokens(5, 24), {}
    layer = model.model.layers[1]
    handles = [layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(channels=args[0])),
               layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))]
    outs = []
    handles += [model.get_submodule(name).register_forward_hook(lambda _, args, out: outs.append(out))
                for name in norms_of(model)]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    found = width_importance(model, ids, "l2", batch_size=2)
    torch.testing.assert_close(found.channels[1]["mlp"], seen["channels"].abs().mean(1).square().sum(0).sqrt())
    by_head = seen["heads"].view(5, 24, 4, 64).norm(dim=-1).mean(1)
    torch.testing.assert_close(found.heads[1], by_head.square().sum(0).sqrt())
    assert len(outs) == 2 * 4 + 1
    torch.testing.assert_close(found.hidden, sum(out.abs().mean(1).square().sum(0).sqrt() for out in outs))
    again = width_importance(model, ids, "l2", batch_size=2)
    assert torch.equal(again.hidden, found.hidden) and torch.equal(again.heads[0], found.heads[0])


# ----------------------------------------------------------------------------------------------------------- cutting
@pytest.mark.parametrize("name", NAMES)
def test_cut_channels_and_heads_are_the_dense_model_with_them_zeroed(name: str) -> None:
    model, _ = twin(name, torch.float32)
    shape, cut, ids = shape_of(model), everything(model), tokens(2, 20)
    per_group = shape.heads // shape.kv_heads
    channels = [torch.arange(i, shape.intermediate, 2) for i in (0, 1, 0, 1)]  # others in each layer
    groups = [[i % shape.kv_heads] for i in range(4)]
    heads = [[each[0] * per_group + j for j in range(per_group)] for each in groups]
    to = resized(shape, intermediate=shape.intermediate // 2, heads=per_group, kv_heads=1)
    found = logits(narrow(model, Cut(to, cut.hidden, [{"mlp": each} for each in channels], heads, groups), {}), ids)
    with torch.no_grad():
        for layer, kept, stay in zip(decoder_layers(model)[1], channels, heads, strict=True):
            gone = torch.ones(shape.intermediate, dtype=torch.bool)
            gone[kept] = False
            layer.mlp.down_proj.weight[:, gone] = 0
            silent = [j for j in range(shape.heads) if j not in stay]
            layer.self_attn.o_proj.weight.view(shape.hidden, shape.heads, -1)[:, silent] = 0
    torch.testing.assert_close(found, logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_cut_features_that_are_zero_everywhere_change_nothing(name: str) -> None:
    """The norms' gains make up for the mean over fewer features, and Gemma's embeddings for sqrt(hidden)."""
    model, _ = twin(name, torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kept = torch.arange(0, 128, 2)
    gone = torch.arange(1, 128, 2)
    model.get_input_embeddings().weight[:, gone] = 0
    for layer in decoder_layers(model)[1]:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight[gone] = 0
            if out.bias is not None:
                out.bias[gone] = 0
    ids, cut = tokens(2, 20), everything(model)
    squares = width_importance(model, ids).squares
    to = resized(cut.shape, hidden=64)
    made = narrow(model, Cut(to, kept, cut.channels, cut.heads, cut.kv_heads), squares)
    assert made.config.hidden_size == 64 and made.config.head_dim == 64
    torch.testing.assert_close(logits(made, ids), logits(model, ids), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_model_is_an_ordinary_model_that_reloads(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = twin(name, torch.float32)
    full, ids = shape_of(model), tokens(4, 20)
    groups = max(1, full.kv_heads // 2)
    to = resized(full, hidden=96, intermediate=128, kv_heads=groups, heads=groups * (full.heads // full.kv_heads))
    made = cut_to(model, to, width_importance(model, ids))
    assert shape_of(made) == to and parameters_of(model, to) == sum(p.numel() for p in made.parameters())
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(made, ids))
    with torch.no_grad():
        by_step = again.generate(ids[:1, :8], max_new_tokens=5, do_sample=False, use_cache=True)
        at_once = again.generate(ids[:1, :8], max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(by_step, at_once)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_nothing_cut_is_the_same_model() -> None:
    model, _ = twin("gemma2", torch.float32)
    ids = tokens(2, 16)
    assert torch.equal(logits(narrow(model, everything(model), {}), ids), logits(model, ids))


def test_what_is_not_known_is_refused_by_name() -> None:
    from transformers import AutoModelForCausalLM, GPTNeoConfig

    with pytest.raises(LlmopsError, match="cannot be cut narrower: .*experts.gate_up_proj.*prune layers instead"):
        shape_of(AutoModelForCausalLM.from_config(config_of(MIXTURES[0])))  # not taken apart
    small = GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
                         bos_token_id=0, eos_token_id=1)
    with pytest.raises(LlmopsError, match="out_proj.weight|says none of"):
        shape_of(AutoModelForCausalLM.from_config(small))

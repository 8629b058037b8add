import copy

import pytest
import torch
from tests.twins import twin

from llmops.build.cutting import cut_to
from llmops.errors import LlmopsError
from llmops.evaluate.exact_match import greedy
from llmops.evaluate.layer_swaps import Part, attribute, parts, swapped
from llmops.evaluate.live import scoring
from llmops.evaluate.token_view import view
from llmops.importance import width_importance
from llmops.models.arch import renumber_layers
from llmops.models.widths import resized, shape_of

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def pair():
    reference, tokenizer = twin("llama", torch.float32)
    variant = copy.deepcopy(reference)
    with torch.no_grad():
        for name in (LAYER, "model.layers.3.self_attn.q_proj"):
            weight = variant.get_submodule(name).weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    prompts = [[7, 8, 9, 10], [20, 30, 40], [5, 6, 7, 8, 9]]
    with scoring(reference):
        answers = greedy(reference, prompts, stops={1}, pad=0, max_new_tokens=6)
    return variant, reference, tokenizer, list(zip(prompts, answers, strict=True))


def test_only_what_differs_is_swapped_and_both_swaps_are_the_variant(pair):
    variant, reference, _, shown = pair
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    whole, found = attribute(variant, reference, shown)
    assert [(each.part.block, each.part.kind) for each in found] == [(1, "down"), (3, "q")]
    assert all(each.kl > 0 for each in found) and whole.kl > 0
    both = Part(tuple(name for each in found for name in each.part.names), None, "both")
    with swapped(reference, variant, both):
        again, _ = attribute(reference, variant, shown)
    assert again.kl == pytest.approx(0, abs=1e-9)  # the parent with all of them is the variant
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())


def test_one_swap_equals_a_model_with_that_one_weight(pair):
    variant, reference, _, shown = pair
    model = copy.deepcopy(reference)
    model.get_submodule(LAYER).weight.data.copy_(variant.get_submodule(LAYER).weight)
    [down, _] = attribute(variant, reference, shown)[1]
    kl, tokens, turned, change = 0.0, 0, 0, 0.0
    with torch.no_grad():
        for prompt, answer in shown:
            ids = torch.tensor([[*prompt, *answer]])
            p, q = (each(ids).logits[0, len(prompt) - 1:-1].double().log_softmax(-1) for each in (reference, model))
            kl += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
            change += float((q - p).gather(-1, torch.tensor(answer)[:, None]).sum())
            tokens += len(answer)
            turned += bool((p.argmax(-1) != q.argmax(-1)).any())
    assert down.kl == pytest.approx(kl / tokens, rel=1e-4) and down.turned == turned
    assert down.delta_logp == pytest.approx(change / tokens, abs=1e-5)


def test_turned_answers_are_those_that_greedy_decoding_changes(pair):
    variant, reference, _, shown = pair
    whole, _ = attribute(variant, reference, shown)
    with scoring(variant):
        now = greedy(variant, [prompt for prompt, _ in shown], stops={1}, pad=0, max_new_tokens=6)
    assert whole.turned == sum(a != b for a, (_, b) in zip(now, shown, strict=True))


def test_norms_that_differ_make_a_block_one_part(pair):
    _, reference, _, shown = pair
    variant = copy.deepcopy(reference)
    with torch.no_grad():
        block = variant.model.layers[2]
        block.input_layernorm.weight.mul_(2)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, name).weight.div_(2)  # folded: the function is the same
    whole, [found] = attribute(variant, reference, shown)
    assert found.part.kind == "whole block" and found.part.block == 2
    assert found.kl == pytest.approx(0, abs=1e-6) and whole.kl == pytest.approx(0, abs=1e-6)


def test_equal_models_have_no_parts_and_other_depths_are_refused(pair):
    _, reference, _, shown = pair
    assert parts(reference, copy.deepcopy(reference)) == []
    short = renumber_layers(copy.deepcopy(reference), [0, 2])
    with pytest.raises(LlmopsError, match="2 and 4 decoder blocks"):
        parts(short, reference)
    with pytest.raises(LlmopsError, match="no answer to look at"):
        attribute(reference, reference, [])


@pytest.mark.parametrize("less", [{"intermediate": 128}, {"heads": 2}])
def test_blocks_of_another_width_are_swapped_whole_and_other_hidden_sizes_are_refused(pair, less):
    _, reference, tokenizer, shown = pair
    crops = torch.arange(5, 69).view(2, 32)
    found = width_importance(copy.deepcopy(reference), crops, "l2")
    variant = cut_to(copy.deepcopy(reference), resized(shape_of(reference), **less), found)
    whole, swaps = attribute(variant, reference, shown, columns=500)
    assert [each.part.kind for each in swaps] == ["whole block"] * 4 and all(each.kl > 0 for each in swaps)
    assert whole.kl > 0 and view(variant, reference, tokenizer, shown)
    narrow = cut_to(copy.deepcopy(reference), resized(shape_of(reference), hidden=96), found)
    with pytest.raises(LlmopsError, match="of hidden size 96 and 128"):
        parts(narrow, reference)


def test_tokens_tell_where_the_answers_part(pair):
    variant, reference, tokenizer, shown = pair
    for (_, answer), tokens in zip(shown, view(variant, reference, tokenizer, shown), strict=True):
        assert [token.says for token in tokens] == [token.token for token in tokens] == [
            tokenizer.decode([i]) for i in answer]  # the reference says its own greedy answer
        assert all(token.kl >= 0 and 0 <= token.q <= 1 for token in tokens)
    same = view(reference, reference, tokenizer, shown)
    assert all(token.kl == 0 and token.p == token.q for tokens in same for token in tokens)

import copy
import math

import numpy as np
import pytest
import torch
from tests.twins import tokens, twin

from llmops.errors import LlmopsError
from llmops.evaluate import live
from llmops.evaluate.statistics import mean_interval
from llmops.evaluate.tokens import compare_tokens

BATCHES = list(tokens(10, 40, seed=5).split(4))


def noisy(model, amount, seed=0):
    variant, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in variant.model.layers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * amount * parameter.abs().mean())
    return variant


def test_a_model_against_itself_is_exactly_itself():
    model, _ = twin("llama")
    found = compare_tokens(model, model, BATCHES)
    assert found["kl_mean"].value == found["kl_p99"].value == found["rms_delta_p"].value == 0
    assert found["same_top"].value == 1 and found["same_top"].ci95 == (1, 1) and found["kl_mean"].ci95 == (0, 0)
    assert {quantity.n for quantity in found.values()} == {10 * 39}


@pytest.mark.parametrize("chunk", [None, 7 * 512])
def test_figures_equal_brute_force(chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(live, "SLICE", chunk)
        monkeypatch.setattr(live, "MAX_LOGITS", 2 * 80 * 512)
    reference, _ = twin("gemma2", torch.float32)
    model = noisy(reference, 0.3)
    kls, same, deltas = [], [], []
    with torch.no_grad():
        for window in torch.cat(BATCHES):
            log_p = reference(window[None]).logits[0, :-1].double().log_softmax(-1)
            log_q = model(window[None]).logits[0, :-1].double().log_softmax(-1)
            kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
            same.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
            places = torch.arange(39), window[1:]
            deltas.append(log_q[places].exp() - log_p[places].exp())
    found = compare_tokens(model, reference, BATCHES)
    kl = torch.cat(kls).numpy()
    assert found["kl_mean"].value == pytest.approx(kl.mean(), rel=1e-5)
    assert found["kl_p99"].value == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found["same_top"].value == pytest.approx(float(torch.cat(same).mean()))
    assert found["rms_delta_p"].value == pytest.approx(math.sqrt(float(torch.cat(deltas).square().mean())), rel=1e-4)
    assert found["kl_mean"].ci95 == pytest.approx(mean_interval([float(window.mean()) for window in kls]), rel=1e-4)
    low, high = found["kl_p99"].ci95
    assert low <= found["kl_p99"].value <= high and low < high


def test_more_noise_is_further_away_and_kl_has_a_direction():
    reference, _ = twin("llama", torch.float32)
    near, far = (compare_tokens(noisy(reference, amount), reference, BATCHES) for amount in (0.05, 0.5))
    assert near["kl_mean"].value < far["kl_mean"].value and near["same_top"].value > far["same_top"].value
    assert near["rms_delta_p"].value < far["rms_delta_p"].value
    back = compare_tokens(reference, noisy(reference, 0.5), BATCHES)
    assert back["kl_mean"].value != pytest.approx(far["kl_mean"].value, rel=1e-3)


def test_the_same_seed_gives_the_same_intervals():
    reference, _ = twin("llama", torch.float32)
    model = noisy(reference, 0.3)
    assert compare_tokens(model, reference, BATCHES) == compare_tokens(model, reference, BATCHES)


def test_one_window_has_no_interval():
    model, _ = twin("llama", torch.float32)
    found = compare_tokens(noisy(model, 0.1), model, [tokens(1, 40)])
    assert all(quantity.ci95 is None and quantity.value is not None for quantity in found.values())


def test_a_ruined_model_has_no_figures():
    reference, _ = twin("llama", torch.float32)
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    found = compare_tokens(model, reference, BATCHES)
    assert all(quantity.value is None and "not finite at 390 of 390" in quantity.method for quantity in found.values())


def test_models_of_different_vocabularies_are_refused():
    model, _ = twin("llama", torch.float32)
    other, _ = twin("llama", torch.float32)
    other.resize_token_embeddings(520)
    with pytest.raises(LlmopsError, match="vocabularies of 512 and 520 tokens"):
        compare_tokens(model, other, BATCHES)


def test_rows_that_pad_a_vocabulary_have_no_part_where_the_tokenizer_is_one():
    reference, words = twin("llama", torch.float32)
    known = [batch % 300 for batch in BATCHES]  # ids that are tokens
    model = noisy(reference, 0.3)
    expected = compare_tokens(_cut(model, words), _cut(reference, words), known)
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(640, mean_resizing=False)
    with torch.no_grad():
        padded.lm_head.weight[512:] += 3.0  # likely, were they counted
    for pair in ((padded, reference), (reference, padded)):
        assert compare_tokens(*pair, known, tokenizer=words)["kl_mean"].value > 0
    found = compare_tokens(padded, reference, known, tokenizer=words)
    assert found["kl_mean"].value == pytest.approx(expected["kl_mean"].value, rel=1e-5)
    assert found["same_top"].value == expected["same_top"].value
    with pytest.raises(LlmopsError, match="the tokenizer knows"):
        compare_tokens(_cut(model, words, 8), reference, known, tokenizer=words)


def _cut(model, words, less=0):
    """A copy with a logit for each token of the tokenizer and none beyond."""
    cut = copy.deepcopy(model)
    cut.resize_token_embeddings(max(words.get_vocab().values()) + 1 - less)
    return cut


@pytest.mark.parametrize("batches", [[], [torch.zeros(3, 1, dtype=torch.long)]])
def test_nothing_to_compare_is_refused(batches):
    model, _ = twin("llama", torch.float32)
    with pytest.raises(LlmopsError, match="no token to compare"):
        compare_tokens(model, model, batches)

"""The divergence that benchmarks/bench_quantize.py scores answers by."""

import copy
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tests.twins import tokens, twin

from llmops.evaluate.options import Perplexity


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    before = set(sys.modules)
    yield import_module("_quantize_models")
    for name in set(sys.modules) - before:
        if name.startswith("_quantize"):
            del sys.modules[name]


def test_it_is_the_mean_kl_of_the_float_model_over_the_first_windows(models):
    model, tokenizer = twin("llama", torch.float32)
    stream = tokens(1, 1000, seed=3)[0].tolist()
    scorer = models.Scorer(tokenizer, stream, Perplexity(data="test", context=96, max_tokens=96 * 8))
    assert "divergence" not in scorer(model)
    beside = scorer.beside(model, tokens=300)  # three whole windows
    assert beside(model)["divergence"] == pytest.approx(0, abs=1e-5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = beside(other)
    wanted = []
    for start in range(0, 3 * 96, 96):
        ids = torch.tensor([stream[start:start + 96]])
        with torch.no_grad():
            exact, rounded = (each(ids).logits[0, :-1].double().log_softmax(-1) for each in (model, other))
        wanted.append(float(torch.nn.functional.kl_div(rounded, exact, log_target=True, reduction="batchmean")))
    assert found["divergences"] == pytest.approx(wanted, rel=1e-2)  # the float model's are kept in float16
    assert found["divergence"] == pytest.approx(sum(wanted) / 3, rel=1e-2) and found["divergence"] > 1e-4
    assert found["perplexity"] != scorer(model)["perplexity"]


def test_pieces_of_a_window_are_kept_apart(models):
    exact = torch.log_softmax(torch.randn(600, 7, generator=torch.Generator().manual_seed(0)), -1)
    other = exact.clone()
    other[512:] = exact[512:].roll(1, -1)
    first, second, last = models._divergences(exact, other)
    assert first == second == 0 and last > 0.1

"""Draws of benchmarks/bench_quantize.py: the same function in other numbers, intervals that know of both chances."""

import copy
import math
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.twins import tokens, twin


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    before = set(sys.modules)
    made = SimpleNamespace(pairs=import_module("_quantize_pairs"), draws=import_module("_quantize_draws"),
                           case=import_module("_quantize_case"))
    yield made
    for name in set(sys.modules) - before:
        if name.startswith("_quantize"):
            del sys.modules[name]


@torch.no_grad()
def test_a_draw_computes_the_same_with_every_weight_elsewhere(bench):
    model, _ = twin("llama", torch.float32)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    ids = tokens(2, 24, seed=1)
    exact = model(ids).logits
    other, third = (bench.draws.permuted(copy.deepcopy(model), draw) for draw in (1, 2))
    torch.testing.assert_close(other(ids).logits, exact, rtol=1e-4, atol=1e-4)
    for name, weight in model.named_parameters():
        moved = other.get_parameter(name)
        assert not torch.equal(moved, weight) and not torch.equal(third.get_parameter(name), moved), name
        torch.testing.assert_close(moved.flatten().sort()[0], weight.flatten().sort()[0])  # the same numbers
    again = bench.draws.permuted(copy.deepcopy(model), 1)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters(), strict=True))
    before = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in bench.draws.permuted(model, 0).state_dict().items())
    assert other.lm_head.weight is other.model.embed_tokens.weight or not model.config.tie_word_embeddings


def test_pairs_are_of_the_same_windows_and_know_their_noise(bench):
    ratio, half = bench.pairs.paired([[1.0, 2.0, 3.0]], [[1.1, 2.1, 3.1]])
    assert ratio == pytest.approx(math.exp(-0.1)) and half == pytest.approx(0, abs=1e-12)  # the windows agree
    ratio, half = bench.pairs.paired([[1.0, 2.0]], [[1.2, 2.0]])
    t = 12.706  # of one degree of freedom
    assert ratio == pytest.approx(math.exp(-0.1)) and half == pytest.approx(math.exp(-0.1) * 0.1 * t, rel=1e-4)
    ratio, half = bench.pairs.paired_divergences([[0.1, 0.3]], [[0.2, 0.2]])
    assert ratio == pytest.approx(1) and half == pytest.approx(0.1 / 0.2 * t, rel=1e-4)
    assert bench.pairs.paired_divergences([[0.1, 0.1]], [[0.2, 0.2]]) == pytest.approx((0.5, 0.0))
    assert bench.pairs.paired([[1.0]], [[1.0]]) == (1.0, math.inf)
    with pytest.raises(ValueError, match=r"\[2\] and \[1\] windows; expected the same"):
        bench.pairs.paired([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match=r"\[1, 1\] and \[1\]"):
        bench.pairs.paired([[1.0], [1.0]], [[1.0]])


def test_draws_that_disagree_widen_the_interval(bench):
    theirs = [[2.0, 3.0, 4.0]] * 3
    agreed = [[1.9, 2.9, 3.9]] * 3
    apart = [[value + shift for value in agreed[0]] for shift in (-0.1, 0.0, 0.1)]  # windows agree in every draw
    assert bench.pairs.paired(agreed, theirs) == pytest.approx((math.exp(-0.1), 0.0))
    ratio, half = bench.pairs.paired(apart, theirs)
    t = 4.3027  # of two degrees of freedom; the mean of 0.1, 0, -0.1 has the standard error 0.1 / sqrt(3)
    assert ratio == pytest.approx(math.exp(-0.1)) and half == pytest.approx(ratio * t * 0.1 / math.sqrt(3), rel=1e-4)


def test_intervals_of_draws_and_windows_cover(bench):
    """Of 400 pairs that differ by nothing but chance, of draws, windows and both, about 95 % hold 1."""
    draw = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        noise = (0.02 * torch.randn(4, 1, generator=draw) + 0.02 * torch.randn(1, 12, generator=draw)
                 + 0.02 * torch.randn(4, 12, generator=draw))
        ratio, half = bench.pairs.paired(noise.tolist(), torch.zeros(4, 12).tolist())
        held += abs(ratio - 1) <= half
    assert 0.92 <= held / 400 <= 0.99


def row(contender, draw, perplexity, bench, **more):
    method, tool, _ = bench.case.CONTENDERS[contender]
    return {"contender": contender, "method": method, "tool": tool, "bits": 4, "group": 128, "perplexity": perplexity,
            "losses": [math.log(perplexity)] * 2, **({"draw": draw} if draw else {}), **more}


def test_verdicts_take_the_draws_that_all_have(bench):
    rows = [row("gptq-llmops", 0, 12.0, bench, exact_match=0.5), row("gptq-llmops", 1, 10.0, bench),
            row("gptq-llmcompressor", 0, 11.0, bench), row("gptq-llmcompressor", 1, 12.0, bench),
            row("gptq-gptqmodel", 0, 11.5, bench), row("gptq-gptqmodel", 1, 11.8, bench),
            row("gptq-gptqmodel", 2, 1.0, bench), row("rtn-llmops", 0, 20.0, bench),
            {**row("rtn-llmcompressor", 0, 9.0, bench), "failed": "no"}]
    lines = {line["method"]: line for line in bench.case.verdicts(rows, 5.0)}
    assert lines["gptq"]["draws"] == 2 and lines["gptq"]["peer_by"] == "gptq-llmcompressor"
    assert lines["gptq"]["ours"] == pytest.approx(math.sqrt(120)) and lines["gptq"]["won"]
    assert lines["best"]["draws"] == 1 and not lines["best"]["won"]  # their rtn is ahead in the one draw that it has
    share = next(line for line in lines.values() if line.get("plain") == "rtn-llmops")
    assert share["share"] == pytest.approx((20 - 12) / 15)
    more = [*rows[:-1], row("factors+gptq-llmops", 0, 11.0, bench)]
    line = next(each for each in bench.case.verdicts(more, 5.0) if each.get("plain") == "rtn-llmops")
    assert line["factors"] == pytest.approx((20 - 11) / 15) and "factors" not in share
    less = {line["method"]: line for line in bench.case.verdicts(rows[:-1], 5.0)}["best"]
    assert less["draws"] == 2 and less["ours_by"] == "gptq-llmops"  # ours, behind GPTQ, takes no draw from it
    shown = bench.case.perplexity_table(rows, {"perplexity": 5.0})
    assert "| gptq | llmops | 10.95 (50.0%) |" in shown
    assert bench.pairs.common([]) == []

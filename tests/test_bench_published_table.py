"""The published table of benchmarks/bench_published_table.py: its loop, its shares and what is said of the order."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tests.twins import tokens, twin

from llmops.evaluate.options import Perplexity
from llmops.evaluate.perplexity import score_stream


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    before = set(sys.modules)
    made = import_module("bench_published_table")
    made._published, made.page = import_module("_published"), import_module("quantize_page")
    yield made
    for name in set(sys.modules) - before:
        if name.startswith(("_quantize", "_published", "bench_", "quantize_page")):
            del sys.modules[name]


def published(bench):
    return {name: dict(zip(bench.COLUMNS, row, strict=True)) for name, row in bench.PUBLISHED.items()}


def test_the_papers_loop_is_what_perplexity_computes(bench):
    model, tokenizer = twin("llama", torch.float32)
    stream = tokens(1, 1000, seed=3)[0].tolist()
    found = score_stream(model, tokenizer, stream, Perplexity(data="test", context=96), id="perplexity")
    assert bench.by_the_papers_loop(model, stream, 96) == pytest.approx(found.value.value, rel=1e-6)


def test_shares_are_of_the_rise_that_rounding_costs(bench):
    rows = published(bench)
    said = bench._published
    assert said.shares(rows["LLaMA-7B"]) == pytest.approx({"4 bit": 0.20 / 0.61, "3 bit": 17.47 / 19.86})
    assert said.order(rows["LLaMA-7B"]) == ["float", "4 bit GPTQ", "4 bit RTN", "3 bit g128 GPTQ", "3 bit GPTQ",
                                            "3 bit RTN"]


def test_another_order_is_told(bench):
    rows = published(bench)
    mine = {name: 2 * value for name, value in rows["LLaMA-13B"].items()}
    same, said = bench.verdict(mine, rows)
    assert same and "that of every published row" in said[0] and "76% to 88%" in said[2] and "back 76%" in said[2]
    same, said = bench.verdict({**mine, "3 bit GPTQ": 100.0}, rows)
    assert not same and "3 bit RTN < 3 bit GPTQ" in said[0] and "LLaMA-65B" in said[0]
    assert "| LLaMA-7B | 5.68 | 6.29 | 6.09 | 25.54 | 8.07 | 6.61 | 33% | 88% |" in bench.table(rows)


def test_the_page_is_what_the_results_say(bench):
    assert bench.page.PAGE.read_text(encoding="utf-8") == bench.page.page(bench.page.RESULTS), (
        "run: python benchmarks/quantize_page.py")


def test_the_page_names_every_cell_that_is_lost(bench):
    verdicts = [{"bits": 3, "group": 32, "method": "gptq", "ours": 11.0, "ours_by": "gptq-llmops", "peer": 10.0,
                 "peer_by": "gptq-gptqmodel", "ratio": 1.1, "half_width": 0.02, "won": False, "divergence_ratio": 0.5,
                 "divergence_ours": 0.1, "divergence_peer": 0.2},
                {"bits": 4, "group": 32, "method": "best", "ours": 9.001, "ours_by": "awq-llmops", "peer": 9.0,
                 "peer_by": "hqq-hqq", "ratio": 1.001, "half_width": 0.02, "won": False},
                {"bits": 4, "group": 32, "method": "hqq", "ours": 9.0, "ours_by": "hqq-llmops", "peer": 9.5,
                 "peer_by": "hqq-hqq", "ratio": 0.95, "half_width": 0.02, "won": True},
                {"bits": 3, "group": 32, "method": "gptq wins back of rtn's rise", "share": 0.57}]
    assert bench.page.lost(verdicts) == [
        "- 3 bits, groups of 32, gptq: 11 (gptq-llmops) against 10 (gptq-gptqmodel), +10.0% +- 2.0%; KL 0.1 against "
        "0.2",
        "- 4 bits, groups of 32, the best of all methods: 9.001 (awq-llmops) against 9 (hqq-hqq), +0.1% +- 2.0%, "
        "level"]

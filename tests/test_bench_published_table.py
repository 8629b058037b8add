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
    yield import_module("bench_published_table")
    for name in set(sys.modules) - before:
        if name.startswith(("_quantize", "bench_")):
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
    assert bench.shares(rows["LLaMA-7B"]) == pytest.approx({"4 bit": 0.20 / 0.61, "3 bit": 17.47 / 19.86})
    assert bench.order(rows["LLaMA-7B"]) == ["float", "4 bit GPTQ", "4 bit RTN", "3 bit g128 GPTQ", "3 bit GPTQ",
                                             "3 bit RTN"]


def test_another_order_is_told(bench):
    rows = published(bench)
    mine = {name: 2 * value for name, value in rows["LLaMA-13B"].items()}
    same, said = bench.verdict(mine, rows)
    assert same and "that of every published row" in said[0] and "76% to 88%" in said[2] and "back 76%" in said[2]
    same, said = bench.verdict({**mine, "3 bit GPTQ": 100.0}, rows)
    assert not same and "3 bit RTN < 3 bit GPTQ" in said[0] and "LLaMA-65B" in said[0]
    assert "| LLaMA-7B | 5.68 | 6.29 | 6.09 | 25.54 | 8.07 | 6.61 | 33% | 88% |" in bench.table(rows)

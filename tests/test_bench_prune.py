"""What benchmarks/bench_prune.py says of the order of pruning methods, and the models with uneven inputs."""

import copy
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tests.twins import tokens, twin
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmops import calibrate
from llmops.data.sources import rows_from
from llmops.formats.source import Source
from llmops.formats.table import FORMATS
from llmops.methods.prune.wanda import wanda_mask


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if name.startswith(("_quantize", "_prune", "_runner")):
            del sys.modules[name]


def losses(rise):
    return [3 + 0.1 * step + rise * (1 + 0.01 * (step % 3)) for step in range(8)]


def row(method, rise, tool="llmops", **more):
    return {"contender": f"{method}-{tool}", "method": method, "tool": tool, "sparsity": 0.5, "pattern": "2:4",
            "perplexity": math.exp(3.35 + rise), "losses": losses(rise), **more}


def test_the_order_says_what_the_paired_differences_show(benchmark):
    order = benchmark("_prune_order")
    rows = [row("magnitude", 1.0), row("wanda", 0.2), row("sparsegpt", 0.18), row("wanda", 0.3, "peer"),
            row("sparsegpt", 0.3, "peer"), row("wanda, owl", 0.1), {**row("wanda", 0.2), "sparsity": 0.7}]
    ours, theirs = order.orders({"losses": losses(0)}, rows)
    assert (ours["tool"], theirs["tool"], ours["of"], ours["pairs"]) == ("llmops", "peer", "text", 8)
    assert ours["rises"]["wanda"][0] == pytest.approx(0.2, rel=0.02)
    assert ours["magnitude_minus_wanda"][0] == pytest.approx(0.8, rel=0.02) and ours["magnitude_minus_wanda"][1] < 0.01
    assert order.relation(ours) == "dense < SparseGPT < Wanda << magnitude"
    assert order.relation(theirs) == "dense < SparseGPT ~ Wanda << magnitude"
    table = order.order_table([ours, theirs])
    assert table.count("\n") == 3 and "50% 2:4" in table and "+0.80" in table
    assert order.sign(1.0, 0.9, (-0.1, 0.01)) == ">" and order.sign(1.0, 0.5, (-0.5, 0.01)) == ">>"


def test_the_order_is_of_the_draws_that_all_three_have(benchmark):
    order = benchmark("_prune_order")
    rows = [row("magnitude", 1.0), row("wanda", 0.2), row("sparsegpt", 0.18), row("wanda", 0.2, "peer"),
            row("sparsegpt", 0.2, "peer"), row("magnitude", 1.2, draw=1), row("wanda", 0.5, draw=1),
            row("sparsegpt", 0.3, draw=1), row("wanda", 0.9, draw=2), row("wanda", 0.9, "peer", draw=2)]
    ours, theirs = order.orders({"losses": losses(0)}, rows)
    assert (ours["draws"], theirs["draws"]) == (2, 1)
    assert ours["rises"]["wanda"][0] == pytest.approx(0.35, rel=0.02)  # draw 2 has no magnitude beside it
    assert ours["wanda_minus_sparsegpt"][1] > 0.5  # 0.02 and 0.2 apart: two draws are no certainty
    assert order.relation(ours) == "dense ~ SparseGPT ~ Wanda << magnitude"
    lone = [each for each in rows if each["method"] != "magnitude" or each.get("draw")]
    assert [found["draws"] for found in order.orders({"losses": losses(0)}, lone)] == [1]


def test_earlier_rows_are_taken_where_they_are_the_same_and_leave_their_times(benchmark):
    draws = benchmark("_prune_draws")
    like = {"model": "given", "calibration": {"crops": 2}, "protocol": {"windows": 8}, "base": {"perplexity": 20.0}}
    rows = [row("wanda", 0.2, "peer", times=[5.0], cpu_times=[4.0], peak_bytes=9), row("wanda", 0.3, code="new"),
            row("wanda", 0.4, "peer", draw=1), {**row("sparsegpt", 0.1, "peer"), "failed": "no"}]
    del rows[3]["perplexity"]
    wanted = [(name, 0.5, "2:4", draw) for name in ("wanda-peer", "wanda-llmops", "sparsegpt-peer")
              for draw in (0, 2)]
    peer, ours = draws.taken([{**like, "rows": rows}], like, wanted, "new")
    assert (peer["times"], peer["stored"], "peak_bytes" in peer) == ([], True, False)
    assert ours["losses"] == losses(0.3) and draws.taken([{**like, "rows": rows[1:2]}], like, wanted, "newer") == []
    for other in ({"model": "text"}, {"calibration": {"crops": 3}}, {"base": {"perplexity": 20.1}}):
        assert draws.taken([{**like, **other, "rows": rows}], like, wanted, "new") == []


def test_ratios_are_of_the_draws_and_turns_that_both_have(benchmark):
    draws, pairs = benchmark("_prune_draws"), benchmark("_quantize_pairs")
    mine, its = pairs.gathered([
        row("wanda", 0.2, times=[1.0, 2.0]), row("wanda", 0.3, draw=1, times=[2.0]),
        row("wanda", 9.0, draw=3, times=[1.0]),
        row("wanda", 0.2, "peer", times=[2.0, 4.0]), row("wanda", 0.5, "peer", draw=1, times=[]),
        row("wanda", 0.1, "peer", draw=2, times=[1.0])], draws.CELL)
    ratio, half = draws.apart(mine, its)
    assert ratio == pytest.approx(math.exp(-0.1), rel=0.01) and half > 0.5
    found = draws.quicker(mine, its, "times")
    assert (found["ratio"], found["n"]) == (pytest.approx(0.5), 2)
    assert draws.every(mine, "times") == [1.0, 2.0, 2.0, 1]
    alone = pairs.gathered([row("wanda", 0.1, "peer", draw=2, times=[1.0])], draws.CELL)[0]
    assert draws.apart(mine, alone) is None and draws.quicker(mine, alone, "times") is None


def test_answers_are_scored_apart_from_their_prompts_and_from_each_other(benchmark):
    order = benchmark("_prune_order")
    model, tokenizer = twin("llama", torch.float32)
    rows = rows_from("asked", [{"prompt": f"who is {'very ' * n}{n}?", "completion": f" number {n} of them" * (n + 1)}
                               for n in range(5)])
    found = order.answer_losses(model, tokenizer, rows, at_once=2)
    encoded = order.encode(rows, tokenizer, max_length=512, limits=order.Limits()).examples
    for loss, example in zip(found, encoded, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
        said = [-float(scores[place - 1, label]) for place, label in enumerate(example["labels"]) if label != -100]
        assert loss == pytest.approx(sum(said) / len(said), rel=1e-4) and len(said) < len(example["labels"])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_outliers_change_what_weights_look_like_and_nothing_that_is_computed(benchmark, family, tmp_path):
    models, order = benchmark("_prune_models"), benchmark("_prune_order")
    model, tokenizer = twin(family, torch.float32)
    models.save(model, tokenizer, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    made = AutoModelForCausalLM.from_pretrained(models.outlier_model(tmp_path / "plain")).eval()
    ids = tokens(4, 24, seed=1)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, made(ids).logits)
    before, after = order.uneven(plain, ids), order.uneven(made, ids)
    for name in ("q_proj", "o_proj", "gate_proj", "down_proj"):
        assert after[name]["largest_over_median"] > 2 * before[name]["largest_over_median"], name
        assert after[name]["kurtosis"] > 2 * before[name]["kurtosis"] >= 2 and after[name]["over_three_medians"] > 0
    assert order.uneven_table(after).count("\n") == 1 + len(after)

    def pruned(of):
        of = copy.deepcopy(of)
        calibrate.walk(of, ids, "x_norm", lambda name, layer, x: layer.weight * wanda_mask(layer.weight, x, 0.5),
                       ignore=["lm_head"])
        return of(ids).logits.detach()

    assert torch.allclose(pruned(plain), pruned(made), atol=1e-5)  # Wanda sees through it
    again = copy.deepcopy(plain)
    models.put_outliers(again, tokens(4, 24, seed=2))
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), made.parameters(), strict=True))


def test_a_model_that_is_given_as_gguf_becomes_a_dense_folder(benchmark, tmp_path):
    pytest.importorskip("gguf")
    models = benchmark("_prune_models")
    model, tokenizer = twin("llama")
    tokenizer.bos_token = tokenizer.pad_token  # without one transformers reads no tokenizer, and takes it for the end
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "source")
    source = Source.of(tmp_path / "source")
    FORMATS["gguf"].write(source, tmp_path)
    folder = models.given_model(tmp_path / "model.gguf", tmp_path / "cache")
    found = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokens(2, 24, seed=1)
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, model.float()(ids).logits, atol=1e-3)
    assert not hasattr(found.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(folder).eos_token == tokenizer.eos_token
    assert models.given_model(tmp_path / "source", tmp_path / "cache").name == "given-source"

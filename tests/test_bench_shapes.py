"""What benchmarks/bench_shapes.py says of pruned models: shares, FLOPs, ratios of medians."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from benchmarks._runner import turns
from tests.twins import twin

from llmops.models.arch import renumber_layers


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    before = set(sys.modules)
    yield import_module("bench_shapes")
    for name in set(sys.modules) - before:
        if name.startswith(("bench_shapes", "_runner")):
            del sys.modules[name]


def test_a_turn_that_was_hit_moves_no_ratio_of_medians():
    calm = [1.0, 1.1, 0.9, 1.05, 0.95, 1.02, 0.98, 1.0, 1.01]
    twice = [2 * each for each in calm]
    assert turns.median_ratio(twice, calm) == {"ratio": 2.0, "ci95": [2.0, 2.0], "n": 9}
    hit = turns.median_ratio([*twice[:-1], 50.0], calm)
    assert hit["ratio"] == pytest.approx(2.0, rel=0.03) and hit["ci95"][0] <= 2.0 <= hit["ci95"][1] < 2.3
    assert turns.median_ratio([*twice[:-1], 50.0], calm) == hit


def test_shares_are_those_of_the_models(shapes):
    model, _ = twin("llama", torch.float32)
    config, prompts = model.config, torch.randint(4, 90, (3, 10), generator=torch.Generator().manual_seed(0))
    linear = sum(each.weight.numel() for name, each in model.named_modules()
                 if isinstance(each, torch.nn.Linear) and "lm_head" not in name)
    head = config.vocab_size * config.hidden_size
    counted = shapes.parameters(model)
    norms = sum(each.numel() for each in model.parameters() if each.dim() == 1)
    assert counted["blocks"] == linear + norms and counted["all"] == sum(each.numel() for each in model.parameters())
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    angles = config.head_dim // 2  # of rotary positions, one product a position and call
    assert shapes.flops(model, prompts, 1) == 2 * (30 * linear + 3 * head + 2 * 3 * 10 * 10 * heads + 10 * angles)
    read = 3 * (11 + 12)  # keys that two decoded tokens of three rows look at
    assert shapes.flops(model, prompts, 3) == 2 * (6 * (linear + head) + 2 * read * heads + 2 * angles)


def test_folders_are_opened_by_plain_transformers_and_timed_in_turns(shapes, tmp_path, monkeypatch, capsys):
    for name, keep in (("whole", None), ("half", [0, 1])):
        model, tokenizer = twin("llama", torch.float32)
        layers = model.config.num_hidden_layers
        (renumber_layers(model, keep) if keep else model).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "result.json").write_text(json.dumps([{"identity": {"variant": "half"}, "quality": {
        "exact_match:test": {"value": {"value": 0.5, "ci95": [0.4, 0.6]}}}}]))
    monkeypatch.setattr(shapes, "WORK", {"prefill": (2, 8, 1), "decode": (1, 4, 3)})
    monkeypatch.setattr(shapes.measured, "__defaults__", (shapes.WORK,))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["bench_shapes.py", "--folders", str(tmp_path / "whole"), str(tmp_path / "half"),
                                      "--turns", "3", "--json", str(out)])
    shapes.main()
    body, said = json.loads(out.read_text()), capsys.readouterr().out
    assert [line["work"] for line in body["lines"]] == ["prefill", "decode"] and body["whole"] == "whole"
    assert body["configs"]["half"]["num_hidden_layers"] == 2 < layers and "--folders PATH PATH" in body["command"]
    for line in body["lines"]:
        assert line["blocks_share"] == pytest.approx(2 / layers, abs=0.01) and 0.5 < line["all_share"] < 1
        assert line["time"]["n"] == 3 and line["time"]["ratio"] == pytest.approx(line["s"] / line["whole_s"])
        assert line["time"]["ratio"] * line["faster"]["ratio"] == pytest.approx(1) and line["cpu"]["ratio"] > 0
    assert "exact_match:test: half 50.0% [40.0, 60.0]" in said and said.count("| half |") == 2

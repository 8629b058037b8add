"""Pruned variants and their children, as a recipe has them: built, stored, read back, checked, told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import TUNED, recipe, workplace
from tests.test_quantizing import job

import llmops
from llmops import calibrate
from llmops.build.variant import apply_step
from llmops.errors import LlmopsError
from llmops.methods.prune.options import Magnitude, Sparsegpt, Wanda
from llmops.models.load import load
from llmops.models.zeros import linear_weights, lost_zeros, off_pattern, zero_bits
from llmops.recipe import parse_recipe
from llmops.recipe.schema import STEPS
from llmops.report.words import what

SEEN = {"data": "calib", "length": 32}
LORA = TUNED["finetune"]
VARIANTS: dict[str, Any] = {
    "gpt": {"prune": {"method": "sparsegpt", "pattern": "2:4", **SEEN}},
    "gpt-lora": {"from": "gpt", "finetune": LORA, "score": False},
    "gpt-w4": {"from": "gpt-lora", "quantize": {"method": "gptq", "scheme": "w4a16", "group_size": 32,
                                                "symmetric": False, **SEEN}},
    "gpt-qat": {"from": "gpt-w4", "finetune": {"method": "full", "data": "train", "max_steps": 2,
                                               "learning_rate": 1e-4}},
    "w4": {"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32, "symmetric": False}, "score": False},
    "w4-sparse": {"from": "w4", "prune": {"method": "wanda", "sparsity": 0.5, **SEEN}},
    "w4-short": {"from": "w4-sparse", "prune": {"method": "depth", "layers": [0, 2]}, "score": False},
    "w4-healed": {"from": "w4-sparse", "finetune": LORA, "score": False},
    "whole": {"prune": {"method": "magnitude", "scope": "global", "sparsity": 0.3}},
    "whole-hqq": {"from": "whole", "quantize": {"method": "hqq", "scheme": "w4a16", "group_size": 32}, "score": False},
    "more": {"from": "whole", "prune": {"method": "wanda", "sparsity": 0.5, **SEEN}, "score": False},
    "owl": {"prune": {"method": "wanda", "sparsity": 0.5, "ratios": "owl", **SEEN}},
    "told": {"prune": {"method": "sparsegpt", "sparsity": 0.5, "ratios": "sensitivity", "reach": 0.1, **SEEN}},
    "narrow": {"prune": {"method": "width", "parameters": "0.7x", "steps": 2,
                         "axes": ["hidden", "intermediate", "heads"], **SEEN}},
    "narrow-w4": {"from": "narrow", "quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32}},
    "student": {"from": "narrow", "distill": {"method": "logits", "teacher": "base", "data": "train", "max_steps": 2}},
    "slim": {"prune": {"method": "width", "hidden": 96, "intermediate": 128, "heads": 2, "kv_heads": 1, **SEEN},
             "score": False},
    "fast": {"prune": {"method": "depth", "latency": 0.9, "choose": "perplexity", "prompt_tokens": 8, "new_tokens": 8,
                       "repeats": 3, **SEEN}, "score": False},
    "run": {"prune": {"method": "depth", "layers": 2, "choose": "block_influence", "contiguous": True, **SEEN},
            "score": False},
    "rounds": {"prune": {"method": "depth", "parameters": 0.7, "choose": "perplexity", "steps": 2, **SEEN},
               "score": False}}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Any]:
    place = workplace(tmp_path_factory.mktemp("place"))
    body = parse_recipe(recipe(VARIANTS), base_dir=place)
    found = llmops.run(body, runs=place / "runs")
    return {row["identity"]["variant"]: row for row in found.rows}, place / "runs", body


def folder(done: tuple[dict[str, Any], Path, Any], name: str) -> Path:
    return done[1] / "r" / name


def events(done: tuple[dict[str, Any], Path, Any], name: str) -> str:
    return " | ".join(json.loads((folder(done, name) / "llmops.json").read_text())["events"])


def checks(done: tuple[dict[str, Any], Path, Any], name: str) -> dict[str, Any]:
    parity = json.loads((folder(done, name) / "llmops.json").read_text())["parity"]
    return {check["name"]: check for check in parity["checks"]}


def test_every_variant_is_what_was_built(done: tuple[dict[str, Any], Path, Any]) -> None:
    for name in VARIANTS:
        assert all(check["ok"] for check in checks(done, name).values()), (name, checks(done, name))
        if VARIANTS[name].get("score", True):
            assert done[0][name]["status"]["state"] == "ok", (name, done[0][name]["status"])


def test_every_pruned_folder_opens_in_plain_transformers(done: tuple[dict[str, Any], Path, Any]) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 25)[None]
    for name in ("gpt", "gpt-lora", "whole", "owl", "told", "narrow", "slim", "fast", "run", "rounds", "student"):
        plain = AutoModelForCausalLM.from_pretrained(folder(done, name))
        ours, _ = load(folder(done, name), dtype="stored", device="cpu")
        with torch.no_grad():
            assert torch.equal(plain(ids).logits, ours(ids).logits), name


def test_zeros_come_through_lora_quantization_and_training_of_the_quantized(done: Any) -> None:
    pruned, _ = load(folder(done, "gpt"), dtype="stored", device="cpu")
    held = zero_bits(pruned)
    assert off_pattern(pruned, "2:4", ["lm_head"]) == "" and len(held) == 28
    for name in ("gpt-lora", "gpt-w4", "gpt-qat"):
        assert "zeros" in checks(done, name)
        child, _ = load(folder(done, name), dtype="stored", device="cpu")
        lost, total, _ = lost_zeros(child, held)
        assert (lost, total) == (0, sum(p.numel() for n, p in pruned.named_parameters() if "_proj" in n) // 2), name
    for parent, child in (("whole", "whole-hqq"), ("whole", "more")):
        before = zero_bits(load(folder(done, parent), dtype="stored", device="cpu")[0])
        assert lost_zeros(load(folder(done, child), dtype="stored", device="cpu")[0], before)[0] == 0
        assert "zeros" in checks(done, child)


def test_codes_of_a_quantized_model_that_is_pruned_are_the_same_or_zero(done: Any) -> None:
    from transformers import AutoModelForCausalLM

    def layers(name: str) -> dict[str, torch.Tensor]:
        return dict(linear_weights(load(folder(done, name), dtype="stored", device="cpu")[0]))

    before, sparse, short, healed = map(layers, ("w4", "w4-sparse", "w4-short", "w4-healed"))
    for name, weight in sparse.items():
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept]) and (~kept).float().mean() >= 0.5
        assert (healed[name][~kept] == 0).all() and not torch.equal(healed[name], weight)
    assert len(short) == 14 and all(
        torch.equal(weight, sparse[name.replace("layers.1.", "layers.2.")]) for name, weight in short.items())
    plain = AutoModelForCausalLM.from_pretrained(folder(done, "w4-short"))
    assert plain.config.num_hidden_layers == 2
    config = json.loads((folder(done, "w4-short") / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"


def test_shares_of_blocks_and_of_the_whole_are_as_asked(done: tuple[dict[str, Any], Path, Any]) -> None:
    for name, share in (("whole", 0.3), ("owl", 0.5), ("told", 0.5), ("more", 0.5)):
        model, _ = load(folder(done, name), dtype="stored", device="cpu")
        by_layer = {n: float((p == 0).float().mean()) for n, p in model.named_parameters() if "_proj" in n}
        zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if "_proj" in n)
        total = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
        assert zeros / total == pytest.approx(share, abs=2e-3), name
        assert (max(by_layer.values()) - min(by_layer.values()) > 0.01) == (name != "more"), name
    assert "sparsity by block (owl)" in events(done, "owl")
    search = json.loads((folder(done, "told") / "llmops.json").read_text())["search"]
    assert len(search["divergence"]) == 4 and set(search["blocks"].values()) <= set(search["grid"])
    assert all(later >= earlier - 1e-3 for row in search["divergence"]
               for earlier, later in zip(row, row[1:], strict=False))


def test_narrow_and_shallow_models_met_their_targets_and_say_by_what(done: tuple[dict[str, Any], Path, Any]) -> None:
    base = done[0]["base"]["size"]["parameters"]["value"]
    narrow = done[0]["narrow"]
    assert 0.6 < narrow["size"]["parameters"]["value"] / base <= 0.7
    assert what(narrow) == "width 0.7x parameters"
    search = json.loads((folder(done, "narrow") / "llmops.json").read_text())["search"]
    candidates = [each for each in search["tried"] if each["candidate"]]
    best = min(candidates, key=lambda each: each["divergence"])
    assert len(candidates) > 1 and search["chosen"] == best["shape"]
    assert all(each["ratio"] <= 0.7 for each in candidates)
    fast = json.loads((folder(done, "fast") / "llmops.json").read_text())
    assert fast["search"]["target"] == "latency" and all(
        each["unit"] == "s" and each["candidate"] > 0 for each in fast["search"]["tried"])
    assert "interleaved turns" in " ".join(fast["events"])
    config = json.loads((folder(done, "slim") / "config.json").read_text())
    assert [config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                                    "head_dim")] == [96, 128, 2, 1, 64]
    assert json.loads((folder(done, "run") / "config.json").read_text())["num_hidden_layers"] == 2
    assert "runs of 2 layers" in events(done, "run") and events(done, "rounds").count("loss without") == 2


def test_zeros_are_said_to_save_nothing_but_bytes_in_every_table(done: tuple[dict[str, Any], Path, Any]) -> None:
    from llmops.report.card import card
    from llmops.report.html import page
    from llmops.report.table import table

    rows = list(done[0].values())
    for name, said in (("owl", "bytes only when compressed on disk, no time"),
                       ("gpt-qat", "time only where a kernel for 2:4 runs it"), ("narrow", None)):
        saves = done[0][name]["transform"]["sparsity_saves"]
        assert (said in saves) if said else saves is None, name
    assert "when compressed on disk" in card(done[0]["owl"], rows) and "save no time" in page(rows, title="r")
    assert "† zeros in dense tensors" in str(table(rows).caption)


def test_a_second_run_does_nothing(done: tuple[dict[str, Any], Path, Any]) -> None:
    again = llmops.plan(done[2], runs=done[1])
    assert all(stage.built for stage in again.stages)


@pytest.mark.parametrize(("method", "name", "turns"), [("wanda", "llama", False), ("sparsegpt", "llama", False),
                                                       ("wanda", "olmoe", False), ("sparsegpt", "olmoe", True)])
def test_layers_of_a_block_are_measured_at_once_where_what_is_measured_fits(
        method: str, name: str, turns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    walk = calibrate.walk

    def noted(*args: Any, sequential: bool, **named: Any) -> None:
        asked.append(sequential)
        walk(*args, sequential=sequential, **named)

    monkeypatch.setattr(calibrate, "walk", noted)
    options = {"wanda": Wanda, "sparsegpt": Sparsegpt}[method].model_validate({"method": method, **SEEN})
    given = job(workplace(tmp_path, name), name)
    apply_step("prune", given, options)
    apply_step("prune", job(tmp_path, name), options.model_copy(update={"sequential": not turns}))
    assert asked == [turns, not turns]


@pytest.mark.parametrize(("step", "said"), [
    ({"method": "depth", "layers": 4}, "keeps all 4 of the parent"),
    ({"method": "depth", "layers": [0, 1, 2, 3]}, "keeps all 4 of the parent"),
    ({"method": "width", "hidden": 128, "heads": 4, **SEEN}, "hidden is 128, heads is 4, what the parent has"),
    ({"method": "magnitude", "sparsity": 1e-7}, "no weight became zero: 0 of"),
    ({"method": "wanda", "sparsity": 1e-4, **SEEN}, "no weight became zero"),
    ({"method": "sparsegpt", "sparsity": 1e-6, **SEEN}, "expected a sparsity above the parent's")])
def test_a_step_that_cuts_nothing_is_refused(step: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = job(workplace(tmp_path))
    with pytest.raises(LlmopsError, match=said):
        apply_step("prune", given, STEPS["prune"][step["method"]].model_validate(step))


def test_zeros_that_are_there_already_are_no_pruning(tmp_path: Path) -> None:
    given = job(workplace(tmp_path))
    options = Magnitude(method="magnitude", sparsity=0.5)
    work = apply_step("prune", given, options)
    with pytest.raises(LlmopsError, match=r"sparsity is 0.4, and no weight became zero: [1-9][\d,]+ of"):
        apply_step("prune", job(tmp_path, model=work.model), options.model_copy(update={"sparsity": 0.4}))
    more = apply_step("prune", job(tmp_path, model=work.model), options.model_copy(update={"sparsity": 0.6}))
    assert more.expected.sparsity == pytest.approx(0.6, abs=1e-4)

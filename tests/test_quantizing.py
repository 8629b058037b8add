"""The steps that quantize, whole: built, stored, read back and held against what was in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import recipe, workplace
from tests.twins import NAMES, tokens, twin
from torch import nn

import llmops
from llmops.build import quantizing
from llmops.build.job import Job, Work, calibration
from llmops.build.variant import apply_step
from llmops.data.options import DataSource
from llmops.data.sources import load_rows
from llmops.errors import DataError, RecipeError, StepError
from llmops.methods.quantize.options import Autoround, Awq, Gptq, Hqq, Rtn, Smoothquant
from llmops.recipe import parse_recipe

CALIBRATED = {"data": "calib", "length": 32, "group_size": 32}
METHODS: dict[str, Any] = {
    "rtn": Rtn(method="rtn", scheme="w3a16", group_size=32, clip="mse"),
    "hqq": Hqq(method="hqq", scheme="w3a16", group_size=32),
    "gptq": Gptq(method="gptq", scheme="w3a16", **CALIBRATED),
    "awq": Awq(method="awq", scheme="w3a16", **CALIBRATED),
    "autoround": Autoround(method="autoround", scheme="w3a16", iterations=8, batch_size=4, **CALIBRATED),
    "smoothquant": Smoothquant(method="smoothquant", scheme="w3a16", **CALIBRATED)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("place"))


def job(place: Path, name: str = "llama", model: Any = None, **more: Any) -> Job:
    made, tokenizer = twin(name)
    model = made if model is None else model
    sources = {"calib": DataSource(source="train.jsonl", samples=8)}
    return Job(model, tokenizer, model.dtype, [], lambda key: load_rows(key, sources, place, 0),
               lambda key: sources[key], 0, **more)


def linears(model: Any) -> dict[str, torch.Tensor]:
    return {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
            and name != "lm_head"}


def take(place: Path, method: str, name: str = "llama", **changes: Any) -> Work:
    return apply_step("quantize", job(place, name), METHODS[method].model_copy(update=changes))


@pytest.mark.parametrize(("method", "name"), [*(("awq", name) for name in NAMES),  # what others do not look at
                                              *((method, "llama-untied-bias") for method in METHODS)])
def test_every_architecture_holds_what_is_packed_and_only_that_changed(place: Path, method: str, name: str) -> None:
    before, _ = twin(name)
    work = take(place, method, name)
    assert work.packed.keys() == linears(before).keys()
    for key, weight in linears(work.model).items():
        assert torch.equal(weight, work.packed[key].dequantize()) and weight.dtype == torch.bfloat16
    old, new = before.state_dict(), work.model.state_dict()
    touched = {key for key, value in new.items() if not torch.equal(value, old[key])}
    allowed = {f"{key}.weight" for key in work.packed}
    if method in ("awq", "smoothquant"):
        allowed |= {key for key in old if "norm" in key or key.endswith("_proj.bias")}
    assert touched <= allowed and new.keys() == old.keys()
    assert not any(layer._forward_pre_hooks for layer in work.model.modules())


def test_each_method_loses_less_than_plain_rounding(place: Path) -> None:
    seen = calibration(job(place), "calib", 32)

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return model(seen).logits.float()

    exact = logits(twin("llama")[0])
    lost = {method: float((logits(take(place, method).model) - exact).square().mean())
            for method in ("rtn", "gptq", "awq", "autoround")}
    plain = float((logits(take(place, "rtn", clip="absmax").model) - exact).square().mean())
    assert max(lost.values()) < plain and lost["gptq"] < 0.6 * plain, (plain, lost)


@pytest.mark.parametrize("method", METHODS)
def test_taking_the_same_step_twice_gives_the_same_codes(place: Path, method: str) -> None:
    first, second = take(place, method), take(place, method)
    for key, weight in first.packed.items():
        assert torch.equal(weight.codes, second.packed[key].codes) and torch.equal(weight.scale,
                                                                                   second.packed[key].scale)


@pytest.mark.parametrize(("method", "name"), [("gptq", "qwen3"), ("awq", "gemma2"), ("awq", "llama-untied-bias"),
                                              ("hqq", "llama"), ("autoround", "qwen2")])
@torch.no_grad()
def test_plain_transformers_reads_what_was_stored_to_the_bit(place: Path, method: str, name: str, tmp_path: Path
                                                             ) -> None:
    from transformers import AutoModelForCausalLM

    work = take(place, method, name)
    work.save(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read(tokens(2, 40)).logits, work.model(tokens(2, 40)).logits)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_of_a_pruned_parent_stay(place: Path, method: str) -> None:
    model, _ = twin("llama")
    generator = torch.Generator().manual_seed(2)
    masks = {key: torch.rand(weight.shape, generator=generator) > 0.5 for key, weight in linears(model).items()}
    for key, weight in linears(model).items():
        weight.data *= masks[key]
    work = apply_step("quantize", job(place, model=model), METHODS[method])
    for key, weight in linears(work.model).items():
        assert torch.all(weight[~masks[key]] == 0), key


def test_awq_without_candidates_and_clip_is_round_to_nearest(place: Path) -> None:
    awq, plain = take(place, "awq", grid=0, clip=False), take(place, "rtn", clip="absmax")
    for key, weight in awq.packed.items():
        assert torch.equal(weight.codes, plain.packed[key].codes)
        assert torch.equal(weight.scale, plain.packed[key].scale)
    assert all(torch.equal(value, plain.model.state_dict()[key]) for key, value in awq.model.state_dict().items())


def test_events_tell_what_happened(place: Path) -> None:
    folded = next(event for event in take(place, "awq").events if event.startswith("factors folded into "))
    assert folded.endswith(" norms and layers of 4 blocks") and 1 <= int(folded.split()[3]) <= 16
    assert any(event.startswith("squared error of each block's output: ") and event.count(" to ") == 4
               for event in take(place, "autoround").events)
    work = take(place, "gptq")
    assert work.events[:2] == ["28 linear layers in 3 bits", "calibrated on 8 crops of 32 tokens"]
    assert work.events[2:] == ["calib has 227 tokens, fewer than the 8 crops of 32 asked for: 8 crops hold all of them"]
    assert work.tokens == 256  # nothing had to be mended


def test_damping_that_was_raised_and_thin_data_are_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmops.methods.quantize.gptq import factorize

    def indefinite(H: torch.Tensor, **options: Any) -> Any:
        return factorize(H - 0.3 * H.diagonal().mean() * torch.eye(len(H)), **options)

    monkeypatch.setattr(quantizing, "factorize", indefinite)
    thin = job(place)
    thin.limits = lambda key: DataSource(source="train.jsonl", samples=1)
    work = apply_step("quantize", thin, METHODS["gptq"])
    told = [event for event in work.events if "not positive definite with damping 0.05; solved with 0.5" in event]
    assert told and told[0].startswith("model.layers.0.self_attn.q_proj: ")
    assert any("32 calibration tokens are fewer than the 256 inputs" in event for event in work.events)


@pytest.mark.parametrize("method", METHODS)
def test_nan_weights_are_named(place: Path, method: str) -> None:
    model, _ = twin("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(StepError, match=r"model\.layers\.2\.mlp\.up_proj: the weight holds NaN"):
        apply_step("quantize", job(place, model=model), METHODS[method])


def test_too_few_tokens_are_refused(place: Path) -> None:
    with pytest.raises(DataError, match="one calibration crop needs 256; use more rows"):
        short = job(place)
        rows = load_rows("calib", {"calib": DataSource(source="train.jsonl", samples=2)}, place, 0)
        short.rows = lambda key: rows
        apply_step("quantize", short, METHODS["gptq"].model_copy(update={"length": 256}))


def test_a_run_stores_reads_back_and_scores_every_method(place: Path, tmp_path: Path) -> None:
    calibrated = {"data": "calib", "length": 32, "group_size": 32}
    variants = {
        "pruned": {"prune": {"method": "wanda", "pattern": "2:4", "data": "calib", "length": 32}, "score": False},
        "rtn": {"quantize": {"method": "rtn", "scheme": "w3a16", "group_size": 32, "clip": "mse"}},
        "hqq": {"quantize": {"method": "hqq", "scheme": "w4a16"}},
        "awq": {"quantize": {"method": "awq", "scheme": "w4a16", **calibrated}},
        "autoround": {"quantize": {"method": "autoround", "scheme": "w2a16", "iterations": 4, **calibrated}},
        "sparse": {"from": "pruned", "quantize": {"method": "gptq", "scheme": "w4a16", **calibrated}}}
    result = llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "runs")
    rows = {row["identity"]["variant"]: row for row in result.rows}
    for name in variants:
        assert rows[name]["status"]["state"] == "ok", (name, rows[name]["status"])
        assert rows[name]["parity"]["ok"], name
    assert rows["hqq"]["transform"]["storage_dtype"] == "int4 g64 asymmetric"
    model, _ = llmops.load(tmp_path / "runs" / "r" / "sparse")
    zeros = [float((layer.dequantized() == 0).float().mean()) for layer in model.modules()
             if type(layer).__name__ == "PackedLinear"]
    assert len(zeros) == 28 and min(zeros) >= 0.5


@pytest.mark.parametrize(("step", "said"), [
    ({"method": "gptq", "scheme": "w4a16"}, 'missing key "data" in quantize gptq'),
    ({"method": "gptq", "scheme": "w4a16", "data": "calibb"}, 'did you mean "calib"'),
    ({"method": "gptq", "scheme": "w4a16", "data": "calib", "group_size": 48}, "given 48, but .* takes 128 inputs"),
    ({"method": "hqq", "scheme": "w4a16", "symmetric": True}, "given true; expected false.*hqq fits the zero point"),
    ({"method": "hqq", "scheme": "w4a16", "group_size": -1}, "given -1; expected at most 128"),
    ({"method": "awq", "scheme": "w4a16", "data": "calib", "clip": "mse"}, "expected true or false"),
    ({"method": "autoround", "scheme": "w4a16", "data": "calib", "iterations": 0}, "at least 1"),
    ({"method": "gtpq", "scheme": "w4a16"}, 'did you mean "gptq"')])
def test_wrong_options_are_told_before_anything_runs(place: Path, step: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(recipe({"q": {"quantize": step}}), base_dir=place)

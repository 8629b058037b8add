"""What precedes the solvers, in whole steps: rotations, SmoothQuant's factors, AWQ's factors before another method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import recipe, workplace
from tests.test_quantizing import METHODS, job, linears, take
from tests.twins import tokens, twin

import llmops
from llmops.build.variant import apply_step
from llmops.errors import LlmopsError, ModelError, RecipeError
from llmops.methods.quantize import rtn
from llmops.recipe import parse_recipe

FINE = {"scheme": "w8a16", "group_size": 32}  # so fine that only a changed function shows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("place"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens(3, 40)).logits.float()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_rotates_and_the_function_stays(place: Path, method: str) -> None:
    exact = logits(twin("llama")[0])
    work = take(place, method, rotate="hadamard", **FINE, **({"iterations": 2} if method == "autoround" else {}))
    loss = (logits(work.model) - exact).square().mean() / exact.square().mean()
    assert loss < 5e-3
    assert bool((work.model.model.norm.weight == 1).all()) and not work.model.config.tie_word_embeddings
    for key, weight in linears(work.model).items():
        assert torch.equal(weight, work.packed[key].dequantize()) and weight.dtype == torch.bfloat16
    assert ("rotated the stream by a randomized Hadamard matrix of order 128 and the values of heads 64 wide"
            in work.events)
    assert any("untied from the embedding" in event for event in work.events)


@pytest.mark.parametrize(("name", "method", "changes"), [
    ("llama-untied-bias", "smoothquant", {}), ("qwen3", "smoothquant", {"alpha": 0.8}), ("gemma2", "smoothquant", {}),
    ("gemma2", "gptq", {"factors": "awq"}), ("llama-untied-bias", "autoround", {"factors": "awq", "iterations": 1}),
    ("mistral", "gptq", {"factors": "awq", "rotate": "hadamard"}), ("gemma3", "awq", {"rotate": ["r2"]})])
def test_factors_leave_the_function_alone(place: Path, name: str, method: str, changes: dict[str, Any]) -> None:
    exact = logits(twin(name)[0])
    work = take(place, method, name, **changes, **FINE)
    # the logits are computed in bfloat16; another function would be as far as they are large
    assert (logits(work.model) - exact).square().mean() < 5e-3 * exact.square().mean()
    counted = [event for event in work.events if event.startswith("factors folded into ")]
    assert len(counted) == 1 and counted[0].endswith(" of 4 blocks")
    if method == "smoothquant":
        assert counted == ["factors folded into 16 norms and layers of 4 blocks"]


def test_rotation_and_factors_help_where_a_few_features_stand_out(place: Path) -> None:
    def outlying() -> Any:
        model, _ = twin("llama")
        for block in model.model.layers:
            for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj, block.mlp.gate_proj,
                          block.mlp.up_proj):
                layer.weight.data[:, [5, 77]] *= 12
        return model

    exact = logits(outlying())

    def lost(method: str, **changes: Any) -> float:
        options = METHODS[method].model_copy(update=changes)
        return float((logits(apply_step("quantize", job(place, model=outlying()), options).model) - exact
                      ).square().mean())

    plain = lost("rtn", clip="absmax")
    assert lost("rtn", clip="absmax", rotate="hadamard") < 0.8 * plain
    assert lost("gptq", length=16, rotate="hadamard") < lost("rtn", rotate="hadamard")
    assert lost("gptq", length=16, factors="awq") < 1.1 * lost("gptq", length=16)


def test_smoothing_spares_activations_in_8_bits(place: Path) -> None:
    def outlying() -> Any:
        model, _ = twin("llama")
        for block in model.model.layers:  # the same function, two inputs of the attention 64 times as large
            block.input_layernorm.weight.data[[5, 77]] *= 64
            for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                layer.weight.data[:, [5, 77]] /= 64
        return model

    exact = logits(outlying())

    def lost(method: str, **changes: Any) -> float:
        options = METHODS[method].model_copy(update={"scheme": "w8a8", "group_size": None, **changes})
        work = apply_step("quantize", job(place, model=outlying()), options)
        assert all(weight.activation_bits == 8 for weight in work.packed.values())
        return float((logits(work.model) - exact).square().mean())

    plain = lost("rtn", clip="absmax")
    assert lost("smoothquant") < 0.3 * plain and lost("rtn", clip="absmax", rotate="hadamard") < 0.3 * plain


def test_a_scale_of_the_whole_weight_is_taken_of_the_rotated_one(place: Path) -> None:
    from llmops.models.rotate import rotate

    wide, _ = twin("llama")
    wide = wide.float()
    rotate(wide, seed=0)
    packed = take(place, "rtn", scheme="nvfp4", group_size=None, clip="absmax", rotate="hadamard").packed
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        keys = [f"model.layers.1.{name}" for name in names]
        reach = max(wide.get_submodule(key).weight.detach().abs().max() for key in keys)
        for key in keys:
            torch.testing.assert_close(packed[key].global_scale[0], 448 * 6 / reach, rtol=1e-3, atol=0)


def test_a_rotation_is_drawn_from_the_recipes_seed(place: Path) -> None:
    first, second = take(place, "rtn", rotate="hadamard"), take(place, "rtn", rotate="hadamard")
    other = job(place)
    other.seed = 5
    third = apply_step("quantize", other, METHODS["rtn"].model_copy(update={"rotate": "hadamard"}))
    for key, weight in first.packed.items():
        assert torch.equal(weight.codes, second.packed[key].codes)
        assert not torch.equal(weight.codes, third.packed[key].codes)


def test_weights_are_rounded_once_after_they_were_rotated(place: Path) -> None:
    """The codes are those of the rotated float32 weights, not of what bfloat16 would keep of them."""
    from llmops.models.rotate import rotate

    wide, _ = twin("llama")
    wide = wide.float()
    rotate(wide, seed=0)
    work = take(place, "rtn", rotate="hadamard")
    options = METHODS["rtn"]
    for key, weight in linears(wide).items():
        found = rtn(weight, bits=3, group_size=32, clip=options.clip, dtype=torch.bfloat16)
        assert float((found.codes != work.packed[key].codes).float().mean()) < 1e-3, key


@pytest.mark.parametrize(("method", "name", "changes"), [
    ("gptq", "qwen3", {"rotate": "hadamard"}), ("rtn", "gemma3", {"rotate": ["r2"]}),
    ("autoround", "llama", {"factors": "awq", "rotate": "hadamard", "iterations": 1}), ("smoothquant", "gemma2", {})])
@torch.no_grad()
def test_plain_transformers_reads_what_was_stored_to_the_bit(place: Path, method: str, name: str,
                                                             changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    work = take(place, method, name, **changes)
    work.save(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    tied = changes.get("rotate") != "hadamard"
    assert read.config.tie_word_embeddings is tied
    assert torch.equal(read(tokens(2, 40)).logits, work.model(tokens(2, 40)).logits)


def test_post_norms_and_zeros_are_refused(place: Path) -> None:
    with pytest.raises(ModelError, match=r"Gemma2DecoderLayer scales.*\(a post-norm\).*write rotate: \[r2\]"):
        take(place, "gptq", "gemma2", rotate="hadamard")
    pruned = job(place)
    pruned.chain = ["prune:wanda"]
    with pytest.raises(LlmopsError, match="r2 on a pruned model would fill its zeros; expected no rotate"):
        apply_step("quantize", pruned, METHODS["rtn"].model_copy(update={"rotate": ["r2"]}))


def test_a_run_stores_reads_back_and_scores(place: Path, tmp_path: Path) -> None:
    calibrated = {"data": "calib", "length": 32, "group_size": 32}
    variants = {
        "rotated": {"quantize": {"method": "gptq", "scheme": "w4a16", "rotate": "hadamard", **calibrated}},
        "smooth": {"quantize": {"method": "smoothquant", "scheme": "w8a16", **calibrated}}}
    result = llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "runs")
    rows = {row["identity"]["variant"]: row for row in result.rows}
    for name in variants:
        assert rows[name]["status"]["state"] == "ok", (name, rows[name]["status"])
        assert rows[name]["parity"]["ok"], name


@pytest.mark.parametrize(("step", "said"), [
    ({"method": "rtn", "scheme": "w4a16", "rotate": "hadamar"}, 'did you mean "hadamard"'),
    ({"method": "rtn", "scheme": "w4a16", "rotate": []}, "an empty list; expected hadamard, or a list of"),
    ({"method": "rtn", "scheme": "w4a16", "rotate": ["r3"]}, 'expected "hadamard" or a list out of r1, r2'),
    ({"method": "gptq", "scheme": "w4a16", "data": "calib", "factors": "hqq"}, 'given "hqq"; expected "awq"'),
    ({"method": "smoothquant", "scheme": "w8a16", "data": "calib", "alpha": 2.0}, "at most 1"),
    ({"method": "smoothquant", "scheme": "w8a16"}, 'missing key "data" in quantize smoothquant'),
    ({"method": "rtn", "scheme": "w4a16", "factors": "awq"}, 'unknown key "factors"')])
def test_wrong_options_are_told_before_anything_runs(place: Path, step: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(recipe({"q": {"quantize": step}}), base_dir=place)


def test_what_cannot_be_rotated_is_told_before_anything_runs(place: Path, tmp_path: Path) -> None:
    rotated = {"quantize": {"method": "rtn", "scheme": "w4a16", "rotate": "hadamard"}}
    pruned = {"prune": {"method": "magnitude", "sparsity": 0.5}}
    with pytest.raises(RecipeError, match='given "hadamard" after "sparse", whose zeros have to stay'):
        parse_recipe(recipe({"sparse": pruned, "q": {"from": "sparse", **rotated}}), base_dir=place)
    other = workplace(tmp_path, "gemma3")
    with pytest.raises(RecipeError, match=r"gemma3_text, whose layers norm what they add.*expected \[r2\]"):
        parse_recipe(recipe({"q": rotated}), base_dir=other)
    rotated["quantize"]["rotate"] = ["r2"]  # type: ignore[assignment]
    parse_recipe(recipe({"q": rotated}), base_dir=other)

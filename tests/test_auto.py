"""Bits chosen layer by layer: within the budget, reproducible, stored so that others read it, told in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import recipe, workplace
from tests.test_quantizing import job
from tests.twins import tokens, twin

import llmops
from llmops.build.job import Work, calibration
from llmops.build.variant import apply_step
from llmops.errors import LlmopsError, RecipeError
from llmops.methods.quantize import rtn
from llmops.methods.quantize.options import Auto, Autoround, Gptq
from llmops.methods.quantize.sensitivity import divergence
from llmops.models.rotate import rotate
from llmops.models.schemes import average_bits, fused_groups
from llmops.recipe import parse_recipe
from llmops.report.bits import allocation_of, heat_map, in_words

PLAIN: dict[str, Any] = {"method": "auto", "data": "calib", "length": 32, "group_size": 32,
                         "candidates": ["w2a16", "w4a16"], "crops": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("place"))


def take(place: Path, name: str = "llama", **options: Any) -> Work:
    return apply_step("quantize", job(place, name), Auto(**{**PLAIN, **options}))


@pytest.mark.parametrize(("solver", "sensitivity", "name"), [
    ("gptq", "kl", "llama"), ("gptq", "gradient", "qwen3"), ("rtn", "gradient", "gemma2"),
    ("awq", "gradient", "llama-untied-bias"), ("autoround", "gradient", "qwen2")])
def test_the_budget_is_kept_and_fused_layers_agree(place: Path, solver: str, sensitivity: str, name: str,
                                                   tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    steps = {"iterations": 4} if solver == "autoround" else {}
    work = take(place, name, solver=solver, sensitivity=sensitivity, bits=3.4, **steps)
    assert 3.3 < average_bits(work.packed) <= 3.4 and len(work.packed) == 28
    assert len({weight.bits for weight in work.packed.values()}) > 1
    for names in fused_groups(work.packed):
        assert len({(work.packed[each].bits, work.packed[each].group_size) for each in names}) == 1
    assert work.allocation["average_bits"] == average_bits(work.packed)
    work.save(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(tokens(2, 40)).logits, work.model(tokens(2, 40)).logits)


def test_the_same_step_twice_gives_the_same_choice_and_codes(place: Path) -> None:
    for sensitivity in ("kl", "gradient"):
        options = {"solver": "rtn", "sensitivity": sensitivity, "candidates": ["w3a16", "w4a16", "w8a16"]}
        first, again = (take(place, bits=4.4, **options) for _ in range(2))
        assert again.allocation == first.allocation
        assert all(torch.equal(weight.codes, again.packed[key].codes) for key, weight in first.packed.items())


def test_with_nothing_to_choose_it_is_the_solver(place: Path) -> None:
    auto = take(place, candidates=["w3a16"], bits=16)
    alone = apply_step("quantize", job(place), Gptq(method="gptq", scheme="w3a16", data="calib", length=32,
                                                    group_size=32))
    assert all(torch.equal(weight.codes, alone.packed[key].codes) for key, weight in auto.packed.items())
    assert auto.events[0] == "28 linear layers in 3 bits"


def test_with_nothing_to_choose_it_is_the_solver_with_its_factors_and_rotation(place: Path) -> None:
    plain = {"scheme": "w3a16", "data": "calib", "length": 32, "group_size": 32, "rotate": ["r2"], "factors": "awq"}
    auto = take(place, candidates=["w3a16"], bits=16, solver="autoround", iterations=3, rotate=["r2"], factors="awq",
                sensitivity="gradient", crops=1)
    alone = apply_step("quantize", job(place), Autoround(method="autoround", iterations=3, **plain))
    assert all(torch.equal(weight.codes, alone.packed[key].codes) for key, weight in auto.packed.items())
    assert any("rotated the values" in event for event in auto.events) and any("folded" in e for e in auto.events)


def test_costs_after_a_rotation_are_those_of_the_rotated_model(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    work = take(place, "llama-untied-bias", bits=3.4, solver="rtn", rotate="hadamard")
    crops = calibration(job(place, "llama-untied-bias"), "calib", 32)[:4]
    model, _ = twin("llama-untied-bias")
    rotate(model.float(), seed=job(place, "llama-untied-bias").seed)
    model = model.bfloat16().float()
    with torch.no_grad():
        exact = model(crops).logits
        first = work.allocation["groups"][0]
        for name in first["layers"]:
            layer = model.get_submodule(name)
            layer.weight.copy_(rtn(layer.weight.bfloat16(), bits=2, group_size=32, clip="mse").dequantize())
        by_hand = float(divergence(exact, model(crops).logits)) / crops.numel()
    assert first["cost"][0] == pytest.approx(by_hand, rel=0.02)  # the copy is rotated in the type it is stored in
    work.save(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(read(tokens(2, 40)).logits, work.model(tokens(2, 40)).logits)


def test_a_tied_head_that_a_rotation_unties_counts_in_a_budget_of_bytes(place: Path) -> None:
    options = {"sensitivity": "gradient", "crops": 1, "solver": "rtn", "candidates": ["w2a16", "w4a16"]}
    with pytest.raises(LlmopsError) as plain:
        take(place, bytes=9_000, **options)
    with pytest.raises(LlmopsError) as turned:
        take(place, bytes=9_000, rotate="hadamard", **options)
    least = [int(str(told.value).split("at least ")[1].split(":")[0].replace(",", "")) for told in (plain, turned)]
    model, _ = twin("llama")
    assert least[1] - least[0] == 2 * model.get_input_embeddings().weight.numel()
    with pytest.raises(RecipeError, match=f"expected at least {least[1]:,}"):
        parse_recipe(recipe({"q": {"quantize": {**PLAIN, "bytes": least[1] - 1, "rotate": "hadamard"}}}),
                     base_dir=place)


def test_costs_are_those_of_a_swap_made_by_hand(place: Path) -> None:
    """The first group in its smallest candidate, solved from the unchanged model, put in, and the model run."""
    work = take(place, bits=3.4, solver="rtn")
    crops = calibration(job(place), "calib", 32)[:4]
    model, _ = twin("llama")
    model = model.float()
    with torch.no_grad():
        exact = model(crops).logits
        first = work.allocation["groups"][0]
        for name in first["layers"]:
            layer = model.get_submodule(name)
            layer.weight.copy_(rtn(layer.weight.bfloat16(), bits=2, group_size=32, clip="mse").dequantize())
        by_hand = float(divergence(exact, model(crops).logits)) / crops.numel()
    assert [name.rsplit(".", 1)[-1] for name in first["layers"]] == ["q_proj", "k_proj", "v_proj"]
    assert first["cost"][0] == pytest.approx(by_hand, rel=1e-3) and first["bits"][0] == 2.5


def test_both_sensitivities_mean_the_same(place: Path) -> None:
    """Divergence and its expansion at 4 bits, where the expansion should hold: the same order of layers, about."""
    options = {"bits": 4.5, "candidates": ["w4a16"], "solver": "rtn", "crops": 8}
    measured, estimated = (torch.tensor([each["cost"][0] for each in take(
        place, sensitivity=sensitivity, **options).allocation["groups"]]) for sensitivity in ("kl", "gradient"))
    both = torch.corrcoef(torch.stack([measured.log(), estimated.log()]))
    assert float(both[0, 1]) > 0.8 and 0.5 < float(estimated.sum() / measured.sum()) < 2


def test_costs_may_be_counted_on_answers_alone(place: Path) -> None:
    options = {"bits": 3.4, "solver": "rtn", "sensitivity": "gradient", "length": 48}
    everywhere, answers = take(place, **options), take(place, **options, judge="calib")
    assert answers.allocation["judge"] == "calib" and everywhere.allocation["judge"] is None
    assert 0 < answers.allocation["counted"] < everywhere.allocation["counted"] == 4 * 48
    assert f"{answers.allocation['counted']} of them answers of calib" in answers.events[1]
    assert [each["cost"] for each in answers.allocation["groups"]] != [each["cost"] for each in
                                                                      everywhere.allocation["groups"]]
    with pytest.raises(RecipeError, match='did you mean "calib"'):
        parse_recipe(recipe({"q": {"quantize": {**PLAIN, "bits": 3, "judge": "calibb"}}}), base_dir=place)


def test_bytes_are_those_on_disk(place: Path, tmp_path: Path) -> None:
    work = take(place, bytes=400_000, candidates=["w2a16", "w4a16", "w8a16"], sensitivity="gradient", solver="rtn")
    work.save(tmp_path)
    with (tmp_path / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    size = (tmp_path / "model.safetensors").stat().st_size - header
    assert 380_000 < size <= 400_000
    with pytest.raises(LlmopsError, match="bytes is 9,000; expected at least ([0-9,]+): 13"):
        take(place, bytes=9_000, solver="rtn", crops=1)
    with pytest.raises(LlmopsError, match="bits is 2; expected at least 2.5, what the smallest"):
        take(place, bits=2, solver="rtn", crops=1)


def test_an_untied_head_may_take_part(place: Path) -> None:
    work = take(place, "mistral", ignore=[], bits=4, sensitivity="kl", crops=2, solver="rtn")
    last = work.allocation["groups"][-1]
    assert last["layers"] == ["lm_head"] and all(cost > 0 for cost in last["cost"])


def test_a_run_tells_of_it_in_row_and_report(place: Path, tmp_path: Path) -> None:
    variants = {"auto": {"quantize": {**PLAIN, "bits": 3.3, "sensitivity": "gradient"}}}
    result = llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "runs")
    row = next(row for row in result.rows if row["identity"]["variant"] == "auto")
    assert row["status"]["state"] == "ok" and row["parity"]["ok"], row["status"]
    assert " in " in row["transform"]["storage_dtype"]
    seen = allocation_of(json.loads(json.dumps(row)))
    assert seen is not None and seen.candidates[0] == "int2 g32 symmetric" and len(seen.groups) == 16
    picture = heat_map(seen)
    assert picture.count("class=\"ring\"") == 16 and picture.count(", chosen</title>") == 16
    assert "block 3 gate, up in int4 g32 symmetric: " in picture and in_words(seen) in picture
    html = (tmp_path / "runs" / "r" / "report.html").read_text()
    assert 'id="bits"' in html and "Dearest at int2 g32 symmetric: block " in html


@pytest.mark.parametrize(("step", "said"), [
    ({}, "given neither bits nor bytes; expected one budget"),
    ({"bits": 4, "bytes": 10**6}, "given both bits and bytes"),
    ({"bits": 2.2}, r"given 2.2; expected at least 2.5, all layers in the smallest candidate: w2a16 with a scale for "
                    "every 32 weights"),
    ({"bits": 3, "group_size": [32, 48]}, "given 48, but .* takes 128 inputs"),
    ({"bits": 3, "group_size": []}, "given an empty list; expected at least one size"),
    ({"bits": 3, "candidates": []}, "given an empty list; expected a list out of w8a16, w4a16, .*, not empty"),
    ({"bits": 3, "candidates": ["w5a16"]}, '"w5a16"'),
    ({"bytes": 100_000}, r"given 100,000; expected at least 3\d\d,\d\d\d: 13\d,\d\d\d that stay in 16 bit"),
    ({"bits": 3, "solver": "awq", "factors": "awq"}, "solver: awq, which folds such factors of itself; expected"),
    ({"bits": 3, "solver": "rtn", "factors": "awq"}, "solver: rtn, which rounds to nearest; expected solver: gptq or"),
    ({"bits": 3, "iterations": 10}, "given 10 with solver: gptq, which has no steps; expected solver: autoround"),
    ({"bits": 3, "rotate": []}, "given an empty list; expected hadamard, or a list of r1 and r2"),
    ({"bits": 3, "solver": "awq", "ignore": []}, ""),
    ({"bits": 3, "data": "calibb"}, 'did you mean "calib"')])
def test_wrong_budgets_are_told_before_anything_runs(place: Path, step: dict[str, Any], said: str) -> None:
    if not said:  # a tied head: the walk says so
        parse_recipe(recipe({"q": {"quantize": {**PLAIN, **step}}}), base_dir=place)
        return
    with pytest.raises(RecipeError, match=said):
        parse_recipe(recipe({"q": {"quantize": {**PLAIN, **step}}}), base_dir=place)


def test_the_smallest_budget_of_a_recipe_is_the_smallest_of_the_step(place: Path) -> None:
    """What validation computes from config.json alone, and what the step counts in the model."""
    with pytest.raises(RecipeError) as told:
        parse_recipe(recipe({"q": {"quantize": {**PLAIN, "bytes": 1}}}), base_dir=place)
    least = int(str(told.value).split("at least ")[1].split(":")[0].replace(",", ""))
    assert take(place, bytes=least, sensitivity="gradient", crops=1, solver="rtn").allocation["average_bits"] == 2.5
    with pytest.raises(LlmopsError, match=f"expected at least {least:,}"):
        take(place, bytes=least - 1, sensitivity="gradient", crops=1, solver="rtn")




def test_another_budget_takes_the_costs_that_were_measured(place: Path, tmp_path: Path) -> None:
    def at(bits: float, **more: Any) -> Work:
        return apply_step("quantize", job(place, memory=tmp_path / "measured" / "a.json"),
                          Auto(**{**PLAIN, "solver": "rtn", "sensitivity": "gradient", "bits": bits, **more}))

    first, second = at(3.0), at(4.0)
    assert "(measured before" not in first.events[1] and "(measured before, for another budget)" in second.events[1]
    assert [each["cost"] for each in second.allocation["groups"]] == [each["cost"] for each in
                                                                     first.allocation["groups"]]
    assert second.allocation["predicted"] < first.allocation["predicted"] and second.tokens == 0 < first.tokens
    assert "(measured before" not in at(4.0, candidates=["w3a16"]).events[1]  # other candidates: another table

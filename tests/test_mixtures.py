"""Mixtures of experts through every step that quantizes or prunes: all experts, none in silence, readable by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.test_experts import grabbed
from tests.runs import recipe, workplace
from tests.test_quantizing import METHODS, job, take
from tests.twins import MIXTURES, tokens, twin
from torch import nn
from transformers import AutoModelForCausalLM

import llmops
from llmops.build.allocating import chosen_alike
from llmops.build.job import Work, calibration
from llmops.build.variant import apply_step
from llmops.errors import LlmopsError
from llmops.formats import check
from llmops.formats.source import Source
from llmops.formats.table import FORMATS
from llmops.methods.prune.options import Magnitude, Wanda
from llmops.methods.quantize import gptq, rtn
from llmops.methods.quantize.options import Auto
from llmops.models.expert_names import expert_of
from llmops.models.experts import split_experts
from llmops.models.parity import sparsity
from llmops.models.quantized import PackedLinear, load_quantized, save_quantized
from llmops.models.schemes import average_bits
from llmops.recipe import parse_recipe
from llmops.report.bits import allocation_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("mixtures"), "olmoe")


def linears(model: nn.Module) -> set[str]:
    split_experts(model)
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)
            and not name.endswith(("lm_head", "shared_expert_gate"))}


CASES = [("gptq", "mixtral"), ("gptq", "qwen2_moe"), ("rtn", "qwen3_moe"), ("awq", "qwen2_moe"), ("awq", "olmoe"),
         ("autoround", "mixtral")]


@pytest.mark.parametrize(("method", "name"), CASES)
@torch.no_grad()
def test_every_expert_is_packed_and_plain_transformers_reads_the_same_bits(place: Path, method: str, name: str,
                                                                           tmp_path: Path) -> None:
    work = take(place, method, name)
    assert work.packed.keys() == linears(twin(name)[0])
    old, new = twin(name)[0].state_dict(), work.model.state_dict()
    chosen = [key for key in old if ".gate." in key or "shared_expert_gate" in key]
    assert chosen and all(torch.equal(old[key], new[key]) for key in chosen)
    work.save(tmp_path)
    logits = work.model(tokens(2, 24)).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(plain(tokens(2, 24)).logits, logits)
    ours = load_quantized(tmp_path, kernel="reference")
    assert torch.equal(ours(tokens(2, 24)).logits, logits)
    assert sum(isinstance(module, PackedLinear) for module in ours.modules()) == len(work.packed)


def exact_counts(place: Path, name: str, path: str) -> tuple[list[int], Any]:
    """Tokens that each expert at `path` of the unchanged model gets, and the model's call of it."""
    model = twin(name)[0].float()
    calls = grabbed(model, path)
    with torch.no_grad():
        model(calibration(job(place, name), "calib", 32))
    x, chosen = calls[0]
    return torch.bincount(chosen.flatten(), minlength=4).tolist(), (model, x, chosen)


def test_an_expert_is_solved_for_the_tokens_that_were_sent_to_it(place: Path) -> None:
    """Block 0 with nothing else quantized: its experts' Hessians are those of the unchanged model's own routing."""
    path = "model.layers.0.mlp.experts"
    counts, (model, x, chosen) = exact_counts(place, "olmoe", path)
    dense = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    options = METHODS["gptq"].model_copy(update={"ignore": dense, "group_size": 32})
    work = apply_step("quantize", job(place, model=twin("olmoe")[0].float()), options)
    event = next(event for event in work.events if event.startswith("calibration tokens by expert"))
    assert f"{path} {' '.join(map(str, counts))};" in event
    for number in range(4):
        weight = model.get_parameter(f"{path}.gate_up_proj")[number, :128].detach()
        mine = x[(chosen == number).any(1)]
        H = mine.t() @ mine * 2 / len(mine)
        expected = (gptq(weight, H, bits=3, group_size=32, clip="mse")[0] if counts[number] >= 16
                    else rtn(weight, bits=3, group_size=32))
        found = work.packed[f"{path}.{number}.gate_proj"]
        differing = float((found.codes != expected.codes).float().mean())
        assert differing < 0.01, number  # sums in another order turn a few roundings
    assert min(counts) < 16 < max(counts)  # both kinds were there


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
def test_a_starved_expert_is_rounded_to_nearest_and_told_unless_all_see_all(place: Path, method: str) -> None:
    work = take(place, method, "olmoe")
    starved = next(event for event in work.events if "saw fewer than 16 calibration tokens" in event)
    name = starved.split("rounded to nearest: ")[1].split(",")[0].split(". ")[0]
    assert expert_of(f"{name}.gate_proj") is not None
    weight = twin("olmoe")[0].model.get_submodule(name.removeprefix("model.").rsplit(".", 1)[0])
    plain = rtn(weight.gate_up_proj[int(name.rsplit(".", 1)[1]), :128], bits=3, group_size=32)
    assert torch.equal(work.packed[f"{name}.gate_proj"].codes, plain.codes)
    everyone = take(place, method, "olmoe", experts="all")
    told = next(event for event in everyone.events if event.startswith("all calibration tokens sent to all experts"))
    assert told.count(" 256") == 8 and not any("fewer than" in event and "experts" in event
                                               for event in everyone.events)
    assert not torch.equal(everyone.packed[f"{name}.gate_proj"].codes, plain.codes)


def test_taking_the_step_twice_gives_the_same_codes(place: Path) -> None:
    first, second = take(place, "gptq", "qwen3_moe"), take(place, "gptq", "qwen3_moe")
    assert all(torch.equal(weight.codes, second.packed[name].codes) for name, weight in first.packed.items())


def test_solving_beats_rounding_on_a_mixture_too(place: Path) -> None:
    seen = calibration(job(place, "mixtral"), "calib", 32)

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(seen).logits.float()

    exact = logits(twin("mixtral")[0])
    lost = {method: float((logits(take(place, method, "mixtral").model) - exact).square().mean())
            for method in ("gptq", "awq", "autoround")}
    plain = float((logits(take(place, "rtn", "mixtral", clip="absmax").model) - exact).square().mean())
    assert max(lost.values()) < plain, (plain, lost)


def test_zero_points_of_experts_are_ours_alone_and_the_row_says_so(place: Path, tmp_path: Path) -> None:
    work = take(place, "hqq", "olmoe")
    assert any("experts with zero points: llmops.load runs them" in event for event in work.events)
    work.save(tmp_path)
    ours = load_quantized(tmp_path, kernel="reference")
    with torch.no_grad():
        assert torch.equal(ours(tokens(2, 24)).logits, work.model(tokens(2, 24)).logits)
    with pytest.raises(RuntimeError):  # the day it does not, the event has to go
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_projections_left_dense_are_read_beside_packed_ones_and_single_experts_cannot(place: Path, tmp_path: Path
                                                                                      ) -> None:
    work = take(place, "rtn", "mixtral", ignore=["lm_head", "down_proj"])
    assert not any(name.endswith("down_proj") for name in work.packed)
    work.save(tmp_path / "a")
    logits = work.model(tokens(2, 24)).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a", experts_implementation="eager")
    assert torch.equal(plain(tokens(2, 24)).logits, logits)
    assert torch.equal(load_quantized(tmp_path / "a", kernel="reference")(tokens(2, 24)).logits, logits)
    one = take(place, "rtn", "mixtral", ignore=["lm_head", "layers.0.mlp.experts.2.down_proj"])
    with pytest.raises(LlmopsError, match=r"experts\.2\.down_proj is left dense and 3 of the same kind are not"):
        one.save(tmp_path / "b")


@torch.no_grad()
def test_experts_may_have_other_bits_than_the_rest_but_all_the_same(place: Path, tmp_path: Path) -> None:
    work = take(place, "rtn", "mixtral")
    weights = {name: rtn(weight.dequantize(), bits=8, group_size=32) if expert_of(name) is None else weight
               for name, weight in work.packed.items()}
    for name, weight in weights.items():
        work.model.get_submodule(name).weight.copy_(weight.dequantize())
    save_quantized(work.model, weights, tmp_path / "a")
    logits = work.model(tokens(2, 24)).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a", experts_implementation="eager")
    assert torch.equal(plain(tokens(2, 24)).logits, logits)
    assert torch.equal(load_quantized(tmp_path / "a", kernel="reference")(tokens(2, 24)).logits, logits)
    weights["model.layers.1.mlp.experts.0.down_proj"] = weights["model.layers.1.self_attn.o_proj"]
    with pytest.raises(LlmopsError, match="expected one scheme for all experts of a model"):
        save_quantized(work.model, weights, tmp_path / "b")


@pytest.mark.parametrize("name", ["dense", "compressed-tensors"])
def test_a_packed_mixture_is_exported_to_what_readers_take(place: Path, name: str, tmp_path: Path) -> None:
    take(place, "rtn", "mixtral").save(tmp_path / "source")
    job(place).tokenizer.save_pretrained(tmp_path / "source")
    source = Source.of(tmp_path / "source")
    (tmp_path / "out").mkdir()
    record = check.held_against(source, tmp_path / "out", name, FORMATS[name].write(source, tmp_path / "out"))
    assert record["kl_mean"]["value"] < 1e-3 and record["exact"]
    with pytest.raises(LlmopsError, match="is a mixture of experts, whose GPTQ layout no reader here could check"):
        FORMATS["gptq"].write(source, tmp_path)


PRUNED: dict[str, Any] = {
    "magnitude": Magnitude(method="magnitude", sparsity=0.5),
    "wanda": Wanda(method="wanda", data="calib", length=32, pattern="2:4", sparsity=0.5)}


def pruned(place: Path, method: str, name: str, **changes: Any) -> Work:
    return apply_step("prune", job(place, name), PRUNED[method].model_copy(update=changes))


@pytest.mark.parametrize(("method", "name"), [("magnitude", "mixtral"), ("wanda", "qwen2_moe"), ("wanda", "olmoe")])
def test_experts_are_pruned_to_the_weight_and_stay_a_model_of_their_family(place: Path, method: str, name: str,
                                                                           tmp_path: Path) -> None:
    work = pruned(place, method, name)
    zeros, total = sparsity(work.model)
    kept = 128 if name == "qwen2_moe" else 0  # the gate before the shared expert
    assert zeros * 2 == total - kept
    fused = work.model.model.layers[1].mlp.experts.gate_up_proj
    if method == "wanda":
        assert bool(((fused.view(4, -1, 32, 4) == 0).sum(-1) == 2).all())
        assert any(event.startswith("calibration tokens by expert: ") for event in work.events)
    work.save(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, read.state_dict()[key]) for key, value in work.model.state_dict().items())


def test_a_run_over_a_mixture_is_built_read_back_and_scored(place: Path, tmp_path: Path) -> None:
    variants = {
        "wanda": {"prune": {"method": "wanda", "pattern": "2:4", "data": "calib", "length": 32}, "score": False},
        "sparse": {"from": "wanda", "quantize": {"method": "gptq", "scheme": "w4a16", "data": "calib", "length": 32,
                                                 "group_size": 32, "experts": "all"}}}
    result = llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "runs")
    rows = {row["identity"]["variant"]: row for row in result.rows}
    for name in ("base", *variants):
        assert rows[name]["status"]["state"] == "ok", (name, rows[name]["status"])
    assert all(rows[name]["parity"]["ok"] for name in variants)
    model, _ = llmops.load(tmp_path / "runs" / "r" / "sparse")
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert len(packed) == 2 * (4 + 12)
    assert min(float((layer.dequantized() == 0).float().mean()) for layer in packed.values()) >= 0.5


def test_mixtures_are_the_twins() -> None:
    assert {name for _, name in CASES} == set(MIXTURES)


@pytest.mark.parametrize(("name", "solver"), [("mixtral", "gptq"), ("qwen2_moe", "awq"), ("qwen3_moe", "autoround")])
def test_auto_gives_all_experts_one_scheme_and_the_rest_their_own(place: Path, name: str, solver: str,
                                                                  tmp_path: Path) -> None:
    more = {"iterations": 3} if solver == "autoround" else {}
    work = apply_step("quantize", job(place, name), Auto(
        method="auto", data="calib", length=32, group_size=32, candidates=["w3a16", "w4a16", "w8a16"], crops=2,
        bits=4.4, solver=solver, **more))
    assert work.packed.keys() == linears(twin(name)[0])
    schemes = {key: (weight.bits, weight.group_size) for key, weight in work.packed.items()}
    experts = {scheme for key, scheme in schemes.items() if expert_of(key) is not None}
    assert len(experts) == 1 and len(set(schemes.values())) > 1 and average_bits(work.packed) <= 4.4
    groups = [each for each in work.allocation["groups"] if expert_of(each["layers"][0]) is not None]
    assert len({each["chosen"] for each in groups}) == 1 and len(groups) == (1 if name == "qwen2_moe" else 2)
    assert all(cost > 0 for each in groups for cost in each["cost"][:1])
    work.save(tmp_path)
    with torch.no_grad():
        logits = work.model(tokens(2, 24)).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
        assert torch.equal(plain(tokens(2, 24)).logits, logits)
        assert torch.equal(load_quantized(tmp_path, kernel="reference")(tokens(2, 24)).logits, logits)
    seen = allocation_of({"identity": {"variant": "q"}, "building": {"allocation": work.allocation}})
    assert seen is not None and {"experts"} < {each.kind for each in seen.groups}


def test_costs_of_experts_are_summed_and_chosen_together() -> None:
    """The best of all choices that give the experts one scheme, by trying every one."""
    draw = torch.Generator().manual_seed(0)
    firsts = ["l.0.q_proj", "l.0.experts.0.gate_proj", "l.1.q_proj", "l.1.experts.0.gate_proj"]
    costs = torch.rand(4, 3, generator=draw).sort(1, descending=True).values.tolist()
    sizes = [[2 * size, 3 * size, 4 * size] for size in (10, 40, 10, 40)]
    for budget in (200, 260, 310, 400):
        found = chosen_alike(costs, sizes, budget, firsts)
        every = [(sum(costs[i][c] for i, c in enumerate(c4)), c4) for c4 in
                 ((a, e, b, e) for a in range(3) for b in range(3) for e in range(3))
                 if sum(sizes[i][c] for i, c in enumerate(c4)) <= budget]
        assert tuple(found) == min(every)[1]

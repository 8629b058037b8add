"""The steps that make number formats, whole: built, stored, read back, scored, exported; recipes that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import recipe, workplace
from tests.twins import tokens, twin
from torch import nn

import llmops
from llmops.build.job import Job, Work
from llmops.build.variant import apply_step
from llmops.data.options import DataSource
from llmops.data.sources import load_rows
from llmops.errors import LlmopsError, RecipeError
from llmops.export import export
from llmops.methods.quantize.options import Autoround, Awq, Gptq, Rtn
from llmops.models.formatted import FormattedLinear
from llmops.models.schemes import fused_groups
from llmops.recipe import parse_recipe

CALIBRATED = {"data": "calib", "length": 32}
STEPS: dict[str, Any] = {"rtn": lambda **more: Rtn(method="rtn", **more),
                         "gptq": lambda **more: Gptq(method="gptq", **CALIBRATED, **more),
                         "awq": lambda **more: Awq(method="awq", grid=2, **CALIBRATED, **more),
                         "autoround": lambda **more: Autoround(method="autoround", iterations=2, **CALIBRATED, **more)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("place"))


def take(place: Path, method: str, name: str = "llama", **options: Any) -> Work:
    model, tokenizer = twin(name)
    sources = {"calib": DataSource(source="train.jsonl", samples=4)}
    job = Job(model, tokenizer, model.dtype, [], lambda key: load_rows(key, sources, place, 0),
              lambda key: sources[key], 0)
    return apply_step("quantize", job, STEPS[method](**options))


@pytest.mark.parametrize(("method", "scheme"), [("gptq", "w8a8"), ("gptq", "fp8"), ("gptq", "mxfp4"), ("awq", "nvfp4"),
                                                ("autoround", "w8a8")])
def test_solvers_make_formats(place: Path, method: str, scheme: str) -> None:
    work = take(place, method, scheme=scheme, **({"scales": "block"} if scheme == "fp8" else {}))
    kinds = {getattr(weight, "format", "w8a8") for weight in work.packed.values()}
    assert kinds == {"fp8-block" if scheme == "fp8" else scheme} and len(work.packed) == 28
    for name, weight in work.packed.items():
        layer = work.model.get_submodule(name)
        assert torch.equal(layer.weight, weight.dequantize().to(torch.bfloat16))
        assert bool(layer._forward_hooks) == (scheme in ("w8a8", "fp8"))
        assert getattr(weight, "activation_bits", 8) == 8
    if scheme == "mxfp4":
        again = take(place, method, scheme=scheme)
        assert all(torch.equal(again.packed[name].dequantize(), weight.dequantize())
                   for name, weight in work.packed.items())


@pytest.mark.parametrize(("method", "scheme"), [("rtn", "nvfp4"), ("rtn", "fp8"), ("gptq", "fp8"), ("awq", "nvfp4")])
def test_layers_that_servers_fuse_share_the_scale_of_the_whole_weight(place: Path, method: str, scheme: str) -> None:
    """Servers run q, k and v as one product under one such scale, and would round again where they differ."""
    work = take(place, method, scheme=scheme, **({"scales": "tensor"} if scheme == "fp8" else {}))
    for names in fused_groups(work.packed):
        shared = {float(w.scale) if w.global_scale is None else float(w.global_scale)
                  for w in (work.packed[name] for name in names)}
        assert len(shared) == 1, names
    assert len({float(w.scale.flatten()[0]) for w in work.packed.values()}) > 1


def test_a_run_stores_reads_back_scores_and_exports_every_format(place: Path, tmp_path: Path) -> None:
    variants = {"w8a8": {"quantize": {"method": "rtn", "scheme": "w8a8"}},
                "fp8": {"quantize": {"method": "rtn", "scheme": "fp8"}, "matrix": {"scales": ["tensor", "block"]}},
                "fp4": {"quantize": {"method": "rtn"}, "matrix": {"scheme": ["mxfp4", "nvfp4"]}}}
    runs = tmp_path / "runs"
    result = llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=runs)
    rows = {row["identity"]["variant"]: row for row in result.rows}
    told = {"w8a8": "int8 row, int8 activations by token", "fp8-tensor": "fp8 tensor, fp8 activations by token",
            "fp8-block": "fp8 128x128, fp8 activations by 128", "fp4-mxfp4": "mxfp4 g32", "fp4-nvfp4": "nvfp4 g16"}
    for name, stored in told.items():
        row = rows[name]
        assert row["status"]["state"] == "ok", (name, row["status"])
        checks = {check["name"]: check for check in row["parity"]["checks"]}
        assert row["parity"]["ok"] and checks["number format"]["detail"].count("28 layers") == 1
        assert row["parity"]["kl_mean"]["value"] < 1e-3  # the model in memory rounds its activations, too
        assert row["transform"]["storage_dtype"] == stored and not row["transform"].get("is_simulated")
        assert row["transform"]["kernel"].split(" ")[0] in ("reference", "torch:int_mm")
        model, _ = llmops.load(runs / "r" / name)
        assert sum(isinstance(module, FormattedLinear) for module in model.modules()) == 28
    sizes = {name: rows[name]["size"]["weights_bytes"]["value"] for name in told}
    assert sizes["fp4-mxfp4"] < sizes["fp4-nvfp4"] < sizes["fp8-tensor"] < sizes["w8a8"] < rows["base"]["size"][
        "weights_bytes"]["value"]
    for name, to in (("w8a8", "dense"), ("fp4-mxfp4", "compressed-tensors"), ("fp8-tensor", "gguf")):
        record = export(name, to, runs=str(runs), out=tmp_path / f"{name}-{to}")
        assert record["kl_mean"]["value"] < 0.01
        rounding = [note for note in record["notes"] if "activations stay as they are" in note]
        assert len(rounding) == (name in ("w8a8", "fp8-tensor") and to != "compressed-tensors")
    for name, to in (("w8a8", "gptq"), ("fp4-mxfp4", "awq")):
        with pytest.raises(LlmopsError, match="layout integers whose activations stay in 16 bit; expected a variant"):
            export(name, to, runs=str(runs), out=tmp_path / "no")


def test_apply_gives_a_model_that_runs_the_format(place: Path) -> None:
    model, tokenizer = twin("llama")
    with torch.no_grad():
        before = model(tokens(1, 16)).logits
    made = llmops.apply(model, tokenizer, {"quantize": {"method": "rtn", "scheme": "w8a8"}}, {})
    with torch.no_grad():
        after = made(tokens(1, 16)).logits
    assert 0 < float((after - before).abs().max()) < float(before.abs().max())
    assert not any(isinstance(module, nn.Linear) and name != "lm_head" for name, module in made.named_modules())


@pytest.mark.parametrize(("step", "said"), [
    ({"method": "rtn", "scheme": "fp8", "group_size": 128},
     r"given 128 with scheme: fp8, which is 8-bit floats .* expected no group_size \(scales: tensor, channel or bl"),
    ({"method": "rtn", "scheme": "mxfp4", "group_size": 32}, "which is 4-bit floats in groups of 32; expected no gr"),
    ({"method": "rtn", "scheme": "w8a8", "symmetric": False}, "given false with scheme: w8a8, which has no zero point"),
    ({"method": "rtn", "scheme": "nvfp4", "scales": "block"}, "given block with scheme: nvfp4, which leaves no choice"),
    ({"method": "rtn", "scheme": "w4a16", "scales": "tensor"}, "expected no `scales`, or scheme: fp8"),
    ({"method": "rtn", "scheme": "fp8", "scales": "row"}, 'given "row"; expected one of'),
    ({"method": "rtn", "scheme": "fp4"}, 'given "fp4"; expected one of'),
    ({"method": "hqq", "scheme": "mxfp4"}, 'given "mxfp4" with method: hqq, which fits zero points'),
    ({"method": "hqq", "scheme": "w8a8"}, 'given "w8a8" with method: hqq, which fits zero points'),
    ({"method": "autoround", "scheme": "fp8", "data": "calib"}, "which learns to round to evenly spaced numbers")])
def test_wrong_options_are_told_before_anything_runs(place: Path, step: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(recipe({"q": {"quantize": step}}), base_dir=place)


@pytest.mark.parametrize(("step", "said"), [
    ({"scheme": "fp8", "scales": "block"}, "given block, which takes inputs by 128, but .* takes 192 inputs.* expected "
                                           "scales: channel, or the layer in `ignore`"),
    ({"scheme": "mxfp4"}, "given mxfp4, which takes inputs by 32, but down_proj takes 200 inputs; expected scheme")])
def test_layers_that_a_format_does_not_fit_are_told_before_anything_runs(
        place: Path, step: dict[str, Any], said: str, tmp_path: Path) -> None:
    place = workplace(tmp_path)
    config = place / "model" / "config.json"
    sizes = {"intermediate_size": 200} if step["scheme"] == "mxfp4" else {"hidden_size": 192}
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    with pytest.raises(RecipeError, match=said):
        parse_recipe(recipe({"q": {"quantize": {"method": "rtn", **step}}}), base_dir=place)
    if step["scheme"] == "mxfp4":
        fits = {"quantize": {"method": "rtn", "ignore": ["lm_head", "down_proj"], **step}}
        assert "q" in parse_recipe(recipe({"q": fits}), base_dir=place).variants

"""Variants whose keys and values are kept in 8 or 4 bits: built, checked, scored as shipped, exported, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import TUNED, recipe, workplace
from tests.twins import config_of, tokens, twin
from transformers import AutoModelForCausalLM

import llmops
from llmops.errors import LlmopsError, RecipeError
from llmops.evaluate.exact_match import greedy
from llmops.evaluate.options import Perplexity
from llmops.evaluate.perplexity import score_stream
from llmops.export import export
from llmops.measure.workload import Runner
from llmops.methods.quantize.options import KV_RECORD
from llmops.models import parity
from llmops.models.kv_cache import QuantizedLayer, attach, attached, detach
from llmops.models.load import load
from llmops.recipe import parse_recipe
from llmops.report.words import what

VARIANTS: dict[str, Any] = {
    "kv8": {"quantize": {"method": "kv_cache", "dtype": "int8"}},
    "kv4": {"quantize": {"method": "kv_cache", "dtype": "int4"}},
    "both": {"quantize": {"method": "rtn", "scheme": "w4a16", "group_size": 32, "kv_cache": "fp8"}}}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder of the run's variants, rows by variant) on sliding windows of 32."""
    place = workplace(tmp_path_factory.mktemp("kv"), "mistral")
    result = llmops.run(parse_recipe(recipe(VARIANTS), base_dir=place), runs=place / "runs")
    return place / "runs" / "r", {row["identity"]["variant"]: row for row in result.rows}


def test_every_variant_is_what_was_asked_for_and_says_so(done: tuple[Path, dict[str, Any]]) -> None:
    folder, rows = done
    for name, dtype, size in (("kv8", "int8", 66), ("kv4", "int4", 36), ("both", "fp8", 66)):
        row = rows[name]
        assert row["status"]["state"] == "ok", row["status"]
        checks = {check["name"]: check for check in row["parity"]["checks"]}
        assert checks["kv cache"]["detail"] == f"{dtype} asked for, {dtype} loaded"
        assert checks["weights"]["ok"] and "as computed" in checks["weights"]["detail"]
        assert row["transform"]["kv_cache"] == dtype and row["transform"]["simulated"] is False
        held = row["size"]["kv_bytes_per_token"]
        assert held["value"] == 2 * 4 * 2 * size and held["provenance"] == "measured"  # layers x heads x a key's bytes
        assert f"keys and values in {dtype}, a scale for every token and head" in json.loads(
            (folder / name / "llmops.json").read_text())["events"]
    assert rows["base"]["transform"]["kv_cache"] is None
    assert rows["base"]["size"]["kv_bytes_per_token"]["value"] == 2 * 4 * 2 * 128
    assert (what(rows["kv8"]), what(rows["both"])) == ("kv_cache int8", "rtn w4a16 g32 kv fp8")
    assert rows["both"]["transform"]["storage_dtype"] == "int4 g32 symmetric"
    assert rows["kv4"]["transform"]["storage_dtype"] == "bfloat16"


def test_scores_are_those_of_rounded_keys_and_values(done: tuple[Path, dict[str, Any]]) -> None:
    folder, rows = done
    model, tokenizer = load(folder / "kv4", device="cpu")
    stream = tokens(1, 256)[0].tolist()
    options = Perplexity(data="prose", context=64)

    def perplexity() -> float | None:
        return score_stream(model, tokenizer, stream, options, id="perplexity:x").value.value

    as_shipped = perplexity()
    detach(model)
    assert as_shipped != perplexity()
    scores = [rows[name]["quality"]["perplexity:prose"]["value"]["value"] for name in ("base", "kv8", "kv4")]
    assert len(set(scores)) == 3
    assert rows["kv8"]["tokens"]["base"]["kl_mean"]["value"] < 0.1 * rows["kv4"]["tokens"]["base"]["kl_mean"]["value"]


@torch.inference_mode()
def test_the_measured_workload_and_the_answers_run_on_codes(done: tuple[Path, dict[str, Any]]) -> None:
    model, _ = load(done[0] / "kv4", dtype="float32", device="cpu")
    runner = Runner(model)
    token, cache = runner.prefill(tokens(1, 8))
    runner.step(token, cache)
    assert all(isinstance(layer, QuantizedLayer) and layer.get_seq_length() == 9 for layer in cache.layers)
    prompts = tokens(3, 12).tolist()
    found = greedy(model, prompts, stops={7}, pad=0, max_new_tokens=6)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        for chosen in answer:
            assert int(model(ids, use_cache=False).logits[0, -1].argmax()) == chosen
            ids = torch.cat([ids, torch.tensor([[chosen]])], 1)


@torch.inference_mode()
def test_others_open_the_folders_as_if_the_record_were_not_there(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    ids = tokens(2, 20)
    for name in VARIANTS:
        assert KV_RECORD in json.loads((folder / name / "config.json").read_text())
        plain = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        ours, _ = load(folder / name, dtype="float32", device="cpu", kernel="reference")
        rounded = ours(ids).logits
        assert torch.allclose(plain(ids).logits, detach(ours)(ids).logits, atol=1e-4)
        assert not torch.allclose(plain(ids).logits, rounded, atol=1e-3)


def test_a_folder_without_its_record_is_broken(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = done
    shutil.copytree(folder / "kv8", tmp_path / "v")
    model, tokenizer = load(tmp_path / "v")
    before = parity.snapshot(model, tokenizer, tokens(2, 20))
    body = json.loads((tmp_path / "v" / "config.json").read_text())
    del body[KV_RECORD]
    (tmp_path / "v" / "config.json").write_text(json.dumps(body))
    found = parity.check(before, load(tmp_path / "v")[0], tokenizer, tmp_path / "v", parity.Expected(kv_cache="int8"))
    wrong = [check["detail"] for check in found["checks"] if not check["ok"]]
    assert not found["ok"] and wrong == ["int8 asked for, 16 bit loaded"]


def test_weights_that_differ_are_found_under_the_rounding() -> None:
    model, tokenizer = twin("llama", torch.float32)
    before = parity.snapshot(attach(model, "int4"), tokenizer, tokens(2, 20))
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.neg_()
    checks = {check["name"]: check["ok"] for check in
              parity.check(before, model, tokenizer, Path(), parity.Expected(kv_cache="int4"))["checks"]}
    assert not checks["weights"] and checks["kv cache"] and attached(model) == "int4"


def test_an_export_is_the_weights_and_says_that_the_cache_is_not_part_of_it(done: tuple[Path, dict[str, Any]],
                                                                            tmp_path: Path) -> None:
    folder, _ = done
    record = export(str(folder / "kv4"), "dense", out=tmp_path / "dense")
    assert record["max_logit_difference"]["value"] < 1e-4
    assert record["notes"] == ["keys and values in int4 are not part of the format: set the like of it where it is "
                               "served"]
    assert attached(load(tmp_path / "dense")[0]) == "int4"  # a folder of transformers, so the record came along


def test_in_a_notebook() -> None:
    model, tokenizer = twin("qwen3")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = llmops.apply(model, tokenizer, {"quantize": {"method": "kv_cache", "dtype": "int4"}})
    assert attached(found) == "int4"
    assert all(torch.equal(value, before[key]) for key, value in found.state_dict().items())
    with pytest.raises(LlmopsError, match="keeps its keys and values in int4, .* set kv_cache: int4 in the last step"):
        llmops.apply(found, tokenizer, {"quantize": {"method": "rtn", "scheme": "w4a16"}})
    packed = llmops.apply(detach(found), tokenizer, {"quantize": {"method": "rtn", "scheme": "w4a16",
                                                                   "kv_cache": "int8"}})
    assert attached(packed) == "int8" and any(type(layer).__name__ == "PackedLinear" for layer in packed.modules())


KV8 = VARIANTS["kv8"]


@pytest.mark.parametrize(("variants", "said"), [
    ({"q": {"quantize": {"method": "kv_cache"}}}, 'missing key "dtype" in quantize kv_cache'),
    ({"q": {"quantize": {"method": "kv_cache", "dtype": "int3"}}}, "int3.*expected"),
    ({"q": {"quantize": {"method": "rtn", "scheme": "w4a16", "kv_cache": "fp4"}}}, 'fp4.*did you mean "fp8"'),
    ({"q": KV8, "t": {"from": "q", **TUNED}}, 'given "q", whose keys and values are kept in int8, .* expected "base", '
                                              "whose weights are the same, and this step before that one"),
    ({"q": KV8, "w": {"from": "q", "quantize": {"method": "rtn", "scheme": "w4a16"}}}, "and kv_cache: int8 here")])
def test_wrong_options_are_told_before_anything_runs(variants: dict[str, Any], said: str, tmp_path: Path) -> None:
    place = workplace(tmp_path)
    with pytest.raises(RecipeError, match=said):
        parse_recipe(recipe(variants), base_dir=place)


@pytest.mark.parametrize(("changes", "dtype", "said"), [
    ({"head_dim": 33}, "int4", "given int4, but a head has 33 numbers, .* or int8 or fp8"),
    ({"layer_types": ["full_attention", "linear_attention"]}, "int8",
     "layers of this llama model keep linear_attention; expected layers that keep keys and values of their own"),
    ({"num_kv_shared_layers": 2}, "fp8", "keep borrowed keys"),
    ({KV_RECORD: {"dtype": "int8"}}, "int8", "quantized already .quantization_config or llmops_kv_cache")])
def test_models_that_cannot_are_told_before_anything_runs(changes: dict[str, Any], dtype: str, said: str,
                                                          tmp_path: Path) -> None:
    body = {**config_of("llama").to_dict(), **changes}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(body))
    plain = {"version": 1, "name": "r", "model": "model"}
    with pytest.raises(RecipeError, match=said):
        parse_recipe({**plain, "variants": {"q": {"quantize": {"method": "kv_cache", "dtype": dtype}}}},
                     base_dir=tmp_path)
    if dtype == "int4":
        parse_recipe({**plain, "variants": {"q": {"quantize": {"method": "kv_cache", "dtype": "int8"}}}},
                     base_dir=tmp_path)

"""Keys and values in few bits beside bitsandbytes' weights: both are in the folder, and both run once it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import recipe, workplace
from tests.test_quantizing import job
from tests.twins import tokens
from transformers import AutoModelForCausalLM

import llmops
from llmops.build.variant import apply_step
from llmops.methods.finetune.peft_library import hush_bitsandbytes
from llmops.methods.quantize.options import KV_RECORD, Rtn
from llmops.models.kv_cache import QuantizedLayer, attached, detach
from llmops.models.load import load
from llmops.recipe import parse_recipe

hush_bitsandbytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("kv-bnb"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(2, 24)).logits.float()


@pytest.mark.parametrize(("name", "scheme", "dtype"), [("llama", "nf4", "int8"), ("qwen3", "nf4", "int4"),
                                                       ("llama", "llm_int8", "fp8")])
def test_both_are_in_the_folder_and_both_run(place: Path, name: str, scheme: str, dtype: str, tmp_path: Path) -> None:
    work = apply_step("quantize", job(place, name), Rtn(method="rtn", scheme=scheme, kv_cache=dtype))
    again = apply_step("quantize", job(place, name), Rtn(method="rtn", scheme=scheme, kv_cache=dtype))
    assert torch.equal(logits(work.model), logits(again.model)) and attached(work.model) == dtype
    work.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[KV_RECORD]["dtype"] == dtype and config["quantization_config"]["quant_method"] == "bitsandbytes"
    job(place, name).tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path, dtype="stored", device="cpu")
    assert attached(model) == dtype
    assert torch.allclose(logits(model), logits(work.model), atol=1e-3)
    rounded = logits(model)
    detach(model)
    exact = logits(model)
    assert 0 < (rounded - exact).norm() < 0.3 * exact.norm()  # keys and values were rounded, and a little
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # with its usual cache: the key in config.json is ignored
    assert attached(plain) is None and (logits(plain) - exact).abs().max() < (0.3 if scheme == "nf4" else 1e-3)


@pytest.mark.parametrize("scheme", ["nf4", "llm_int8"])
def test_a_step_on_the_cache_is_the_whole_text_scored_at_once(place: Path, scheme: str) -> None:
    work = apply_step("quantize", job(place), Rtn(method="rtn", scheme=scheme, threshold=0 if scheme != "nf4" else None,
                                                  kv_cache="int8"))
    ids, model = tokens(1, 20), work.model
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1].float()
        first = model(ids[:, :19], use_cache=True)
        assert all(isinstance(layer, QuantizedLayer) for layer in first.past_key_values.layers)
        last = model(ids[:, 19:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1].float()
    assert (last - whole).abs().max() < 0.05 * whole.abs().max()


def test_a_run_scores_such_a_variant_as_it_is_shipped(place: Path, tmp_path: Path) -> None:
    variants = {"q": {"quantize": {"method": "rtn", "scheme": "nf4", "kv_cache": "int8"}}}
    result = llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "runs")
    row = next(row for row in result.rows if row["identity"]["variant"] == "q")
    assert row["status"]["state"] == "ok" and row["parity"]["ok"], row["status"]
    assert row["transform"]["kv_cache"] == "int8" and row["transform"]["storage_dtype"] == "nf4 g64"
    checks = {check["name"]: check for check in row["parity"]["checks"]}
    assert checks["kv cache"]["detail"] == "int8 asked for, int8 loaded"

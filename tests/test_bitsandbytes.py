"""NF4 and LLM.int8 as variants: the codes of transformers, read by it unchanged, held in few bits, told in the row."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.models.test_nf4 import nf4_by_hand
from tests.runs import recipe, workplace
from tests.test_quantizing import job
from tests.twins import COMMON, tokens, twin
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmops
from llmops.build.job import Work
from llmops.build.variant import apply_step
from llmops.errors import RecipeError, StepError
from llmops.measure.memory import weights_bytes
from llmops.methods.finetune.peft_library import hush_bitsandbytes
from llmops.methods.quantize.options import Rtn
from llmops.models.load import load
from llmops.models.parity import count_parameters
from llmops.recipe import parse_recipe

hush_bitsandbytes()
SCHEMES: dict[str, dict[str, Any]] = {"nf4": {"scheme": "nf4"}, "nf4-double": {"scheme": "nf4", "double_quant": True},
                                      "int8": {"scheme": "llm_int8"}, "int8-0": {"scheme": "llm_int8", "threshold": 0}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("bnb"))


def taken(place: Path, name: str, scheme: str, model: Any = None, **changes: Any) -> Work:
    return apply_step("quantize", job(place, name, model), Rtn(method="rtn", **SCHEMES[scheme], **changes))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(2, 24)).logits.float()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict


@pytest.mark.parametrize(("name", "scheme"), [("llama", "nf4"), ("qwen2", "nf4-double"), ("llama-untied-bias", "int8"),
                                              ("gemma2", "int8-0")])
def test_the_folder_is_the_one_that_transformers_writes_of_the_same_weights(place: Path, name: str, scheme: str,
                                                                            tmp_path: Path) -> None:
    work = taken(place, name, scheme)
    work.save(tmp_path / "ours")
    twin(name)[0].save_pretrained(tmp_path / "dense")
    options = SCHEMES[scheme]
    config = (BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=float(options.get("threshold", 6)))
              if options["scheme"] == "llm_int8" else
              BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
                                 bnb_4bit_use_double_quant=options.get("double_quant", False)))
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config
                                         ).save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor) and ours[key].dtype == tensor.dtype, key
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(plain.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    exact = logits(work.model)
    distance = float((logits(plain).log_softmax(-1) - exact.log_softmax(-1)).abs().max())
    assert distance < (0.3 if "nf4" in scheme else 1e-6)  # a CPU with AVX512-BF16 multiplies 4 bits in its own way


@pytest.mark.parametrize(("name", "scheme"), [("qwen3", "nf4"), ("mistral", "nf4-double"), ("llama", "int8")])
def test_it_comes_back_in_few_bits_and_computes_the_same(place: Path, name: str, scheme: str, tmp_path: Path) -> None:
    dense = twin(name)[0]
    work = taken(place, name, scheme)
    work.save(tmp_path)
    job(place).tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path, dtype="stored", device="cpu")
    assert torch.equal(logits(model), logits(work.model))
    wide, _ = load(tmp_path, dtype="float32", device="cpu")
    assert wide.dtype == torch.float32 and float((logits(wide) - logits(model)).abs().max()) < 0.3
    assert count_parameters(model) == count_parameters(dense)
    linear = sum(module.weight.numel() for key, module in dense.named_modules() if isinstance(module, nn.Linear)
                 and key != "lm_head")
    rest = weights_bytes(dense).value - 2 * linear
    per_weight = {"nf4": 0.5 + 4 / 64, "nf4-double": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1 + 4 / 160}[scheme]
    assert weights_bytes(model).value == pytest.approx(rest + per_weight * linear, rel=0.02)
    kernels = {module.kernel for module in model.modules() if hasattr(module, "packed_tensors")}
    assert kernels == {"bitsandbytes:int8 (activations in 8 bits)" if scheme == "int8" else
                       "bitsandbytes:nf4 (multiplied out for every product)"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_and_the_same_step_gives_the_same_codes(place: Path, scheme: str) -> None:
    def made() -> tuple[Any, dict[str, torch.Tensor]]:
        model, _ = twin("llama")
        masks = {}
        for key, module in model.named_modules():
            if isinstance(module, nn.Linear) and key != "lm_head":
                masks[key] = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
                module.weight.data *= masks[key]
        return taken(place, "llama", scheme, model).model, masks

    (first, masks), (second, _) = made(), made()
    x = torch.eye(128, dtype=torch.bfloat16)
    for key in ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj"):
        layer = first.get_submodule(key)
        assert torch.equal(next(iter(layer.packed_tensors().values())),
                           next(iter(second.get_submodule(key).packed_tensors().values())))
        with torch.no_grad():
            assert bool((layer(x).t()[~masks[key]] == 0).all())


def test_nan_a_mixture_and_a_head_that_is_tied(place: Path, tmp_path: Path) -> None:
    model, _ = twin("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(StepError, match=r"layers\.1\.mlp\.down_proj: the weight holds NaN or infinity"):
        taken(place, "llama", "nf4", model)
    with pytest.raises(StepError, match=r"scheme nf4 of a mixture of experts.*expected scheme: w4a16"):
        taken(place, "olmoe", "nf4")
    work = taken(place, "llama", "int8", ignore=[])
    work.save(tmp_path)
    assert "lm_head.SCB" in tensors(tmp_path) and not json.loads((tmp_path / "config.json").read_text())[
        "tie_word_embeddings"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain), logits(work.model))
    assert work.events[1] == ("lm_head was tied to the embedding: it has a weight of its own now, in 8 bits, beside "
                              "the embedding in 16 bit")


@torch.no_grad()
def test_rows_that_are_no_multiple_of_a_block_are_multiplied_right_and_told(place: Path, tmp_path: Path) -> None:
    import transformers as t

    torch.manual_seed(0)  # a weight in the middle between two codes may go either way
    made = t.AutoModelForCausalLM.from_config(t.LlamaConfig(**COMMON | {"intermediate_size": 160}), dtype=torch.float32)
    dense = copy.deepcopy(made)
    work = taken(place, "llama", "nf4", made)
    assert work.events[1].startswith("4 of them have rows that are no multiple of a block")
    for key, module in dense.named_modules():
        if isinstance(module, nn.Linear) and key != "lm_head":
            module.weight.copy_(nf4_by_hand(module.weight, work.model.get_submodule(key).weight.quant_state.code))
    assert torch.allclose(logits(work.model), logits(dense), atol=1e-4)
    work.save(tmp_path)
    job(place).tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, dtype="stored", device="cpu")[0]), logits(work.model))


def test_layers_left_dense_are_named_for_other_readers(place: Path, tmp_path: Path) -> None:
    work = taken(place, "qwen2", "nf4", ignore=["lm_head", "layers.1.mlp.down_proj", "v_proj"])
    work.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    dense = [key for key, module in plain.named_modules() if type(module) is nn.Linear]
    assert sorted(dense) == sorted(["lm_head", "model.layers.1.mlp.down_proj",
                                    *(f"model.layers.{layer}.self_attn.v_proj" for layer in range(4))])


def test_a_run_tells_what_it_stores_and_what_runs_it(place: Path, tmp_path: Path) -> None:
    variants = {name: {"quantize": {"method": "rtn", **options}} for name, options in SCHEMES.items()}
    parsed = parse_recipe(recipe(variants), base_dir=place)
    result = llmops.run(parsed, runs=tmp_path / "runs")
    rows = {row["identity"]["variant"]: row for row in result.rows}
    estimates = {stage.variant: stage.estimate.disk_bytes.value for stage in llmops.plan(
        parsed, runs=tmp_path / "none").stages}
    stored = {"nf4": "nf4 g64", "nf4-double": "nf4 g64, double quantization",
              "int8": "int8 row, LLM.int8 with threshold 6", "int8-0": "int8 row, LLM.int8 with threshold 0"}
    for name in variants:
        row = rows[name]
        assert row["status"]["state"] == "ok" and row["parity"]["ok"], (name, row["status"], row["parity"])
        assert row["transform"]["storage_dtype"] == stored[name]
        assert row["transform"]["kernel"].startswith("bitsandbytes:")
        size = sum(tensor.nbytes for tensor in tensors(tmp_path / "runs" / "r" / name).values())
        assert abs(estimates[name] / size - 1) < 0.02
    assert rows["nf4-double"]["size"]["bits_per_weight"]["value"] < rows["nf4"]["size"]["bits_per_weight"]["value"]


@pytest.mark.parametrize(("step", "said"), [
    ({"scheme": "nf4", "group_size": 32}, "given 32 with scheme: nf4, which is blocks of 64"),
    ({"scheme": "llm_int8", "group_size": 128}, "given 128 with scheme: llm_int8, which is one scale a row"),
    ({"scheme": "nf4", "symmetric": False}, "given false with scheme: nf4, which has no zero points"),
    ({"scheme": "nf4", "clip": "mse"}, "given mse with scheme: nf4, whose range"),
    ({"scheme": "nf4", "embeddings": True}, "given true with scheme: nf4, which bitsandbytes has for linear"),
    ({"scheme": "w4a16", "double_quant": True}, "given double_quant with scheme: w4a16.*scheme: nf4 beside it"),
    ({"scheme": "nf4", "threshold": 6}, "given threshold with scheme: nf4.*scheme: llm_int8 beside it"),
    ({"scheme": "llm_int8", "threshold": -1}, "at least 0"),
    ({"scheme": "nf5"}, 'did you mean "nf4"'),
    ({"method": "hqq", "scheme": "nf4"}, "nf4")])
def test_wrong_options_are_told_before_anything_runs(place: Path, step: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(recipe({"q": {"quantize": {"method": "rtn", **step}}}), base_dir=place)


def test_plain_runs_import_neither_peft_nor_bitsandbytes() -> None:
    """Both together cost as much start-up as the rest."""
    script = ("import sys, llmops.runner, llmops.score, llmops.build.variant, llmops.models.load, llmops.doctor\n"
              "found = {'peft', 'bitsandbytes'} & set(sys.modules)\nassert not found, found")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_optional_kernel_package_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    from bitsandbytes.backends.cpu import ops

    with caplog.at_level(logging.WARNING):
        hush_bitsandbytes()
        ops.logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no package")
        logging.getLogger("bitsandbytes.autograd._functions").warning("inputs will be cast")
    assert not caplog.records

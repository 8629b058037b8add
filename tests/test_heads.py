"""Heads and embeddings in few bits: untied where they differ, tied where they are the same, readable by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.runs import recipe, workplace
from tests.test_quantizing import METHODS, job
from tests.twins import NAMES, tokens, twin
from torch import nn
from transformers import AutoModelForCausalLM

import llmops
from llmops.build.job import Work, calibration
from llmops.build.variant import apply_step
from llmops.calibrate import walk_blocks
from llmops.errors import LlmopsError, RecipeError
from llmops.formats.source import Source
from llmops.formats.table import FORMATS
from llmops.measure.memory import weights_bytes
from llmops.methods.quantize.options import Rtn
from llmops.models.embeddings import PackedEmbedding, embedding_name, is_tied, untie
from llmops.models.fold import fold
from llmops.models.parity import count_parameters
from llmops.models.quantized import PackedLinear, load_quantized, pack
from llmops.models.tail import Tail
from llmops.recipe import parse_recipe

EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("heads"))


def taken(place: Path, name: str = "llama", method: str = "rtn", **changes: Any) -> Work:
    return apply_step("quantize", job(place, name), METHODS[method].model_copy(update=changes))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(2, 40)).logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


#: (twin, options) -> (is the head tied on disk, is it packed by itself)
CASES = [("llama", {"embeddings": True}, (True, False)), ("gemma2", {"embeddings": True}, (True, False)),
         ("mistral", {"embeddings": True}, (False, False)), ("llama", {"ignore": []}, (False, True)),
         ("qwen2", {"ignore": [], "embeddings": True}, (False, True)),
         ("mistral", {"ignore": [], "embeddings": True}, (False, True)),
         ("qwen3", {"ignore": [], "embeddings": True, "scheme": "w8a16", "group_size": -1, "clip": "absmax"},
          (True, False))]


@pytest.mark.parametrize(("name", "options", "ends"), CASES)
def test_what_is_stored_is_read_to_the_bit_by_plain_transformers_and_by_us(
        place: Path, name: str, options: dict[str, Any], ends: tuple[bool, bool], tmp_path: Path) -> None:
    work = taken(place, name, **options)
    work.save(tmp_path)
    expected = logits(work.model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    ours = load_quantized(tmp_path, kernel="reference")
    assert torch.equal(logits(ours), expected)
    tied, packed = ends
    assert config(tmp_path)["tie_word_embeddings"] == tied == ours.config.tie_word_embeddings
    names = stored(tmp_path)
    assert ("lm_head.weight_packed" in names) == packed and ("lm_head.weight" in names) == (not tied and not packed)
    if options.get("embeddings"):
        assert names[f"{EMBEDDING}.weight"].dtype == torch.int8
        assert ("lm_head.weight_scale" in names) == (tied or packed)
        found = ours.get_input_embeddings()
        assert isinstance(found, PackedEmbedding) and found.tied == tied
        assert torch.equal(found.dequantized(), work.packed[EMBEDDING].dequantize())
    else:
        assert names[f"{EMBEDDING}.weight"].dtype == torch.bfloat16
        assert torch.equal(names[f"{EMBEDDING}.weight"], twin(name)[0].get_input_embeddings().weight)
    fast = load_quantized(tmp_path)  # with the kernels of this machine, which round activations
    drift = (logits(fast).float().log_softmax(-1) - expected.float().log_softmax(-1)).abs().max()
    assert float(drift) < 0.3


@pytest.mark.parametrize("name", NAMES)
def test_no_row_of_an_embedding_is_further_off_than_on_the_widest_grid(place: Path, name: str) -> None:
    """By squared error; a single weight by half a step, or, where the largest is cut by a finer grid, by one."""
    before = twin(name)[0].get_input_embeddings().weight.float()
    after = taken(place, name, embeddings=True).model.get_input_embeddings().weight.float()
    step = before.abs().amax(1, keepdim=True) / 127.5
    widest = (before / step.clamp(min=1e-9)).round().clamp(-128, 127) * step
    stored = 2 ** -8 * before.abs()  # the scale in bfloat16
    assert bool(((after - before).abs() <= step * 1.02 + stored).all())
    assert bool(((after - before).norm(dim=1) <= (widest - before).norm(dim=1) + stored.norm(dim=1)).all())
    assert bool(((after - before).abs() <= step * 0.52 + stored).float().mean() > 0.98)


def test_a_shared_matrix_is_held_once_and_counted_once(place: Path, tmp_path: Path) -> None:
    taken(place, embeddings=True).save(tmp_path)
    model = load_quantized(tmp_path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.codes.data_ptr() == head.codes.data_ptr() and head.kernel == "torch:int8pack"
    dense = twin("llama")[0]
    assert count_parameters(model) == count_parameters(dense) == sum(p.numel() for p in dense.parameters())
    alone = load_quantized(_plain(place, tmp_path / "plain"))
    saved = weights_bytes(alone).value - weights_bytes(model).value
    assert saved == 512 * 128 * 2 - (512 * 128 + 2 * 512)  # 16 bits before; codes and scales after
    before, after = (sum(tensor.nbytes for tensor in stored(folder).values()) for folder in (tmp_path / "plain",
                                                                                             tmp_path))
    assert before - after == saved - 2 * 512  # on disk the head's scales stand once more


def _plain(place: Path, folder: Path) -> Path:
    taken(place).save(folder)
    return folder


def test_in_memory_it_is_what_comes_back_from_disk(place: Path, tmp_path: Path) -> None:
    work = taken(place, "gemma2", embeddings=True)
    work.save(tmp_path)
    model = pack(work.model, work.packed, "reference")
    assert torch.equal(logits(model), logits(load_quantized(tmp_path, kernel="reference")))
    assert isinstance(model.get_output_embeddings(), PackedLinear)


def test_calibration_sees_the_rounded_embedding(place: Path) -> None:
    plain, rounded = taken(place, method="gptq"), taken(place, method="gptq", embeddings=True)
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(plain.packed[name].codes, rounded.packed[name].codes)
    assert rounded.events[1:3] == [f"{EMBEDDING} in 8 bits, one scale a token", "lm_head shares the codes of the "
                                                                                "embedding"]
    again = taken(place, method="gptq", embeddings=True)
    assert torch.equal(again.packed[name].codes, rounded.packed[name].codes)


def test_the_row_says_what_became_of_a_tied_head(place: Path) -> None:
    def told(**options: Any) -> str:
        return next(event for event in taken(place, **options).events if "was tied to the embedding" in event)

    assert told(ignore=[]) == ("lm_head was tied to the embedding: it has a weight of its own now, in 3 bits, beside "
                               "the embedding in 16 bit")
    assert told(ignore=[], embeddings=True).endswith("it has a weight of its own now, in 3 bits")
    assert told(ignore=[], embeddings=True, scheme="w8a16", group_size=-1, clip="absmax").endswith(
        "both became the same codes and are tied again")
    assert not any("tied" in event for event in taken(place, "mistral", ignore=[]).events)


def test_a_solved_head_differs_from_a_rounded_one(place: Path) -> None:
    solved, plain = (taken(place, "llama", method, ignore=[]).packed["lm_head"] for method in ("gptq", "rtn"))
    assert not torch.equal(solved.codes, plain.codes)


#: Everything but the head, so that what a method does to the head alone can be seen.
BLOCKS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(("method", "name"), [("awq", "llama"), ("awq", "gemma2"), ("autoround", "mistral"),
                                              ("smoothquant", "qwen3")])
def test_block_wise_methods_take_the_head_too(place: Path, method: str, name: str, tmp_path: Path) -> None:
    work = taken(place, name, method, ignore=[])
    assert "lm_head" in work.packed and work.expected.bits["lm_head"] == 3
    work.save(tmp_path)
    expected = logits(work.model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    assert torch.equal(logits(load_quantized(tmp_path, kernel="reference")), expected)
    again = taken(place, name, method, ignore=[])
    assert torch.equal(again.packed["lm_head"].codes, work.packed["lm_head"].codes)
    if method == "smoothquant":
        assert any("and into the norm before the head" in event for event in work.events)


def test_a_head_is_solved_by_what_it_sees(place: Path) -> None:
    """The head alone in 3 bits: every solver leaves less of the logits' error than the best range of a group does."""
    seen = calibration(job(place), "calib", 32)
    exact = twin("llama")[0].float()(seen).logits
    changes: dict[str, dict[str, Any]] = {"rtn": {}, "gptq": {"factors": "awq"}, "awq": {},
                                          "autoround": {"iterations": 60}}
    left = {}
    for method, more in changes.items():
        work = taken(place, "llama", method, ignore=BLOCKS, **more)
        assert work.packed.keys() == {"lm_head"}
        with torch.no_grad():
            left[method] = float((work.model.float()(seen).logits - exact).square().mean())
    assert max(left["gptq"], left["awq"], left["autoround"]) < 0.97 * left["rtn"], left


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_before_the_head_takes_factors_and_logits_stay(name: str) -> None:
    model = twin(name)[0].float()
    untie(model)
    before, measured = logits(model), {}
    hidden: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach().flatten(0, -2)))
    logits(model)
    handle.remove()

    def last(tail: Tail) -> None:
        assert tail.link is not None and tail.link.targets == ("lm_head",)
        measured["hessian"] = tail.measure("hessian")
        fold(tail.model, tail.link, torch.linspace(0.5, 2, tail.head.in_features))

    walk_blocks(model, tokens(2, 40), lambda _: None, tail=last)
    assert torch.allclose(measured["hessian"], 2 / len(hidden[0]) * hidden[0].t() @ hidden[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-4)


def test_untying_changes_no_output(place: Path) -> None:
    model, _ = twin("gemma2")
    before = logits(model)
    assert is_tied(model) and embedding_name(model) == EMBEDDING
    untie(model)
    assert not is_tied(model) and model.config.tie_word_embeddings is False and torch.equal(logits(model), before)


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    class Odd(nn.Embedding):  # type: ignore[misc]
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 1

    with pytest.raises(LlmopsError, match="Odd does more than look rows up"):
        PackedEmbedding(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), Odd(4, 8))


@pytest.mark.parametrize("name", ["dense", "compressed-tensors", "gguf"])
def test_exports_multiply_the_embedding_out(place: Path, name: str, tmp_path: Path) -> None:
    from llmops.formats import check

    if name == "gguf":
        pytest.importorskip("gguf")
    work = taken(place, embeddings=True, scheme="w4a16")
    work.save(tmp_path / "source")
    job(place).tokenizer.save_pretrained(tmp_path / "source")
    source = Source.of(tmp_path / "source")
    (tmp_path / "out").mkdir()
    record = check.held_against(source, tmp_path / "out", name, FORMATS[name].write(source, tmp_path / "out"))
    assert record["kl_mean"]["value"] < 1e-3


def test_a_run_keeps_its_promises(place: Path, tmp_path: Path) -> None:
    plain = {"method": "rtn", "scheme": "w4a16", "group_size": 32}
    variants = {"w4": {"quantize": plain}, "all": {"quantize": {**plain, "embeddings": True}},
                "head": {"quantize": {**plain, "ignore": []}}}
    result = llmops.run(parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "runs")
    rows = {row["identity"]["variant"]: row for row in result.rows}
    for name in variants:
        assert rows[name]["status"]["state"] == "ok" and rows[name]["parity"]["ok"], (name, rows[name]["status"])
    assert rows["all"]["transform"]["storage_dtype"] == "int4 g32 symmetric, embeddings int8 with the head"
    sizes = {name: sum(tensor.nbytes for tensor in stored(tmp_path / "runs" / "r" / name).values())
             for name in variants}
    estimates = {stage.variant: stage.estimate.disk_bytes.value for stage in llmops.plan(
        parse_recipe(recipe(variants), base_dir=place), runs=tmp_path / "none").stages if stage.variant in variants}
    assert sizes["all"] < sizes["w4"] < sizes["head"]
    for name, size in sizes.items():
        assert abs(estimates[name] / size - 1) < 0.02, (name, estimates[name], size)


@pytest.mark.parametrize(("step", "said"), [
    ({"quantize": {"method": "rtn", "scheme": "w4a16", "embeddings": 4}}, "expected true or false"),
    ({"quantize": {"method": "rtn", "scheme": "w4a16", "ignore": [], "group_size": 256}}, "lm_head takes 128 inputs"),
    ({"prune": {"method": "magnitude", "ignore": []}}, "given no lm_head, which shares its weight with the token")])
def test_what_cannot_be_is_told_before_anything_runs(place: Path, step: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(recipe({"q": step}), base_dir=place)


def test_the_default_leaves_both_alone() -> None:
    assert Rtn(method="rtn", scheme="w4a16").embeddings is False and Rtn(method="rtn", scheme="w4a16").ignore == [
        "lm_head"]

"""Every export, read back: by our loader to the bit, by foreign readers to rounding."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.test_quantized import logits, mixed, quantized
from tests.twins import twin

from llmops.errors import LlmopsError, ModelError, StepError
from llmops.formats import awq, check, gptq
from llmops.formats.options import ABOUT, NEEDS, check_format
from llmops.formats.source import Source, Written
from llmops.formats.table import FORMATS
from llmops.models.load import load
from llmops.models.quantized import PackedLinear, kernels, load_quantized, save_quantized
from llmops.models.schemes import LayerScheme

TWINS = ("llama", "llama-untied-bias", "qwen3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(twin, bits, group, symmetric) -> a folder of it, made once; bits 16: dense; bits 0: a mixture."""
    place = tmp_path_factory.mktemp("sources")

    def make(name: str, bits: int, group: int = 32, symmetric: bool = True) -> Path:
        folder = place / f"{name}-{bits}-{group}-{symmetric}"
        if not folder.exists() and bits == 16:
            model, tokenizer = twin(name)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        elif not folder.exists():
            model, weights, tokenizer = quantized(name, bits, group, symmetric) if bits else mixed(name)
            save_quantized(model, weights, folder, tokenizer)
        return folder

    return make


def exported(folder: Path, name: str, place: Path) -> tuple[dict[str, Any], Path]:
    source, out = Source.of(folder), place / name
    out.mkdir()
    return check.held_against(source, out, name, FORMATS[name].write(source, out)), out


def equal(folder: Path, other: Path) -> bool:
    ours, theirs = (load_quantized(each, kernel="reference").state_dict() for each in (folder, other))
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(autouse=True)
def _decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ and AWQ are read by the decoder, which multiplies out in float32; GPTQModel, if it is here, in float16."""
    for module in (awq, gptq):
        monkeypatch.setattr(module, "find_spec", lambda _: None)


def test_every_format_has_a_line_and_every_need_a_format() -> None:
    assert list(FORMATS) == list(ABOUT)
    assert set(NEEDS) <= set(ABOUT)


@pytest.mark.parametrize(("name", "bits", "group", "symmetric"), [
    *((name, 4, 32, True) for name in TWINS), ("llama-untied-bias", 2, 32, False), ("qwen3", 3, 128, True),
    ("qwen3", 3, -1, False), ("llama", 8, -1, True), ("llama-untied-bias", 8, 32, False)])
def test_gptq_comes_back_to_the_bit(name: str, bits: int, group: int, symmetric: bool, made: Any,
                                    tmp_path: Path) -> None:
    folder = made(name, bits, group, symmetric)
    record, out = exported(folder, "gptq", tmp_path)
    assert record["max_logit_difference"]["value"] == 0 and equal(folder, out)
    model, tokenizer = load(out, kernel="reference")
    assert torch.equal(logits(model), logits(load(folder, kernel="reference")[0])) and tokenizer.chat_template
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 28
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block == json.loads((out / "quantize_config.json").read_text())
    assert (block["bits"], block["group_size"], block["sym"], block["desc_act"]) == (bits, group, symmetric, False)


@pytest.mark.parametrize(("name", "group", "symmetric"), [("llama", 128, True), ("llama-untied-bias", 32, False),
                                                          ("qwen3", -1, False)])
def test_awq_comes_back_to_the_bit(name: str, group: int, symmetric: bool, made: Any, tmp_path: Path) -> None:
    folder = made(name, 4, group, symmetric)
    record, out = exported(folder, "awq", tmp_path)
    assert record["max_logit_difference"]["value"] == 0 and equal(folder, out)


def test_a_loaded_gptq_model_can_go_on_to_every_other_layout(made: Any, tmp_path: Path) -> None:
    folder = made("llama-untied-bias", 4, 32, False)
    _, gptq = exported(folder, "gptq", tmp_path)
    _, awq = exported(gptq, "awq", tmp_path)
    record, back = exported(awq, "compressed-tensors", tmp_path)
    assert record["reader"] == "transformers with compressed-tensors"
    assert record["max_logit_difference"]["value"] == 0 and equal(folder, back)
    assert load_file(back / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_int_quantized_is_loaded_packed(made: Any, tmp_path: Path) -> None:
    """Written here as compressed-tensors describes it, with activations that are run and others that are left."""
    model, weights, tokenizer = quantized("qwen3", 8, -1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, weight in weights.items():
        stored |= {f"{name}.weight": weight.codes, f"{name}.weight_scale": weight.scale}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

    def written(given: Any) -> None:
        group = {"targets": ["Linear"], "weights": scheme, "input_activations": given}
        block = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": block}))

    written(None)
    assert equal(made("qwen3", 8, -1), tmp_path)
    written(activations)
    assert kernels(load(tmp_path, kernel="reference")[0]) == {"reference (int8 activations by token)": 28}
    written(activations | {"strategy": "tensor", "dynamic": False})
    with pytest.warns(UserWarning, match="quantized in a way that is not run here; they are left as they are"):
        loaded, _ = load(tmp_path, kernel="reference")
    assert sum(isinstance(module, PackedLinear) for module in loaded.modules()) == 28


def test_dense_multiplies_out_and_rounds_once(made: Any, tmp_path: Path) -> None:
    folder = made("llama", 3, 32)
    record, out = exported(folder, "dense", tmp_path)
    assert record["reader"] == "transformers" and record["notes"] == [
        "packed weights multiplied out and rounded to bfloat16"]
    assert 0 < record["kl_mean"]["value"] < 1e-3
    packed = load_quantized(folder, kernel="reference").get_submodule("model.layers.1.mlp.up_proj")
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["model.layers.1.mlp.up_proj.weight"], packed.dequantized())
    assert "lm_head.weight" not in stored and "quantization_config" not in (out / "config.json").read_text()


def test_mixed_layers_go_where_layers_may_differ(made: Any, tmp_path: Path) -> None:
    folder = made("llama", 0)
    record, out = exported(folder, "compressed-tensors", tmp_path)
    assert record["max_logit_difference"]["value"] == 0 and equal(folder, out)
    assert Source.of(out).schemes == Source.of(folder).schemes
    record, _ = exported(folder, "dense", tmp_path)
    assert record["kl_mean"]["value"] < 1e-3


def test_mixed_layers_in_gptqs_layout_are_told_by_dynamic(made: Any, tmp_path: Path) -> None:
    folder = made("llama", 0)
    record, out = exported(folder, "gptq", tmp_path)
    assert record["max_logit_difference"]["value"] == 0 and equal(folder, out)
    assert Source.of(out).schemes == Source.of(folder).schemes and len(set(Source.of(out).schemes.values())) > 1
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert block == json.loads((out / "quantize_config.json").read_text()) and block["dynamic"]
    for pattern, said in block["dynamic"].items():
        match = [name for name in Source.of(folder).schemes if re.match(pattern.removeprefix("+:"), name)]
        assert match and all((s.bits, s.group_size, s.symmetric) == tuple(said.values())
                             for s in map(Source.of(folder).schemes.get, match))
    assert any("GPTQModel reads it" in note for note in record["notes"])
    _, back = exported(out, "compressed-tensors", tmp_path)
    assert equal(folder, back)


def test_dynamic_names_fused_layers_as_servers_do_and_dense_ones() -> None:
    four, three = LayerScheme(4, 32, True), LayerScheme(3, 128, False)
    names = [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    found = gptq.differing({**dict.fromkeys(names, three), "model.layers.1.self_attn.o_proj": four}, four,
                           ["model.layers.0.mlp.down_proj"])
    assert list(found.values()) == [{}, {"bits": 3, "group_size": 128, "sym": False}]
    dense, pattern = found
    assert dense.startswith("-:") and re.match(dense[2:], "model.layers.0.mlp.down_proj")
    matched = [name for name in [*names, "model.layers.1.self_attn.qkv_proj", "model.layers.11.self_attn.q_proj",
                                 "model.layers.1.self_attn.o_proj"] if re.match(pattern[2:], name)]
    assert matched == [*names, "model.layers.1.self_attn.qkv_proj"]


def test_layers_left_dense_are_told_in_gptqs_layout(tmp_path: Path) -> None:
    model, weights, tokenizer = quantized("llama", 4, 32)
    weights = {name: weight for name, weight in weights.items() if "down_proj" not in name}
    save_quantized(model, weights, tmp_path / "source", tokenizer)
    _, out = exported(tmp_path / "source", "gptq", tmp_path)
    dynamic = json.loads((out / "config.json").read_text())["quantization_config"]["dynamic"]
    assert len(dynamic) == 4 and all(pattern.startswith("-:") and "down_proj" in pattern for pattern in dynamic)
    assert equal(tmp_path / "source", out)


def test_scales_that_float16_rounds_are_counted(tmp_path: Path) -> None:
    model, weights, tokenizer = quantized("llama", 4, 128, dtype=torch.float32)
    save_quantized(model, weights, tmp_path / "source", tokenizer)
    record, _ = exported(tmp_path / "source", "gptq", tmp_path)
    (note,) = record["notes"]
    assert note.endswith(" scales rounded to float16") and 0 < record["max_logit_difference"]["value"] < 0.05


def test_a_checkpoint_out_of_order_is_refused_by_name(made: Any, tmp_path: Path) -> None:
    _, out = exported(made("llama", 4, 32), "gptq", tmp_path)
    stored = load_file(out / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj"
    stored[f"{name}.g_idx"] = stored[f"{name}.g_idx"].flip(0)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"{name}: its g_idx puts input features into groups out of their order"):
        load(out)


def test_a_checkpoint_whose_config_is_silent_is_refused(made: Any, tmp_path: Path) -> None:
    _, out = exported(made("llama", 4, 32), "gptq", tmp_path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(ModelError, match='has a quantize_config.json .* put it there'):
        load(out)


def test_an_export_that_reads_back_wrong_is_refused(made: Any, tmp_path: Path) -> None:
    source = Source.of(made("llama", 4, 32))
    FORMATS["gptq"].write(source, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in stored:
        if name.endswith("qzeros"):  # as if the -1 had been forgotten: 8 in every nibble
            stored[name] = torch.full_like(stored[name], -2004318072)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepError, match="gptq: read back by .* it is not what was exported: KL"):
        check.held_against(source, tmp_path, "gptq", Written())


@pytest.mark.parametrize(("name", "bits", "match"), [
    ("awq", 3, "3 bits; AWQ's layout holds 4 alone"), ("gptq", 16, "and this format holds integers; expected a quant"),
    ("awq", 0, "mixes schemes .* and AWQ's layout describes one .* export to compressed-tensors, .* to gguf"),
    ("awq", 16, "holds integers"), ("compressed-tensors", 16, "holds integers")])
def test_what_a_format_cannot_hold(name: str, bits: int, match: str, made: Any, tmp_path: Path) -> None:
    with pytest.raises(LlmopsError, match=match):
        FORMATS[name].write(Source.of(made("llama", bits)), tmp_path)


def test_unknown_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LlmopsError, match='unknown format "ggfu"; expected one of .*; did you mean "gguf"'):
        check_format("ggfu")
    monkeypatch.setattr("llmops.formats.options.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(LlmopsError, match="needs onnxscript, not installed here; .*: pip install onnx onnxscript o"):
        check_format("onnx")
    check_format("gguf-q8_0")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_graphs_compute_the_same(name: str, made: Any, tmp_path: Path) -> None:
    for module in NEEDS[name]:
        pytest.importorskip(module)
    record, out = exported(made("llama-untied-bias", 4, 32), name, tmp_path)
    assert record["reader"] == {"onnx": "onnxruntime"}.get(name, name)
    assert record["max_logit_difference"]["value"] < {"onnx": 1e-3, "openvino": 0.05}[name]
    assert (out / "tokenizer.json").exists()

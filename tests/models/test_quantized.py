"""Packed models: what is on disk gives the same logits here, in memory, and in plain transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.twins import NAMES, tokens, twin
from torch import nn

from llmops.calibrate import walk
from llmops.errors import LlmopsError, ModelError
from llmops.methods.quantize import QuantizedWeight, rtn
from llmops.models.quantized import PackedLinear, kernels, load_quantized, pack, save_quantized
from llmops.models.schemes import LayerScheme, fused_groups, schemes_of, stored_as, told

SCHEMES = [(8, -1, True), (4, 128, True), (4, 32, True), (4, -1, True), (3, 128, True), (3, 32, True), (3, -1, True),
           (2, 32, True), (2, -1, True), (8, 32, True), (4, 128, False), (4, 32, False), (4, -1, False)]


def quantized(name: str, bits: int, group: int, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
              ) -> tuple[Any, dict[str, QuantizedWeight], Any]:
    model, tokenizer = twin(name, dtype)
    weights: dict[str, QuantizedWeight] = {}

    def update(layer_name: str, layer: nn.Linear, _: torch.Tensor | None) -> torch.Tensor:
        weights[layer_name] = rtn(layer.weight, bits=bits, group_size=group, symmetric=symmetric)
        return weights[layer_name].dequantize()

    walk(model, None, "none", update, ignore=["lm_head"])
    return model, weights, tokenizer


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(2, 40)).logits


def plain(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
def test_plain_transformers_gives_our_logits_to_the_bit(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    model, weights, tokenizer = quantized("llama", bits, group, symmetric)
    save_quantized(model, weights, tmp_path, tokenizer)
    ours = logits(load_quantized(tmp_path, kernel="reference"))
    assert torch.equal(ours, logits(model))
    assert torch.equal(ours, plain(tmp_path))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_architecture_reloads_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, weights, tokenizer = quantized(name, 4, 32, dtype=dtype)
    save_quantized(model, weights, tmp_path, tokenizer)
    loaded = load_quantized(tmp_path, kernel="reference")
    assert loaded.dtype == dtype and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(loaded), plain(tmp_path))
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize(("bits", "group", "kernel"), [
    (8, -1, "torch:int8pack"), (4, 128, "torch:int4pack"), (3, 128, "torch:int4pack (3-bit codes in 4-bit slots)")])
def test_the_fast_kernel_is_chosen_and_stays_near_the_reference(bits: int, group: int, kernel: str,
                                                                tmp_path: Path) -> None:
    model, weights, _ = quantized("qwen3", bits, group)
    save_quantized(model, weights, tmp_path)
    fast = load_quantized(tmp_path)
    assert kernels(fast) == {kernel: 28} and kernels(model) == {}
    reference = logits(load_quantized(tmp_path, kernel="reference")).float()
    assert float((logits(fast).float() - reference).norm() / reference.norm()) < 0.03
    assert torch.equal(logits(fast), logits(fast))


def test_bytes_are_what_the_bits_say_on_disk_and_in_memory(tmp_path: Path) -> None:
    sizes = {}
    for bits in (8, 4, 3, 2):
        model, weights, _ = quantized("llama", bits, 128)
        save_quantized(model, weights, tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
        linear = sum(w.codes.numel() for w in weights.values())
        other = sum(t.numel() * 2 for n, t in model.named_parameters() if n.removesuffix(".weight") not in weights)
        assert sizes[bits] == pytest.approx(other + linear * (bits + 16 / 128) / 8, rel=0.05)  # tied, stored once
    loaded = load_quantized(tmp_path / "4")
    assert not any(isinstance(m, nn.Linear) for n, m in loaded.named_modules() if n != "lm_head")
    held = sum(t.numel() * t.element_size() for m in loaded.modules() if isinstance(m, PackedLinear)
               for t in m.packed_tensors().values())
    linear = sum(w.codes.numel() for w in weights.values())
    assert held <= linear * (4 + 3 * 16 / 128) / 8  # codes, stored scale, and the kernel's scale and shift


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, False), (3, True)])
def test_a_loaded_model_gives_its_stored_tensors_back(bits: int, symmetric: bool, kernel: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, weights, _ = quantized("llama-untied-bias", bits, -1, symmetric)
    save_quantized(model, weights, tmp_path)
    state = load_quantized(tmp_path, kernel=kernel).state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_pack_in_memory_equals_a_reload(tmp_path: Path) -> None:
    model, weights, _ = quantized("llama-untied-bias", 4, 64)
    save_quantized(model, weights, tmp_path)
    packed = pack(copy.deepcopy(model), weights)
    assert torch.equal(logits(packed), logits(load_quantized(tmp_path)))
    with pytest.raises(LlmopsError, match="is LlamaRMSNorm; expected the name of a linear layer"):
        pack(model, {"model.norm": next(iter(weights.values()))})


def test_generates_and_casts_with_the_model(tmp_path: Path) -> None:
    model, weights, _ = quantized("gemma3", 4, 32)
    save_quantized(model, weights, tmp_path)
    loaded = load_quantized(tmp_path, dtype="float32", kernel="reference")
    assert loaded.dtype == torch.float32
    close = logits(loaded) - logits(load_quantized(tmp_path, kernel="reference")).float()
    assert float(close.norm() / logits(loaded).norm()) < 0.03
    made = load_quantized(tmp_path).generate(tokens(1, 8), max_new_tokens=5, do_sample=False)
    assert made.shape[1] > 8
    again = load_quantized(tmp_path).to(torch.float32)
    assert torch.isfinite(logits(again)).all()


def test_config_says_what_is_stored(tmp_path: Path) -> None:
    model, weights, _ = quantized("mistral", 4, -1)
    del weights["model.layers.0.mlp.down_proj"]
    save_quantized(model, weights, tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert block["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert block["config_groups"]["group_0"]["weights"]["strategy"] == "channel"
    assert schemes_of(block, weights) == dict.fromkeys(weights, LayerScheme(4, -1, True))
    assert kernels(load_quantized(tmp_path)) == {"torch:int4pack": 27}
    assert torch.equal(logits(load_quantized(tmp_path, kernel="reference")), plain(tmp_path))
    assert not hasattr(model.config, "quantization_config")  # the model in memory is not changed by saving it


def test_refuses_folders_that_are_not_whole_or_not_ours(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, weights, _ = quantized("llama", 4, 128)
    save_quantized(model, weights, tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, text = load_file(file), config.read_text()

    def broken(tensors: dict[str, torch.Tensor], match: str) -> None:
        save_file(tensors, file)
        with pytest.raises(ModelError, match=match):
            load_quantized(tmp_path)

    layer = "model.layers.1.mlp.up_proj"
    broken({k: v for k, v in good.items() if k != f"{layer}.weight_scale"}, f"{layer} lacks weight_scale")
    broken({k: v for k, v in good.items() if k != "model.norm.weight"}, "missing .'model.norm.weight'")
    broken(good | {"model.extra": torch.zeros(1)}, "left over .'model.extra'")
    broken(good | {f"{layer}.weight_g_idx": torch.zeros(1)}, "dynamic act-order")
    broken(good | {"model.norm.weight": torch.zeros(3)}, r"model.norm.weight is \(3,\)")
    save_file(good, file)
    config.write_text(text.replace('"num_bits": 4', '"num_bits": 3'))
    with pytest.raises(ModelError, match="at 3 bits in groups of 128"):
        load_quantized(tmp_path)
    config.write_text(text.replace("pack-quantized", "nvfp4-pack-quantized"))
    with pytest.raises(ModelError, match="expected pack-quantized"):
        load_quantized(tmp_path)


def test_refuses_to_save_foreign_weights_and_halves_of_a_fused_layer(tmp_path: Path) -> None:
    model, weights, _ = quantized("llama", 4, 128)
    name = "model.layers.0.self_attn.k_proj"
    with pytest.raises(LlmopsError, match=r"k_proj int8 row symmetric, .* one scheme for layers that servers run"):
        save_quantized(model, weights | {name: rtn(model.get_submodule(name).weight.data, bits=8)}, tmp_path)
    with pytest.raises(LlmopsError, match="weights name .'nowhere'"):
        save_quantized(model, {"nowhere": weights[name]}, tmp_path)
    with pytest.raises(LlmopsError, match="weights name nothing"):
        save_quantized(model, {}, tmp_path)


MIX = {"self_attn.q_proj": (3, 32, True), "self_attn.k_proj": (3, 32, True), "self_attn.v_proj": (3, 32, True),
       "self_attn.o_proj": (8, -1, True), "mlp.gate_proj": (2, 32, True), "mlp.up_proj": (2, 32, True),
       "mlp.down_proj": (4, 64, False)}


def mixed(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, dict[str, QuantizedWeight], Any]:
    """A twin whose layers have four schemes, others in its last block."""
    model, tokenizer = twin(name, dtype)
    weights: dict[str, QuantizedWeight] = {}

    def update(layer_name: str, layer: nn.Linear, _: torch.Tensor | None) -> torch.Tensor:
        last = layer_name.startswith("model.layers.3.")
        bits, group, symmetric = (4, 32, True) if last else MIX[layer_name.split(".", 3)[-1]]
        weights[layer_name] = rtn(layer.weight, bits=bits, group_size=group, symmetric=symmetric)
        return weights[layer_name].dequantize()

    walk(model, None, "none", update, ignore=["lm_head"])
    return model, weights, tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_layers_may_have_schemes_of_their_own(name: str, tmp_path: Path) -> None:
    model, weights, tokenizer = mixed(name)
    save_quantized(model, weights, tmp_path, tokenizer)
    loaded = load_quantized(tmp_path, kernel="reference")
    assert {key: (layer.bits, layer.group_size) for key, layer in loaded.named_modules()
            if isinstance(layer, PackedLinear)} == {key: (w.bits, w.group_size) for key, w in weights.items()}
    assert torch.equal(logits(loaded), logits(model)) and torch.equal(logits(loaded), plain(tmp_path))
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert schemes_of(block, weights) == {key: LayerScheme.of(weight) for key, weight in weights.items()}
    assert stored_as(block) == told(schemes_of(block, weights)) == (
        "int2 g32 symmetric in 6 layers, int3 g32 symmetric in 9 layers, int4 g32 symmetric in 7 layers, "
        "int4 g64 asymmetric in 3 layers, int8 row symmetric in 3 layers")


def test_targets_are_ranked_as_compressed_tensors_ranks_them(tmp_path: Path) -> None:
    """A name before an expression, that before a class, the first in the alphabet; transformers agrees."""
    model, weights, tokenizer = mixed("llama")
    save_quantized(model, weights, tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    by = {(g["weights"]["num_bits"], g["weights"]["symmetric"]): g for g in groups.values()}
    by[3, True]["targets"] = [r"re:.*\.(q|k|v)_proj$"]
    by[2, True]["targets"] = ["Linear"]
    by[8, True]["targets"] = [r"re:.*attn\.o_proj$"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert schemes_of(config["quantization_config"], weights) == {key: LayerScheme.of(w) for key, w in weights.items()}
    assert torch.equal(logits(load_quantized(tmp_path, kernel="reference")), logits(model))
    assert torch.equal(plain(tmp_path), logits(model))
    with pytest.raises(ModelError, match="elsewhere is stored packed, but none of the 1 targets"):
        schemes_of({"config_groups": {"g": by[3, True]}}, ["elsewhere"])


def test_layers_that_servers_fuse_are_found_by_their_names() -> None:
    names = [f"model.layers.{i}.{end}" for i in range(2) for end in MIX]
    assert fused_groups(names)[:4] == [tuple(names[:3]), (names[3],), tuple(names[4:6]), (names[6],)]
    assert fused_groups(["a.0.up_proj", "a.1.up_proj", "x.q", "lm_head"]) == [("a.0.up_proj",), ("a.1.up_proj",),
                                                                            ("x.q",), ("lm_head",)]

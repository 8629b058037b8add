"""Models in 8-bit integers and 4- and 8-bit floats: on disk, in memory, in plain transformers, and from other tools."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from tests.twins import NAMES, tokens, twin
from torch import nn

from llmops.errors import LlmopsError, ModelError
from llmops.methods.quantize import rtn
from llmops.methods.quantize.floats import FLOATS, AnyWeight
from llmops.models.formatted import KINDS, FormattedLinear
from llmops.models.imitated import imitate
from llmops.models.load import load
from llmops.models.number_formats import FORMATS, activations, weights
from llmops.models.quantized import kernels, load_quantized, pack, parts_of, save_quantized
from llmops.models.schemes import stored_as
from llmops.ops import int8_matmul

FOUR_BITS = ("mxfp4", "nvfp4")


def made(kind: str, W: torch.Tensor) -> AnyWeight:
    return replace(rtn(W, bits=8), activation_bits=8) if kind == "w8a8" else rtn(W, bits=FLOATS[kind])


def formatted(name: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, dict[str, AnyWeight], Any]:
    """A twin with rounded weights, what they are stored as, and its tokenizer."""
    model, tokenizer = twin(name, dtype)
    found: dict[str, AnyWeight] = {}
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear) and layer != "lm_head":
            found[layer] = made(kind, module.weight.data)
            module.weight.data = found[layer].dequantize().to(dtype)
    return model, found, tokenizer


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(tokens(2, 24)).logits.float()


def plain(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_decompresses_our_weights_to_the_bit(kind: str, tmp_path: Path) -> None:
    """The whole folder through `from_pretrained`, in bfloat16; logits to the bit where activations are not rounded.

    Where they are, compressed-tensors rounds them in bfloat16, and int8 by 127.5 steps, where servers take float32 and
    127 (see `test_in_float32_...`): they differ by that, and by less than the rounding itself changes them.
    """
    model, found, tokenizer = formatted("qwen2", kind)  # biases on q, k and v
    save_quantized(model, found, tmp_path, tokenizer)
    ours, theirs = load_quantized(tmp_path), plain(tmp_path)
    mine, other, dense = logits(ours), logits(theirs), logits(model)
    for layer, weight in found.items():
        assert torch.equal(theirs.get_submodule(layer).weight, weight.dequantize().to(torch.bfloat16))
    if kind in FOUR_BITS:
        assert torch.equal(mine, other) and torch.equal(mine, dense)
    else:
        apart = float((mine - other).norm() / (mine - dense).norm())
        assert 0 < apart < 1.5 and float((mine - other).norm() / mine.norm()) < 0.1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FOUR_BITS])
def test_in_float32_and_with_its_divisor_plain_transformers_gives_our_logits(
        kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 leaves one difference, the divisor of int8; a rounding at a tie may still fall the other way."""
    model, found, _ = formatted("qwen3", kind, torch.float32)
    save_quantized(model, found, tmp_path)
    theirs = plain(tmp_path)
    quantize_rows = int8_matmul.quantize_rows
    monkeypatch.setattr(int8_matmul, "quantize_rows", lambda x, top: quantize_rows(x, 127.5))
    ours = load_quantized(tmp_path, kernel="reference")
    mine, other, dense = logits(ours), logits(theirs), logits(model)
    assert float((mine - other)[0, :1].abs().max()) < 1e-4  # the first token, which no turned tie has reached yet
    assert float((mine - other).norm()) < 0.6 * float((mine - dense).norm())  # what rounding activations changes
    x = torch.randn(2, 20, 128)  # of two dimensions compressed-tensors takes one scale for all
    for layer in (layer for layer in found if "down_proj" not in layer and "o_proj" not in layer):
        with torch.no_grad():
            one, two = (each.get_submodule(layer)(x) for each in (ours, theirs))
        assert float((one - two).abs().max()) < 1e-5 * float(two.abs().max()), layer


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_plain_transformers_cannot_run_four_bit_floats_in_float32_and_why(kind: str, tmp_path: Path) -> None:
    """compressed-tensors decompresses them to bfloat16 whatever the model's type. So it is asked for the weights."""
    model, found, _ = formatted("llama", kind, torch.float32)
    save_quantized(model, found, tmp_path)
    with pytest.raises(RuntimeError, match="same dtype"):
        logits(plain(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights(kind))
    for layer in found:
        parts = {part: stored[f"{layer}.{part}"] for part in parts_of(found[layer])}
        theirs = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(theirs, model.get_submodule(layer).weight.to(torch.bfloat16))
    assert torch.equal(logits(load_quantized(tmp_path)), logits(model))
    assert torch.isfinite(logits(plain(tmp_path, torch.bfloat16))).all()


@pytest.mark.parametrize(("name", "kind"), list(zip(NAMES, (*KINDS, *KINDS), strict=False)))
def test_every_architecture_reloads_and_runs_as_it_was_packed_in_memory(name: str, kind: str, tmp_path: Path) -> None:
    model, found, tokenizer = formatted(name, kind)
    save_quantized(model, found, tmp_path, tokenizer)
    ours = load_quantized(tmp_path)
    assert torch.equal(logits(ours), logits(pack(model, found)))
    assert sum(kernels(ours).values()) == len(found) == sum(isinstance(m, FormattedLinear) for m in ours.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_memory_is_what_is_on_disk(kind: str, tmp_path: Path) -> None:
    from llmops.measure.memory import weights_bytes

    model, found, tokenizer = formatted("llama", kind)
    save_quantized(model, found, tmp_path, tokenizer)
    ours, _ = load(tmp_path)
    layer = ours.get_submodule("model.layers.1.mlp.down_proj")
    name = "model.layers.1.mlp.down_proj"
    held = sum(tensor.nbytes for tensor in layer.packed_tensors().values())
    assert held == pytest.approx(found[name].bits_per_weight / 8 * 128 * 256, rel=1e-3)
    assert not any(p.numel() >= 128 * 256 for p in layer.parameters()) and not list(layer.buffers())
    assert weights_bytes(ours).value < 0.7 * weights_bytes(model).value
    again = {key: tensor for key, tensor in ours.state_dict().items() if not key.startswith("lm_head")}
    stored = load_file(tmp_path / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key].view(torch.uint8), stored[key].view(torch.uint8)) for key in stored)
    assert torch.equal(layer.dequantized(), found[name].dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_types(kind: str) -> None:
    model, found, _ = formatted("llama-untied-bias", kind)
    packed = pack(model, found)
    before = logits(packed)
    assert torch.equal(logits(copy.deepcopy(packed)), before)
    wide = packed.to(torch.float32)
    layer = wide.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.bias.dtype == torch.float32 and f"kind={kind}" in repr(layer)
    assert torch.equal(layer.packed_tensors()["weight_scale"].view(torch.uint8),
                       found["model.layers.0.mlp.up_proj"].scale.view(torch.uint8))
    assert float((logits(wide) - before).norm() / before.norm()) < 0.1
    with pytest.raises(ValueError, match=r"x is \(2, 5\); expected \(..., 128\)"):
        layer(torch.zeros(2, 5))


def test_a_kind_that_is_none() -> None:
    with pytest.raises(LlmopsError, match='kind "fp6"; expected one of w8a8'):
        FormattedLinear({}, "fp6")
    with pytest.raises(LlmopsError, match="kernel triton"):
        FormattedLinear(parts_of(made("mxfp4", torch.ones(8, 32))), "mxfp4", kernel="triton")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_dense_model_of_the_parity_check_computes_what_the_packed_one_does(kind: str) -> None:
    """By other products: what is left is the order of additions, in bfloat16 too."""
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        model, found, _ = formatted("llama-untied-bias", kind, dtype)
        x, name = torch.randn(2, 7, 128).to(dtype), "model.layers.0.mlp.up_proj"
        before = model.get_submodule(name)(x)
        imitate(model, found)
        dense, whole = model.get_submodule(name)(x), logits(model)
        packed = pack(model, found)
        assert float((dense - packed.get_submodule(name)(x)).abs().max()) < close * float(dense.abs().max())
        assert float((whole - logits(packed)).norm() / whole.norm()) < (1e-4 if kind in FOUR_BITS else 2e-2)
        assert torch.equal(before, dense) == (activations(kind) is None)


def test_one_folder_with_a_format_for_each_layer(tmp_path: Path) -> None:
    """compressed-tensors calls it mixed-precision; transformers reads it, too."""
    model, _ = twin("llama")
    found: dict[str, AnyWeight] = {}
    kinds = {"self_attn": "w8a8", "o_proj": "fp8-channel", "mlp": "nvfp4", "down_proj": "mxfp4"}
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear) and layer != "lm_head":
            kind = kinds.get(layer.rsplit(".", 1)[-1]) or kinds[layer.rsplit(".", 2)[-2]]
            found[layer] = made(kind, module.weight.data) if ".0." not in layer else rtn(module.weight.data, bits=4,
                                                                                        group_size=32)
    save_quantized(model, found, tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert block["format"] == "mixed-precision"
    assert {group["format"] for group in block["config_groups"].values()} == {"pack-quantized", *FORMATS.values()}
    assert stored_as(block) == ("fp8 row, fp8 activations by token in 3 layers, int4 g32 symmetric in 7 layers, "
                                "mxfp4 g32 in 3 layers, nvfp4 g16 in 6 layers, int8 row, int8 activations by token in "
                                "9 layers")
    ours = load_quantized(tmp_path)
    assert torch.equal(logits(ours), logits(pack(copy.deepcopy(model), found)))
    theirs = plain(tmp_path)
    assert torch.isfinite(logits(theirs)).all()
    for layer, weight in found.items():
        assert torch.equal(theirs.get_submodule(layer).weight, weight.dequantize().to(torch.bfloat16)), layer


# ------------------------------------------------------------------------------------------ folders of other tools


def edited(folder: Path, **changes: Any) -> None:
    """Give the one group of a config.json other values; None takes a key out."""
    file = folder / "config.json"
    body = json.loads(file.read_text())
    group = body["quantization_config"]["config_groups"]["group_0"]
    for key, value in changes.items():
        group[key] = value
    file.write_text(json.dumps(body))


def test_four_bit_activations_are_left_and_their_scale_is_no_surprise(tmp_path: Path) -> None:
    model, found, _ = formatted("llama", "nvfp4")
    save_quantized(model, found, tmp_path)
    described = weights("nvfp4") | {"dynamic": "local", "observer": "static_minmax"}
    edited(tmp_path, input_activations=described, format=None)
    stored = load_file(tmp_path / "model.safetensors")
    stored |= {f"{layer}.input_global_scale": torch.ones(1) for layer in found}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="quantized in a way that is not run here"):
        ours = load_quantized(tmp_path)
    assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize(("kind", "changes", "said"), [
    ("fp8-channel", {"input_activations": None}, "by channel with activations in 16 bit; expected float 8 by token"),
    ("fp8-tensor", {"input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}},
     "activations float 8 by tensor, static; expected float 8 by token, dynamic, as fp8-tensor has them"),
    ("fp8-block", {"weights": weights("fp8-block") | {"block_structure": [64, 64]}}, r"block \[64, 64\]; expected int"),
    ("mxfp4", {"weights": weights("mxfp4") | {"num_bits": 6}}, "'float', 6 bits, strategy 'group', group 32"),
    ("nvfp4", {"weights": weights("mxfp4")}, "format nvfp4-pack-quantized in config.json, but .* is mxfp4 g32")])
def test_formats_that_are_not_run_are_refused(kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    model, found, _ = formatted("llama", kind)
    save_quantized(model, found, tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(ModelError, match=said):
        load_quantized(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_whole(kind: str, tmp_path: Path) -> None:
    model, found, _ = formatted("llama", kind)
    save_quantized(model, found, tmp_path)
    file, layer = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj"
    good = load_file(file)
    for part in parts_of(found[layer]):
        save_file({key: value for key, value in good.items() if key != f"{layer}.{part}"}, file)
        with pytest.raises(ModelError, match=f"{layer} lacks {part}|left over"):
            load_quantized(tmp_path)
    scale = good[f"{layer}.weight_scale"]
    save_file(good | {f"{layer}.weight_scale": torch.cat([scale.view(torch.uint8)] * 2).view(scale.dtype)}, file)
    with pytest.raises(ModelError, match="scale"):
        load_quantized(tmp_path)

"""Quantized models on disk and back: the formats of compressed-tensors, and others to read.

    save_quantized   model + {layer name: quantized weight} -> a folder that transformers and vLLM load unchanged
    load_quantized   such a folder -> the model with a `PackedLinear` or `FormattedLinear` for each quantized layer
    pack             the same replacement for a model in memory

The dense weights are never materialised on the way in: the model is built with empty parameters, each quantized layer
is replaced, and tensors are read one at a time. One format serves integers of 2 to 8 bits; GPTQ, AWQ and int-quantized
checkpoints are read into it, code by code (`layouts.py`). int8 with int8 activations and 4- and 8-bit floats have
formats of their own (`number_formats.py`). Layers may have different schemes (`schemes.py`); embeddings in 8 bits are
apart (`embeddings.py`), experts are taken apart (`experts.py`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError, ModelError
from llmops.methods.quantize import packing
from llmops.methods.quantize.float_packing import pack_floats, pack_int8
from llmops.methods.quantize.floats import AnyWeight, FloatWeight
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models.arch import routers
from llmops.models.embeddings import BITS as EMBEDDING_BITS
from llmops.models.embeddings import PackedEmbedding, embedding_name, head_name, same_weight, with_group, without_group
from llmops.models.expert_names import expert_of
from llmops.models.experts import Experts, dense_experts, split_experts, stored_names
from llmops.models.formatted import FormattedLinear
from llmops.models.layouts import COMPRESSED, INTEGERS, LAYOUTS, as_stored, foreign_schemes, layout_of
from llmops.models.number_formats import FORMATS, activations_are_left, kind_of
from llmops.models.packed import PackedLinear
from llmops.models.schemes import LayerScheme, check_fused, packed_schemes, quantization_config, schemes_of
from llmops.ops.bitstream import pack_bits, words

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CODED", "PackedLinear", "PackedReader", "kernels", "load_quantized", "pack", "parts_of", "save_quantized"]

#: The layers whose weight is not dense.
CODED = (PackedLinear, FormattedLinear)


def save_quantized(model: PreTrainedModel, weights: Mapping[str, AnyWeight], folder: Path,
                   tokenizer: Any = None) -> None:
    """Write config.json, model.safetensors (sharded above 5 GB), generation config and, when given, the tokenizer.

    weights: what replaces each linear layer, by its full name; every other tensor is stored as it is, a tied one once.
    Raises LlmopsError when `weights` is empty, names something that is no linear layer of the model, or gives layers
    that servers run as one product different schemes.
    """
    from huggingface_hub import save_torch_state_dict

    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    embedding, shared = _embedding_and_head(model, weights)
    packed = {name: weight for name, weight in weights.items() if name not in (embedding, shared)}
    if not packed or not set(packed) <= linears:
        raise LlmopsError(f"weights name {sorted(set(packed) - linears)[:3] or 'nothing'}; expected linear layers of "
                          f"the model, at least one")
    schemes = packed_schemes(packed)
    check_fused(schemes)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    dense = {*(linears - set(weights)), *routers(model)}
    stored = stored_names(model)
    dense |= {stored.get(f"{name}.weight", "").removesuffix(".weight") for name in dense} - {""}
    config.quantization_config = quantization_config(schemes, ignore=sorted(dense))
    if embedding is not None:
        config.quantization_config = with_group(config.quantization_config, embedding, shared)
        config.tie_word_embeddings = shared is not None
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    state = _stored_state(model, packed, stored, {embedding, shared} - {None})
    if embedding is not None:
        state |= {f"{embedding}.weight": _codes(weights[embedding]).cpu(),
                  **{f"{name}.weight_scale": weights[name].scale.detach().cpu().clone().contiguous()
                     for name in (embedding, shared) if name is not None}}
    save_torch_state_dict(state, folder, max_shard_size="5GB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _embedding_and_head(model: PreTrainedModel, weights: Mapping[str, AnyWeight]) -> tuple[str | None, str | None]:
    """(full name of the embedding, of a head that shares its codes) where `weights` hold them."""
    if model.get_input_embeddings() is None or (name := embedding_name(model)) not in weights:
        return None, None
    head = head_name(model)
    return name, head if head in weights and same_weight(weights[name], weights[head]) else None


def _codes(weight: AnyWeight) -> Tensor:
    assert isinstance(weight, QuantizedWeight)  # an embedding is made of integers
    return weight.codes


def _stored_state(model: nn.Module, weights: Mapping[str, AnyWeight], names: Mapping[str, str],
                  apart: Container[str | None] = ()) -> dict[str, Tensor]:
    """names: what tensors are called in checkpoints, where that is something else (`experts.stored_names`); apart:
    modules whose weight is stored elsewhere."""
    state: dict[str, Tensor] = dense_experts(model, weights)
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        layer, _, last = name.rpartition(".")
        place = names.get(name, name)
        if last == "weight" and layer in apart:
            continue
        if last == "weight" and layer in weights:
            place = place.removesuffix(".weight")
            state |= {f"{place}.{part}": value.cpu() for part, value in parts_of(weights[layer]).items()}
            continue
        if expert_of(name) is not None and names:
            continue  # left dense: written with its neighbours
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and key in seen:
            continue  # tied: the first name holds it, and the model ties it again after loading
        seen.add(key)
        state[place] = tensor.detach().cpu().contiguous()
    return state


def parts_of(weight: AnyWeight) -> dict[str, Tensor]:
    """The tensors that a weight is stored as, by the last part of their name."""
    if isinstance(weight, FloatWeight):
        return pack_floats(weight)
    return pack_int8(weight) if weight.activation_bits == 8 else packing.pack(weight)


def pack(model: PreTrainedModel, weights: Mapping[str, AnyWeight], kernel: str = "auto") -> PreTrainedModel:
    """Put a layer of codes in the place of every layer that `weights` names, in place; the dense weights are let go.

    An embedding among them becomes a `PackedEmbedding`, which shares its codes with a head that has the same. Raises
    LlmopsError when a name is no linear layer of the model.
    """
    embedding, shared = _embedding_and_head(model, weights)
    for name, weight in weights.items():
        if name == embedding:
            continue
        linear = _submodule(model, name)
        if not isinstance(linear, nn.Linear):
            raise LlmopsError(f"{name} is {type(linear).__name__}; expected the name of a linear layer")
        bias = None if linear.bias is None else linear.bias.detach()
        _put(model, name, _layer(parts_of(weight), LayerScheme.of(weight), bias, kernel))
    if embedding is not None:
        _put_embedding(model, embedding, shared, _codes(weights[embedding]), weights[embedding].scale)
    return model


def _put_embedding(model: PreTrainedModel, name: str, head: str | None, codes: Tensor, scale: Tensor) -> None:
    """head: already packed, from the same codes."""
    made = PackedEmbedding(codes, scale, model.get_submodule(name))
    if head is not None:
        made.share(model.get_submodule(head))
    _put(model, name, made)


def _layer(parts: Mapping[str, Tensor], scheme: LayerScheme, bias: Tensor | None, kernel: str) -> nn.Module:
    if scheme.kind != "int":
        return FormattedLinear(parts, scheme.kind, bias=bias, kernel=kernel)
    return PackedLinear(parts, bits=scheme.bits, group_size=scheme.group_size, bias=bias, kernel=kernel)


def load_quantized(folder: Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu",
                   kernel: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder, ready to generate on its packed weights.

    dtype: of scales and of all that is not packed; "auto" as stored. kernel: as `llmops.ops.int_matmul.choose`.
    Raises ModelError when tensors are missing, left over, or do not fit the config.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    wanted = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if wanted is not None:
        config.dtype = wanted
    block = config.quantization_config
    block = block if isinstance(block, dict) else block.to_dict()
    tied = config.tie_word_embeddings
    if without_group(block)[1]:
        config.tie_word_embeddings = False  # packed modules have no weight that could be tied; codes are shared below
    with init_empty_weights(include_buffers=False):  # buffers (rotary frequencies) are computed, parameters are not
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    reader = PackedReader(folder, block, wanted, model.dtype)
    if any(expert_of(name) is not None for name in reader.layers()):
        split_experts(model)
        reader.rename({stored: name for name, stored in stored_names(model).items()})
    for name in reader.layers():
        _replace_layer(model, name, reader.parts(name), reader.schemes[name], reader.take(f"{name}.bias"), device,
                       kernel)
    _load_embedding(model, reader, device, kernel)
    _fill(model, reader)
    model.config.tie_word_embeddings = tied
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval()


class PackedReader:
    """The tensors of a folder by name, each read from disk when it is taken, each taken once; schemes: of its layers.

    block: its `quantization_config`. dtype: of all that is not packed, None as stored; model_dtype: what scales of a
    foreign layout are then given in, where that changes none of them (GPTQ and AWQ store float16 whatever the model).
    Raises ModelError for a layout that cannot be read.
    """

    def __init__(self, folder: Path, block: Mapping[str, Any], dtype: torch.dtype | None = None,
                 model_dtype: torch.dtype | None = None) -> None:
        from safetensors import safe_open

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no .safetensors file; expected model.safetensors")
        self.folder, self.dtype, self.scale_dtype = folder, dtype, dtype or model_dtype
        block, self.embedding = without_group(block)
        self.layout = layout_of(block)
        self._check_activations(block)
        handles: list[Any] = [safe_open(str(file), framework="pt") for file in files]
        self.stored: dict[str, str] = {}  # names that were changed -> as they are in the file
        self.left = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - no dict
        self.schemes: dict[str, LayerScheme] = (
            schemes_of(block, self.layers()) if self.layout in COMPRESSED
            else foreign_schemes(block, self.layers()))
        for name, scheme in self.schemes.items() if self.layout in COMPRESSED[:-1] else ():
            wanted = INTEGERS if scheme.kind == "int" else (FORMATS[scheme.kind],)
            if self.layout not in wanted:
                raise ModelError(f"{folder}: format {self.layout} in config.json, but {name} is {scheme}; expected "
                                 f"{' or '.join(wanted)}")

    def _check_activations(self, block: Mapping[str, Any]) -> None:
        groups = [] if self.layout not in COMPRESSED else (block.get("config_groups") or {}).values()
        if not any(activations_are_left(group, kind_of(group)) for group in groups):
            return
        if self.layout == "pack-quantized":
            raise ModelError(f"{self.folder}: packed weights made for quantized activations; expected activations left "
                             "in 16 bit: no input_activations in config_groups")
        warnings.warn(f"{self.folder}: made for activations that are quantized in a way that is not run here; they are "
                      "left as they are, the weights are the stored ones", stacklevel=4)

    def rename(self, names: Mapping[str, str]) -> None:
        """Tensors by other names from here on. names: {dense name as stored: name to go by}, its parts likewise."""
        for name in list(self.left):
            layer, _, part = name.rpartition(".")
            whole = names.get(f"{layer}.weight")
            known = names.get(name) or (whole and f"{whole.removesuffix('.weight')}.{part}")
            if known and known != name:
                self.left[known], self.stored[known] = self.left.pop(name), name
                if layer in self.schemes and whole:
                    self.schemes[whole.removesuffix(".weight")] = self.schemes.pop(layer)

    def layers(self) -> list[str]:
        marks = ("weight_packed", "weight_scale") if self.layout in COMPRESSED else (LAYOUTS[self.layout].mark,)
        return list(dict.fromkeys(layer for layer, _, last in (name.rpartition(".") for name in self.left)
                                  if last in marks and layer not in self.embedding))

    def _layout(self, layer: str) -> str:
        """Of one layer: compressed-tensors may mix them."""
        if self.layout not in COMPRESSED:
            return self.layout
        if self.schemes[layer].kind != "int":
            return self.schemes[layer].kind
        return "pack-quantized" if f"{layer}.weight_packed" in self.left else "int-quantized"

    def take(self, name: str, as_it_is: bool = False) -> Tensor | None:
        handle = self.left.pop(name, None)
        if handle is None:
            return None
        tensor: Tensor = handle.get_tensor(self.stored.get(name, name))
        kept = as_it_is or self.dtype is None or not tensor.is_floating_point() or tensor.element_size() == 1
        return tensor if kept else tensor.to(self.dtype)

    def parts(self, layer: str) -> dict[str, Tensor]:
        if f"{layer}.weight_g_idx" in self.left:
            raise ModelError(f"{layer} has a weight_g_idx (dynamic act-order); expected groups in column order")
        stored = self._layout(layer)
        layout = LAYOUTS[stored]
        exact = layout.read is not None  # float16 scales may not go through bfloat16
        read = {part: self.take(f"{layer}.{part}", exact or part.endswith("global_scale"))
                for part in (*layout.needed, *layout.optional)}
        missing = [part for part in layout.needed if read[part] is None]
        if missing:
            raise ModelError(f"{self.folder}: {layer} lacks {', '.join(missing)}; the folder is not whole")
        found = {part: tensor for part, tensor in read.items() if tensor is not None}
        return as_stored(found, stored, self.schemes[layer], layer, self.scale_dtype)


def _replace_layer(model: nn.Module, name: str, parts: Mapping[str, Tensor], scheme: LayerScheme,
                   bias: Tensor | None, device: str | torch.device, kernel: str) -> None:
    linear = _submodule(model, name)
    moved = {part: tensor if part == "weight_shape" else tensor.to(device) for part, tensor in parts.items()}
    if scheme.kind == "int":
        _check_packed(name, parts, scheme)
    layer = _layer(moved, scheme, None if bias is None else bias.to(device), kernel)
    shape = (int(layer.out_features), int(layer.in_features))
    if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != shape:
        raise ModelError(f"{name} is stored as {shape[0]} x {shape[1]}; the config describes {linear}")
    _put(model, name, layer)


def _check_packed(name: str, parts: Mapping[str, Tensor], scheme: LayerScheme) -> None:
    rows, columns = (int(n) for n in parts["weight_shape"].tolist())
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    wanted = (rows, words(columns, scheme.bits))
    if parts["weight_packed"].shape != wanted or parts["weight_scale"].shape != (rows, groups):
        raise ModelError(f"{name}: packed {tuple(parts['weight_packed'].shape)}, scale "
                         f"{tuple(parts['weight_scale'].shape)}; expected {wanted} and {(rows, groups)} at "
                         f"{scheme.bits} bits in groups of {scheme.group_size}")


def _load_embedding(model: PreTrainedModel, reader: PackedReader, device: str | torch.device, kernel: str) -> None:
    if not reader.embedding:
        return
    name, *heads = reader.embedding
    codes, scale = reader.take(f"{name}.weight"), reader.take(f"{name}.weight_scale")
    like = _submodule(model, name)
    if codes is None or scale is None or not isinstance(like, nn.Embedding) or codes.shape != like.weight.shape:
        raise ModelError(f"{reader.folder}: {name} is {None if codes is None else tuple(codes.shape)} with scales "
                         f"{None if scale is None else tuple(scale.shape)}; the config describes {like}")
    codes, scale = codes.to(device), scale.to(device)
    for head in heads:
        reader.take(f"{head}.weight_scale")  # the same once more
        parts = {"weight_packed": pack_bits(codes, EMBEDDING_BITS), "weight_scale": scale,
                 "weight_shape": torch.tensor(codes.shape)}
        _put(model, head, PackedLinear(parts, bits=EMBEDDING_BITS, group_size=-1, kernel=kernel,
                                       bias=reader.take(f"{head}.bias")))
    _put_embedding(model, name, heads[0] if heads else None, codes, scale)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _fill(model: PreTrainedModel, reader: PackedReader) -> None:
    """Every tensor that is not packed, into the parameter or buffer of its name; then ties; then a check for gaps."""
    for name in list(reader.left):
        parent, _, last = name.rpartition(".")
        module = _submodule(model, parent)
        if module is None:
            continue
        if isinstance(module, Experts):
            tensor = reader.take(name)
            assert tensor is not None
            module.fill(last, tensor)
        elif last in module._parameters:
            tensor = reader.take(name)
            assert tensor is not None
            if tensor.element_size() == 1:
                raise ModelError(f"{reader.folder}: {parent} lacks weight_scale: {name} holds codes ({tensor.dtype}); "
                                 "the folder is not whole")
            if tensor.shape != module._parameters[last].shape:
                raise ModelError(f"{name} is {tuple(tensor.shape)}; the config describes "
                                 f"{tuple(module._parameters[last].shape)}")
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        elif last in module._buffers and not isinstance(module, CODED):
            module._buffers[last] = reader.take(name)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if empty or reader.left:
        raise ModelError(f"{reader.folder}: missing {empty[:5]}, left over {list(reader.left)[:5]}; expected the "
                         f"tensors that {type(model).__name__} and its config describe")


def kernels(model: nn.Module) -> dict[str, int]:
    """How many layers run on which kernel: {"torch:int4pack": 56}. Empty for a model that is not quantized."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, CODED):
            counts[module.kernel] = counts.get(module.kernel, 0) + 1
    return counts

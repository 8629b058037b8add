"""GGUF, llama.cpp's single file: metadata, tokenizer with its chat template, and tensors in ggml's types.

Two of ggml's types are what a symmetric quantized weight is already, one float16 scale for 32 weights in a row of W:

    Q4_0   W = d (q - 8), q in 0..15        our 2-, 3- and 4-bit symmetric codes, exactly
    Q8_0   W = d q,       q in -128..127    any codes whose distance to their zero point stays below 128, exactly

as long as 32 divides the group and float16 holds the scale. `gguf` takes the smaller one that is exact, else F16 (the
dense weight, rounded to float16). `gguf-q8_0` and `gguf-q4_0` put every linear layer of the decoder into that type and
round again, with ggml's own rule, where it is not exact. Embeddings and head stay F16, norms and biases F32.

`gguf-q4_k` and `gguf-q6_k` do the same with the K-quants of `kquants.py`, always rounding again; `gguf-q4_k_m` is
llama.cpp's mixture of both, embedding and head included. A row that is no multiple of 256 takes the type that llama.cpp
falls back to, and the notes say which layers that were.

Only the families below, whose tensors llama.cpp names and whose attention it computes the same way, and byte-level BPE
tokenizers whose splitting rule llama.cpp has a name for: anything else would load and answer nonsense. Rows of q and k
of a Llama are reordered, because llama.cpp rotates neighbours where transformers rotates halves. Left out: Gemma,
mixtures of experts, scaled rotary frequencies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.formats.gguf_vocab import add_tokenizer
from llmops.formats.kquants import FALLBACK, KQUANTS, SUPER, mixture
from llmops.formats.source import Source, Written, activations_note, unpacked
from llmops.methods.quantize.floats import FloatWeight
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models.plain import gguf_logits

__all__ = ["read", "write", "write_f16", "write_q4_0", "write_q4_k", "write_q4_k_m", "write_q6_k", "write_q8_0"]

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> architecture
FILE, BLOCK = "model.gguf", 32
#: llama.cpp's numbers for what most tensors of a file are.
FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q4_K": 14, "Q4_K_M": 15, "Q6_K": 18}
MIXED = "Q4_K_M"
Array = NDArray[Any]


def write(source: Source, folder: Path, wanted: str = "auto") -> Written:
    """wanted: type of the decoder's linear layers, "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q4_K_M", or "auto".

    Raises LlmopsError for a family, a rotary scaling or a tokenizer that the file could not say.
    """
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    family = _family(source)
    writer = GGUFWriter(folder / FILE, FAMILIES[family])
    _add_metadata(writer, source)
    notes = _window(source)
    add_tokenizer(writer, source.folder, int(source.config["vocab_size"]))
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == FAMILIES[family])
    names = get_tensor_name_map(arch, int(source.config["num_hidden_layers"]))
    counts: Counter[str] = Counter()
    again: Counter[str] = Counter()  # of these, rounded on the way
    ends: Counter[str] = Counter()  # embedding and head

    def put(name: str, kind: str, data: Array) -> None:
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise LlmopsError(f"tensor {name} has no name in GGUF's {FAMILIES[family]}; expected a plain {family} "
                              "model")
        writer.add_tensor(place, data, raw_dtype=GGMLQuantizationType[kind])

    for name, parts in source.packed():
        weight = unpacked(parts, source.schemes[name], name)
        kind_wanted = _wanted(f"{name}.weight", wanted, source, packed=True)
        if isinstance(weight, FloatWeight):  # a type for 8-bit floats ggml has none, and its 4-bit ones lie otherwise
            dense = _rows(weight.dequantize(torch.float32), name, source)
            kind, data, exact = *_dense_tensor(dense, kind_wanted), False
        else:
            kind, data, exact = _packed_tensor(_reordered(weight, name, source), kind_wanted)
        again[kind] += not exact
        counts[kind] += 1
        put(f"{name}.weight", kind, data)
    for name, tensor in source.rest():
        kind, data = _dense_tensor(_rows(tensor, name, source), _wanted(name, wanted, source))
        if _is_linear(name):
            again[kind] += kind.startswith("Q")
            counts[kind] += 1
        elif tensor.dim() > 1:
            ends[kind] += 1
        put(name, kind, data)
    main = MIXED if wanted == MIXED else counts.most_common(1)[0][0] if counts else "F16"
    writer.add_file_type(FILE_TYPES[main])
    writer.add_quantization_version(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rounded = again.total()
    notes.append("linear layers: " + ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items()))
                 + (f", {rounded} of them rounded again" if rounded else ", codes and scales as they were"
                    if source.schemes else ""))
    if wanted == MIXED:
        notes.append("embedding and head: " + ", ".join(f"{count} in {kind}" for kind, count in sorted(ends.items())))
    fallen = sum(counts[kind] for kind in FALLBACK.values()) if wanted in (MIXED, *KQUANTS) else 0
    if fallen:
        notes.append(f"{fallen} linear layers have rows that are no multiple of {SUPER}: they took the type that "
                     f"llama.cpp falls back to ({', '.join(f'{b} for {a}' for a, b in FALLBACK.items())})")
    return Written([*notes, *activations_note(source)],
                   exact=rounded == again["F16"] and not source.rounds_activations)


write_f16, write_q8_0, write_q4_0 = (partial(write, wanted=kind) for kind in ("F16", "Q8_0", "Q4_0"))
write_q4_k, write_q6_k, write_q4_k_m = (partial(write, wanted=kind) for kind in ("Q4_K", "Q6_K", MIXED))


def _wanted(name: str, wanted: str, source: Source, packed: bool = False) -> str:
    """The type for one weight: what the mixture says, else `wanted` for linear layers, F16 for embedding and head."""
    if wanted == MIXED:
        return mixture(name, int(source.config["num_hidden_layers"]), bool(source.config.get("tie_word_embeddings")))
    return wanted if packed or _is_linear(name) else "F16"


def read(folder: Path, ids: Tensor, source: Source) -> tuple[str, Tensor]:
    """By transformers' own GGUF loader, which takes everything from the file but what it does not look for there."""
    described = source.folder if _overlooked(source) else None
    given = "" if described is None else " and the config of the source"
    return f"transformers with gguf{given}", gguf_logits(folder / FILE, ids, described)


def _overlooked(source: Source) -> bool:
    """Whether the file holds what the loader leaves: biases of a Llama, heads of a Qwen3 that are not 128 wide."""
    config, family = source.config, source.config["model_type"]
    biases = FAMILIES[family] == "llama" and (config.get("attention_bias") or config.get("mlp_bias"))
    return bool(biases or (family == "qwen3" and config.get("head_dim") != 128))


# -------------------------------------------------------------------------------------------------------- metadata


def _family(source: Source) -> str:
    family, rotary = str(source.config.get("model_type")), _rotary(source)
    if family not in FAMILIES:
        raise LlmopsError(f"a {family} model; GGUF is written for {', '.join(FAMILIES)}: use llama.cpp's converter on "
                          "the dense export")
    if rotary.get("rope_type", "default") != "default":
        raise LlmopsError(f"rotary frequencies scaled by {rotary['rope_type']!r}; GGUF is written for unscaled ones: "
                          "use llama.cpp's converter on the dense export")
    return family


def _rotary(source: Source) -> Mapping[str, Any]:
    found = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    return dict(found)


def _window(source: Source) -> list[str]:
    width = source.config.get("sliding_window")
    used = source.config.get("use_sliding_window", source.config["model_type"] == "mistral")
    return [f"the file has no sliding window: beyond {width} tokens attention sees more than the source's"
            ] if width and used else []


def _add_metadata(writer: Any, source: Source) -> None:
    config = source.config
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    width = int(config.get("head_dim") or hidden // heads)
    writer.add_name(source.folder.name)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(hidden)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(_rotary(source).get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))


# --------------------------------------------------------------------------------------------------------- tensors


def _packed_tensor(weight: QuantizedWeight, wanted: str) -> tuple[str, Array, bool]:
    """(type, its bytes, whether codes and scales are the very ones)."""
    fits = {"Q4_0": _q4_0(weight), "Q8_0": _q8_0(weight)}
    if wanted == "auto":
        kind = next((kind for kind, data in fits.items() if data is not None), "F16")
        data = fits.get(kind)
        return (kind, data, True) if data is not None else ("F16", _f16(weight), False)
    data = fits.get(wanted)
    if data is not None:
        return wanted, data, True
    return (wanted, _f16(weight), False) if wanted == "F16" else (*_again(_dense(weight), wanted), False)


def _blocks(weight: QuantizedWeight) -> tuple[Array, Array] | None:
    """(steps from zero (blocks, 32) int16, float16 scales (blocks, 1)), or None where blocks of 32 cannot say it."""
    rows, columns = weight.shape
    size = columns if weight.group_size == -1 else weight.group_size
    scale = weight.scale.to(torch.float16)
    if size % BLOCK or not torch.equal(scale.double(), weight.scale.double()):
        return None
    steps = weight.codes.to(torch.int16).view(rows, -1, size)
    if weight.zero_point is not None:
        steps = steps - weight.zero_point.to(torch.int16).unsqueeze(-1)
    scales = scale.repeat_interleave(size // BLOCK, dim=1).reshape(-1, 1)
    return steps.reshape(-1, BLOCK).numpy(), scales.numpy()


def _q8_0(weight: QuantizedWeight) -> Array | None:
    """(out, in / 32 * 34) bytes: for each block a float16 scale and 32 signed bytes."""
    found = _blocks(weight)
    if found is None or found[0].min() < -128 or found[0].max() > 127:
        return None
    steps, scales = found
    return np.concatenate([scales.view(np.uint8), steps.astype(np.int8).view(np.uint8)], 1).reshape(weight.shape[0], -1)


def _q4_0(weight: QuantizedWeight) -> Array | None:
    """(out, in / 32 * 18) bytes: a float16 scale and 16 bytes, byte i holding codes i (low) and i + 16 (high)."""
    found = _blocks(weight)
    if found is None or found[0].min() < -8 or found[0].max() > 7:
        return None
    steps, scales = found
    codes = (steps + 8).astype(np.uint8)
    pairs = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([scales.view(np.uint8), pairs], 1).reshape(weight.shape[0], -1)


def _dense_tensor(tensor: Tensor, wanted: str) -> tuple[str, Array]:
    if tensor.dim() == 1:
        return "F32", tensor.float().numpy()
    if wanted not in ("F16", "auto"):
        return _again(tensor, wanted)
    return "F16", tensor.float().numpy().astype(np.float16)


def _again(weight: Tensor, wanted: str) -> tuple[str, Array]:
    """Rounded by ggml's rule: for each block of 32 the scale that its largest weight asks for. K-quants by ours."""
    from gguf import GGMLQuantizationType, quants

    if wanted in KQUANTS and weight.shape[1] % SUPER == 0:
        return wanted, KQUANTS[wanted](weight)
    wanted = FALLBACK.get(wanted, wanted)
    if weight.shape[1] % BLOCK:
        return "F16", weight.float().numpy().astype(np.float16)
    return wanted, quants.quantize(weight.float().numpy(), GGMLQuantizationType[wanted])


def _f16(weight: QuantizedWeight) -> Array:
    dense: Array = _dense(weight).numpy().astype(np.float16)
    return dense


def _dense(weight: QuantizedWeight) -> Tensor:
    """(out, in) float32, which rounds nothing."""
    return replace(weight, scale=weight.scale.float()).dequantize()


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


# ----------------------------------------------------------------------------------------------- order of the rows


def _reordered(weight: QuantizedWeight, name: str, source: Source) -> QuantizedWeight:
    zero = weight.zero_point
    return QuantizedWeight(_rows(weight.codes, name, source), _rows(weight.scale, name, source),
                           None if zero is None else _rows(zero, name, source), weight.bits, weight.group_size)


def _rows(tensor: Tensor, name: str, source: Source) -> Tensor:
    """Rows (out, ...) of a Llama's q and k: of each head, i and i + half next to each other."""
    config = source.config
    parent = name.removesuffix(".weight").removesuffix(".bias")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")
             or config["num_attention_heads"]}.get(parent.rsplit(".", 1)[-1])
    if FAMILIES[str(config["model_type"])] != "llama" or heads is None:
        return tensor
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

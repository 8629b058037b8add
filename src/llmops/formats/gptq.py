"""GPTQ's layout: what GPTQModel, transformers, vLLM and SGLang call a GPTQ checkpoint, whatever chose the codes.

The layout is in `models/layouts.py`. Scales are float16 there, whatever the model: a scale that float16 cannot hold
exactly is rounded, and the notes say how many were. Asymmetric weights with a zero point of 0 go into the second
version of the layout (`checkpoint_format: gptq_v2`), because the first has no place for it.

Layers may differ. `bits`, `group_size` and `sym` say what most of them are; GPTQModel's `dynamic` maps a pattern of
layer names to what others are (`+:`), or says that they are dense (`-:`); the first that matches counts. A pattern
names the layers that servers fuse by all their names, that of the fused one too, for which vLLM asks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.formats.decode import decode_gptq
from llmops.formats.source import Source, Written, write_folder
from llmops.models.layouts import to_gptq, zeros_fit_v1
from llmops.models.plain import plain_logits, state_logits
from llmops.models.schemes import LayerScheme, fused_groups

__all__ = ["differing", "read", "rounded_scales", "write"]

#: What servers call layers that they run as one.
_FUSED_NAMES = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


def write(source: Source, folder: Path) -> Written:
    """Raises LlmopsError for a dense model, other bits than 2, 3, 4 and 8, and layers that do not fill whole words."""
    source.check_integers("GPTQ")
    layers = dict(source.packed())
    zeros = [(parts["weight_zero_point"], source.schemes[name].bits, int(parts["weight_shape"][0]))
             for name, parts in layers.items() if "weight_zero_point" in parts]
    v2 = not all(zeros_fit_v1(zero, bits, rows) for zero, bits, rows in zeros)
    state = dict(source.rest())
    for name, parts in layers.items():
        made = to_gptq(parts, source.schemes[name], name, v2=v2)
        state |= {f"{name}.{part}": tensor for part, tensor in made.items()}
    usual = Counter(source.schemes.values()).most_common(1)[0][0]
    dynamic = differing(source.schemes, usual, _left_dense(source))
    block = {"quant_method": "gptq", **_said(usual), "desc_act": False, "lm_head": "lm_head" in layers,
             "checkpoint_format": "gptq_v2" if v2 else "gptq", "pack_dtype": "int32",
             **({"dynamic": dynamic} if dynamic else {})}
    write_folder(source, folder, state, block)
    (folder / "quantize_config.json").write_text(json.dumps(block, indent=2) + "\n", encoding="utf-8")
    notes = rounded_scales(layers.values())
    if len(set(source.schemes.values())) > 1:
        notes.append("layers differ, which `dynamic` in config.json says: GPTQModel reads it, transformers (through "
                     "optimum) takes one scheme for all")
    if v2:
        notes.append("a zero point is 0, which the first layout cannot hold: written as gptq_v2")
    return Written(notes)


def differing(schemes: Mapping[str, LayerScheme], usual: LayerScheme,
              dense: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The `dynamic` of layers that are not stored as `usual`: patterns, each with what it overrides."""
    found: dict[str, dict[str, Any]] = {f"-:{re.escape(name)}$": {} for name in dense}
    for names in fused_groups(schemes):
        scheme = schemes[names[0]]
        if scheme != usual:
            parent, _, last = names[0].rpartition(".")
            lasts = [name.rpartition(".")[2] for name in names]
            lasts += [fused for parts, fused in _FUSED_NAMES.items() if last in parts]
            found[f"+:{re.escape(parent + '.' if parent else '')}(?:{'|'.join(lasts)})$"] = _said(scheme)
    return found


def _said(scheme: LayerScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def _left_dense(source: Source) -> list[str]:
    """Full names of the layers inside the blocks that compressed-tensors' config leaves dense."""
    listed = (source.config.get("quantization_config") or {}).get("ignore") or []
    return [name for name in listed if "." in name and not name.startswith("re:")]


def rounded_scales(layers: Iterable[Mapping[str, Tensor]]) -> list[str]:
    """A note when scales do not fit float16 exactly. Raises LlmopsError when one is too large or vanishes."""
    scales = [parts["weight_scale"] for parts in layers]
    moved = [scale.to(torch.float16) for scale in scales]
    if not all(bool((half.isfinite() & (half != 0)).all()) for half in moved):
        raise LlmopsError("a scale lies outside the range of float16, which is what this layout stores scales in; "
                          "expected scales from 6e-8 to 65504: export to compressed-tensors, which keeps their type")
    changed = sum(int((half.double() != scale.double()).sum()) for half, scale in zip(moved, scales, strict=True))
    total = sum(scale.numel() for scale in scales)
    return [f"{changed:,} of {total:,} scales rounded to float16"] if changed else []


def read(folder: Path, ids: Tensor, source: Source) -> tuple[str, Tensor]:
    """By transformers with GPTQModel where that is installed and all layers alike, else by a decoder of the published
    layout."""
    block = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if find_spec("gptqmodel") is not None and not block.get("dynamic"):
        return "transformers with gptqmodel", plain_logits(folder, ids)
    return "numpy decoder of the published layout, then transformers", state_logits(folder, decode_gptq(folder), ids)

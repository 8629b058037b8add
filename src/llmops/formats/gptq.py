"""GPTQ's layout: what GPTQModel, transformers, vLLM and SGLang call a GPTQ checkpoint, whatever chose the codes.

The layout is in `models/layouts.py`. Scales are float16 there, whatever the model: a scale that float16 cannot hold
exactly is rounded, and the notes say how many were. Asymmetric weights with a zero point of 0 go into the second
version of the layout (`checkpoint_format: gptq_v2`), because the first has no place for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from llmops.errors import LlmopsError
from llmops.formats.decode import decode_gptq
from llmops.formats.source import Source, Written, write_folder
from llmops.models.layouts import to_gptq, zeros_fit_v1
from llmops.models.plain import plain_logits, state_logits

__all__ = ["read", "rounded_scales", "write"]


def write(source: Source, folder: Path) -> Written:
    """Raises LlmopsError for a dense model, mixed schemes, other bits than 2, 3, 4 and 8, and layers that do not fill
    whole words."""
    scheme = source.one_scheme("GPTQ")
    bits, group_size = scheme.bits, scheme.group_size
    layers = dict(source.packed())
    zeros = [(parts["weight_zero_point"], int(parts["weight_shape"][0])) for parts in layers.values()
             if "weight_zero_point" in parts]
    v2 = not all(zeros_fit_v1(zero, bits, rows) for zero, rows in zeros)
    state = dict(source.rest())
    for name, parts in layers.items():
        made = to_gptq(parts, scheme, name, v2=v2)
        state |= {f"{name}.{part}": tensor for part, tensor in made.items()}
    block = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": not zeros, "desc_act": False,
             "lm_head": "lm_head" in layers, "checkpoint_format": "gptq_v2" if v2 else "gptq", "pack_dtype": "int32"}
    write_folder(source, folder, state, block)
    (folder / "quantize_config.json").write_text(json.dumps(block, indent=2) + "\n", encoding="utf-8")
    notes = rounded_scales(layers.values())
    if v2:
        notes.append("a zero point is 0, which the first layout cannot hold: written as gptq_v2")
    return Written(notes)


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
    """By transformers with GPTQModel where that is installed, else by a decoder of the published layout."""
    if find_spec("gptqmodel") is not None:
        return "transformers with gptqmodel", plain_logits(folder, ids)
    return "numpy decoder of the published layout, then transformers", state_logits(folder, decode_gptq(folder), ids)

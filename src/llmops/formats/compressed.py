"""compressed-tensors: what quantized variants are stored as; GPTQ and AWQ layouts are moved into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmops.formats.source import Source, Written, write_folder
from llmops.models.embeddings import without_group
from llmops.models.plain import plain_logits
from llmops.models.schemes import LayerScheme, quantization_config
from llmops.ops.bitstream import pack_bits

__all__ = ["read", "write"]


def write(source: Source, folder: Path) -> Written:
    """Raises LlmopsError for a dense model."""
    source.check_packed()
    layers = dict(source.packed())
    schemes = _stored_schemes(source.schemes, layers)
    state = dict(source.rest())
    for name, parts in layers.items():
        if not schemes[name].symmetric and "weight_zero_point" not in parts:
            rows, groups = parts["weight_scale"].shape
            middle = torch.zeros(groups, rows, dtype=torch.int8)
            parts["weight_zero_point"] = pack_bits(middle, schemes[name].bits).t().contiguous()
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    dense = [name.removesuffix(".weight") for name, tensor in state.items()
             if name.endswith(".weight") and tensor.dim() == 2 and "embed" not in name
             and name.removesuffix(".weight") not in layers]
    ignore = sorted({*dense, *_ignored(source)})
    write_folder(source, folder, state, quantization_config(schemes, ignore))
    return Written()


def _stored_schemes(schemes: Mapping[str, LayerScheme],
                    layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, LayerScheme]:
    """What is written: layers of one scheme are symmetric where none of them has zero points, whatever the source's
    config calls them."""
    with_zeros = {schemes[name] for name, parts in layers.items() if "weight_zero_point" in parts}
    return {name: replace(scheme, symmetric=scheme not in with_zeros) for name, scheme in schemes.items()}


def _ignored(source: Source) -> list[str]:
    """Layers that the source names as dense; a tied head is one, although no tensor has its name."""
    named = source.config["quantization_config"].get("ignore")
    shared = without_group(source.config["quantization_config"])[1][1:]  # dense again, as the embedding is
    return [*named, *shared] if named is not None else ["lm_head"]


def read(folder: Path, ids: Tensor, source: Source) -> tuple[str, Tensor]:
    """4-bit floats in bfloat16: compressed-tensors 0.20 decompresses them to that, whatever the model's type."""
    if any(scheme.kind in ("mxfp4", "nvfp4") for scheme in source.schemes.values()):
        return "transformers with compressed-tensors, in bfloat16", plain_logits(folder, ids, torch.bfloat16)
    return "transformers with compressed-tensors", plain_logits(folder, ids)

"""compressed-tensors ``pack-quantized``: what quantized variants are stored as; other layouts are moved into it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llmops.formats.source import Source, Written, write_folder
from llmops.models.plain import plain_logits
from llmops.models.quantized import quantization_config
from llmops.ops.bitstream import pack_bits

__all__ = ["read", "write"]


def write(source: Source, folder: Path) -> Written:
    """Raises LlmopsError for a dense model."""
    bits, group_size, _ = source.whole
    layers = dict(source.packed())
    symmetric = not any("weight_zero_point" in parts for parts in layers.values())
    state = dict(source.rest())
    for name, parts in layers.items():
        if not symmetric and "weight_zero_point" not in parts:
            rows, groups = parts["weight_scale"].shape
            middle = torch.zeros(groups, rows, dtype=torch.int8)
            parts["weight_zero_point"] = pack_bits(middle, bits).t().contiguous()
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    dense = [name.removesuffix(".weight") for name, tensor in state.items()
             if name.endswith(".weight") and tensor.dim() == 2 and "embed" not in name]
    ignore = sorted({*dense, *_ignored(source)})
    write_folder(source, folder, state, quantization_config(bits=bits, group_size=group_size, symmetric=symmetric,
                                                            ignore=ignore))
    return Written()


def _ignored(source: Source) -> list[str]:
    """Layers that the source names as dense; a tied head is one, although no tensor has its name."""
    named = source.config["quantization_config"].get("ignore")
    return list(named) if named is not None else ["lm_head"]


def read(folder: Path, ids: Tensor, source: Source) -> tuple[str, Tensor]:
    return "transformers with compressed-tensors", plain_logits(folder, ids)

"""AWQ's layout (gemm), 4 bits: what transformers, vLLM and SGLang call an AWQ checkpoint, whatever chose the codes.

The layout is in `models/layouts.py`. Symmetric weights are stored with zero points of 8, and `zero_point` is true
either way, because readers of this layout always subtract one. Scales are float16, as in GPTQ's.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from llmops.formats.decode import decode_awq
from llmops.formats.gptq import rounded_scales
from llmops.formats.source import Source, Written, write_folder
from llmops.models.layouts import to_awq
from llmops.models.plain import plain_logits, state_logits

__all__ = ["read", "write"]


def write(source: Source, folder: Path) -> Written:
    """Raises LlmopsError for a dense model, mixed schemes, other bits than 4, and outputs that are no multiple of 8."""
    scheme = source.one_scheme("AWQ")
    layers = dict(source.packed())
    state = dict(source.rest())
    for name, parts in layers.items():
        state |= {f"{name}.{part}": tensor for part, tensor in to_awq(parts, scheme, name).items()}
    dense = sorted(name.removesuffix(".weight") for name, tensor in state.items()
                   if name.endswith(".weight") and tensor.dim() == 2 and "embed" not in name)
    write_folder(source, folder, state, {
        "quant_method": "awq", "bits": scheme.bits, "group_size": scheme.group_size, "zero_point": True,
        "version": "gemm", "modules_to_not_convert": dense or ["lm_head"]})
    return Written(rounded_scales(layers.values()))


def read(folder: Path, ids: Tensor, source: Source) -> tuple[str, Tensor]:
    """By transformers with GPTQModel (which reads AWQ too) where it is installed, else by a decoder of the layout."""
    if find_spec("gptqmodel") is not None:
        return "transformers with gptqmodel", plain_logits(folder, ids)
    return "numpy decoder of the published layout, then transformers", state_logits(folder, decode_awq(folder), ids)

"""What ONNX and OpenVINO share: the variant as a function from token ids to logits, in dense float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmops.formats.source import Source
from llmops.models.kv_cache import detach
from llmops.models.load import load
from llmops.models.quantized import CODED

__all__ = ["Logits", "opened"]


class Logits(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy, so its classes are Any
    """(B, T) token ids -> (B, T, V) logits. No cache of keys and values goes in or out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def opened(source: Source) -> tuple[Logits, Tensor]:
    """The function and an example of its input, packed weights multiplied out in float32, which rounds nothing."""
    model, tokenizer = load(source.folder, dtype="float32", device="cpu", kernel="reference")
    detach(model)
    for name, packed in list(model.named_modules()):
        if isinstance(packed, CODED):
            layer = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
            layer.weight, layer.bias = nn.Parameter(packed.dequantized()), packed.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
    model.config._attn_implementation = "eager"  # spelled out in plain products, which every converter knows
    return Logits(model).eval(), torch.arange(10)[None] % len(tokenizer)

"""LoRA on a packed base: PEFT's own layer around a `PackedLinear`, whose codes nobody touches.

PEFT knows linear layers by their class, so it is told of this one (`CUSTOM`), both when adapters are made and when a
folder of them is loaded. The folder is an ordinary PEFT one: its `target_modules` are names, and any program that reads
the base (plain transformers reads compressed-tensors) can put the adapter on it.

An adapter apart is merged by writing its base out in 16 bits (`dense`), never by rounding the sum again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from llmops.errors import ModelError
from llmops.methods.finetune.lora import NAME, adapted_weight, adapters
from llmops.models.packed import PackedLinear

__all__ = ["CUSTOM", "PackedLora", "dense", "targets_of"]


class PackedLora(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer: y = base(x) + s B A x, the base in integers."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return int(module.in_features), int(module.out_features)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain and rank-stabilized LoRA alone: the others look at the weight itself in every pass."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ModelError("an adapter cannot be folded into packed integers; expected it to stay apart, or its base "
                         "written out in 16 bits (llmops.models.load.merged)")


#: What PEFT's `LoraConfig._register_custom_module` takes.
CUSTOM: dict[type[nn.Module], type[nn.Module]] = {PackedLinear: PackedLora}


def targets_of(model: Any, targets: str | Sequence[str]) -> list[str]:
    """Names for PEFT, which finds no packed layer by itself: ends of the names of all linear layers but the head."""
    if not isinstance(targets, str):
        return list(targets)
    head = model.get_output_embeddings()
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                   if isinstance(module, nn.Linear | PackedLinear) and module is not head})


def dense(adapted: Any) -> Any:
    """The plain model in the type it computes in: packed layers written out, adapters folded in; taken apart for it."""
    held = adapters(adapted)
    plain = adapted.unload()
    dtype = plain.dtype
    for name, layer in [(name, module) for name, module in plain.named_modules() if isinstance(module, PackedLinear)]:
        W: Tensor = layer.dequantized().float()
        if name in held:
            W = _folded(W, held.pop(name))
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(W.to(dtype))
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().to(dtype))
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, linear)
    with torch.no_grad():
        for name, layer in held.items():  # layers that were left in 16 bits
            weight = plain.get_submodule(name).weight
            weight.copy_(_folded(weight.float(), layer))
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    return plain


def _folded(W: Tensor, layer: Any) -> Tensor:
    pair = layer.lora_A[NAME].weight.detach().to(W), layer.lora_B[NAME].weight.detach().to(W)
    return adapted_weight(W, *pair, layer.scaling[NAME])

"""LoRA: low-rank adapters (Hu et al. 2021, arXiv 2106.09685), through PEFT, with the zeros of a pruned parent kept.

    h = W x + (alpha / r) B A x              A: (r, in), random; B: (out, r), zero, so that training starts at W

PEFT holds the adapters; what is ours is the sparse case. A pruned W plus a dense B A is dense again: the zeros, and
with them everything pruning was for, are gone after the merge. Here the product is masked while it is trained,

    h = W x + (alpha / r) (M * B A) x        M = (W != 0)

so what is trained is exactly what is merged. Cost: B A is formed, (out, in), once per layer and forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["add_lora", "lora_delta", "masked_lora_linear", "merge_lora", "zero_masks"]


def lora_delta(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """(out, in) = scaling * B A. A: (r, in); B: (out, r)."""
    return scaling * (B @ A)


def masked_lora_linear(x: Tensor, A: Tensor, B: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """What a masked adapter adds: scaling * x (M * B A)^T. x: (..., in); mask: (out, in) of 0 and 1 -> (..., out)."""
    return F.linear(x, lora_delta(A, B, scaling) * mask)


def zero_masks(model: nn.Module) -> dict[str, Tensor]:
    """{name: (out, in) bool, True where the weight is not zero} of every linear layer that has zeros."""
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: weight != 0 for name, weight in linear.items() if bool((weight == 0).any())}


def add_lora(model: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0,
             targets: str | Sequence[str] = "all-linear", seed: int = 0, keep_zeros: bool = False) -> Any:
    """The model with adapters on its linear layers, everything else frozen (a `peft.PeftModel`).

    targets: "all-linear" (PEFT leaves the output head out) or names. keep_zeros: train M * B A (see above).
    Raises ValueError when no layer has such a name.
    """
    torch.manual_seed(seed)  # A is random
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", bias="none",
                             target_modules=targets if isinstance(targets, str) else list(targets))
    adapted = peft.get_peft_model(model, config)
    if keep_zeros:
        for layer in _adapters(adapted):
            _mask_forward(layer)
    return adapted


def merge_lora(adapted: Any) -> nn.Module:
    """The plain model with the adapters folded into its weights: W + (alpha / r) B A, times M where zeros are kept."""
    masks = {id(layer.get_base_layer()): layer.zero_mask for layer in _adapters(adapted) if hasattr(layer, "zero_mask")}
    model: nn.Module = adapted.merge_and_unload()
    with torch.no_grad():
        for module in model.modules():
            if id(module) in masks:
                module.weight.mul_(masks[id(module)])
    return model


def _adapters(adapted: nn.Module) -> Iterator[Any]:
    return (module for module in adapted.modules() if isinstance(module, LoraLayer) and hasattr(module, "lora_A"))


def _mask_forward(layer: Any) -> None:
    layer.zero_mask = layer.get_base_layer().weight != 0

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        dropped = self.lora_dropout[name](x).to(A.dtype)
        added = masked_lora_linear(dropped, A, B, self.zero_mask, self.scaling[name])
        result: Tensor = self.base_layer(x)
        return result + added.to(result.dtype)

    layer.forward = MethodType(forward, layer)

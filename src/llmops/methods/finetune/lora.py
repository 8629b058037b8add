"""LoRA and its kin: low-rank adapters on frozen linear layers, through PEFT, with the zeros of a pruned parent kept.

    LoRA    h = W x + s B A x     A: (r, in), random; B: (out, r), zero; s = alpha / r    Hu et al. 2021, 2106.09685
    rsLoRA  s = alpha / sqrt(r): what the adapter adds no longer shrinks with the rank   Kalajdzievski 2023, 2312.03732
    DoRA    h = m (V / ||V||) x,  V = W + s B A, the norm over each row of V, m trained  Liu et al. 2024, 2402.09353
    LoRA+   the learning rate of B is `ratio` times that of A                            Hayou et al. 2024, 2402.12354

Where the adapters start (PiSSA, LoftQ) is in `starts.py`. PEFT holds the adapters; what is ours is the sparse case. A
pruned W plus a dense B A is dense again: the zeros, and with them everything pruning was for, are gone after the merge.
Here the product is masked while it is trained,

    h = W x + s (M * B A) x        M = (W != 0)

so what is trained is exactly what is merged. Cost: B A is formed, (out, in), once per layer and forward pass. DoRA
forms it too. Difference to the DoRA paper: none; PEFT keeps ||V|| out of the gradient, as its section 4.3 has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmops.errors import LlmopsError
from llmops.methods.finetune.peft_library import is_lora_layer, library

__all__ = ["adapted_weight", "adapters", "add_lora", "lora_delta", "lora_plus_scale", "masked_lora_linear",
           "merge_lora", "scaling_of", "set_adapters", "zero_masks"]

NAME = "default"  # PEFT's name of the one adapter there is


def scaling_of(rank: int, alpha: float, rslora: bool = False) -> float:
    """The factor s on B A."""
    return alpha / rank**0.5 if rslora else alpha / rank


def lora_delta(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """(out, in) = scaling * B A. A: (r, in); B: (out, r)."""
    return scaling * (B @ A)


def adapted_weight(W: Tensor, A: Tensor, B: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """The weight that a layer with its adapter multiplies by. W: (out, in); magnitude: (out,), DoRA's m, or None."""
    V = W + lora_delta(A, B, scaling)
    return V if magnitude is None else (magnitude / V.norm(dim=1)).unsqueeze(1) * V


def lora_plus_scale(ratio: float) -> Callable[[str], float]:
    """Parameter name -> factor on the learning rate: `ratio` for B, 1 for everything else (Hayou et al. 2024, 4.1)."""
    return lambda name: ratio if ".lora_B." in f".{name}." else 1.0


def masked_lora_linear(x: Tensor, A: Tensor, B: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """What a masked adapter adds: scaling * x (M * B A)^T. x: (..., in); mask: (out, in) of 0 and 1 -> (..., out)."""
    return F.linear(x, lora_delta(A, B, scaling) * mask)


def zero_masks(model: nn.Module) -> dict[str, Tensor]:
    """{name: (out, in) bool, True where the weight is not zero} of every linear layer that has zeros."""
    linear = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: weight != 0 for name, weight in linear.items() if bool((weight == 0).any())}


def add_lora(model: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0,
             targets: str | Sequence[str] = "all-linear", seed: int = 0, keep_zeros: bool = False,
             rslora: bool = False, dora: bool = False,
             custom: Mapping[type[nn.Module], type[nn.Module]] | None = None) -> Any:
    """The model with float32 adapters on its linear layers, everything else frozen (a `peft.PeftModel`).

    targets: "all-linear" (PEFT leaves the output head out) or names. keep_zeros: train M * B A (see above). custom:
    kinds of layers that PEFT does not know, each with PEFT's layer for it. Raises ValueError when no layer has such a
    name, LlmopsError for keep_zeros with DoRA, whose rows are rescaled as a whole.
    """
    if keep_zeros and dora:
        raise LlmopsError("given DoRA on a pruned model; expected plain LoRA or rsLoRA there: leave dora out")
    torch.manual_seed(seed)  # A is random
    peft = library()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", bias="none",
                             use_rslora=rslora, use_dora=dora,
                             target_modules=targets if isinstance(targets, str) else list(targets))
    if custom:
        config._register_custom_module(dict(custom))
    adapted = peft.get_peft_model(model, config)
    if keep_zeros:
        for layer in adapters(adapted).values():
            _mask_forward(layer)
    return adapted


def adapters(adapted: nn.Module) -> dict[str, Any]:
    """{name in the plain model: PEFT's layer} of every linear layer with an adapter."""
    return {name.removeprefix("base_model.model."): module for name, module in _adapters(adapted)}


def set_adapters(adapted: nn.Module, starts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Let the adapters start at the given (A, B), by layer name. DoRA's magnitudes follow: ||W + s B A|| of each row.

    The base weights are left as they are.
    """
    from peft.utils.integrations import dequantize_module_weight

    layers = adapters(adapted)
    with torch.no_grad():
        for name, (A, B) in starts.items():
            layer = layers[name]
            layer.lora_A[NAME].weight.copy_(A)
            layer.lora_B[NAME].weight.copy_(B)
            if NAME in layer.lora_magnitude_vector:
                A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
                W = dequantize_module_weight(layer.get_base_layer()).to(A.dtype)
                layer.lora_magnitude_vector[NAME].weight.copy_(
                    adapted_weight(W, A, B, layer.scaling[NAME]).norm(dim=1))


def merge_lora(adapted: Any) -> nn.Module:
    """The plain model with the adapters folded into its weights: W + s B A, times M where zeros are kept."""
    masks = {id(layer.get_base_layer()): layer.zero_mask for layer in adapters(adapted).values()
             if hasattr(layer, "zero_mask")}
    model: nn.Module = adapted.merge_and_unload()
    with torch.no_grad():
        for module in model.modules():
            if id(module) in masks:
                module.weight.mul_(masks[id(module)])
    return model


def _adapters(adapted: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in adapted.named_modules()
            if is_lora_layer(module) and NAME in module.lora_A)


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

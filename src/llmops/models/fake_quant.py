"""A packed model made trainable: latent float weights that the forward pass sees quantized, and back to packed ones.

    soften   PackedLinear -> FakeQuantLinear: the parent's codes, scales and zero points, layer by layer as they are
    adapt    adapters on such layers: what is quantized is W + s B A, so what is trained is what is merged
    harden   FakeQuantLinear -> nn.Linear with the values of its codes, and the codes to store

The arithmetic is `llmops.methods.quantize.qat`. Every layer keeps the scheme that it came with: a model whose layers
differ in bits or groups is trained as it is. The latent weights begin at the parent's values exactly, so the first
forward pass is the parent's. A pruned weight is held at zero by a mask, in the forward pass and so in the gradient.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmops.errors import ModelError
from llmops.methods.finetune.lora import NAME, adapters, lora_delta
from llmops.methods.quantize import packing
from llmops.methods.quantize.qat import fake_quantize, latent_start, learned_scale, settle
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models.packed import PackedLinear

__all__ = ["FakeQuantLinear", "adapt", "fake_quantized", "fold_adapters", "harden", "is_packed", "packed_layers",
           "refuse_unknown", "same_but", "soften"]


class FakeQuantLinear(nn.Linear):  # type: ignore[misc]
    """y = x What.T + bias, with What = `fake_quantize` of the latent weight. x: (..., in); y: (..., out).

    weight: (out, in) float32, latent, with the codes of `start` at first; near, draw: as `latent_start` has them.
    keep: (out, in) bool, false where a weight stays zero, or None. log_scale: (out, groups), t of s0 exp(t), frozen at
    first.
    """

    def __init__(self, start: QuantizedWeight, bias: Tensor | None, keep: Tensor | None = None,
                 near: Tensor | None = None, draw: torch.Generator | None = None) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.out_features, self.in_features = start.shape
        self.bits, self.group_size, self.stored = start.bits, start.group_size, start.scale.dtype
        self.weight = nn.Parameter(latent_start(start, near, draw))
        self.bias = None if bias is None else nn.Parameter(bias.float())
        self.log_scale = nn.Parameter(torch.zeros_like(start.scale, dtype=torch.float32), requires_grad=False)
        self.register_buffer("scale", start.scale.float(), persistent=False)
        self.register_buffer("zero_point", start.zero_point, persistent=False)
        self.register_buffer("keep", keep, persistent=False)

    def latent(self, added: Tensor | None = None) -> Tensor:
        """(out, in): what is rounded, the weight and what an adapter adds to it, with the zeros that stay."""
        W: Tensor = self.weight if added is None else self.weight + added
        return W if self.keep is None else W * self.keep

    def seen(self, added: Tensor | None = None) -> Tensor:
        """(out, in): the weight that the forward pass multiplies by."""
        return fake_quantize(self.latent(added), learned_scale(self.scale, self.log_scale), self.zero_point,
                             bits=self.bits, group_size=self.group_size, dtype=self.stored)

    def settled(self) -> QuantizedWeight:
        """The codes of the weight as it is now, with no adapter."""
        return settle(self.latent(), learned_scale(self.scale, self.log_scale), self.zero_point, bits=self.bits,
                      group_size=self.group_size, dtype=self.stored)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.seen(), self.bias)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """{name: layer} of the layers that lie in integers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def fake_quantized(model: nn.Module) -> list[FakeQuantLinear]:
    """The layers that `soften` made."""
    return [module for module in model.modules() if isinstance(module, FakeQuantLinear)]


def is_packed(model: nn.Module) -> bool:
    """Whether a model has layers of packed numbers, of whatever format."""
    return any(hasattr(module, "packed_tensors") for module in model.modules())


def refuse_unknown(model: nn.Module) -> None:
    """Raises ModelError for packed layers that are no weight-only integers, naming one."""
    for name, module in model.named_modules():
        if hasattr(module, "packed_tensors") and type(module) is not PackedLinear:
            raise ModelError(f"{name} is a {type(module).__name__}; expected integer weights with activations left in "
                             "16 bit (w2a16 to w8a16), the formats whose rounding can be trained: fine-tune the "
                             "variant before it and quantize the result")


def soften(model: nn.Module, *, keep: Mapping[str, Tensor], near: Mapping[str, Tensor],
           seed: int = 0) -> dict[str, FakeQuantLinear]:
    """Put a `FakeQuantLinear` in the place of every packed layer, in place. Returns them by name.

    keep: masks by layer name, true where a weight may be other than zero; near: what was quantized, by layer name; both
    may lack layers. seed: of where latent weights begin that are near nothing. Raises ModelError for formats it cannot
    train, and for a mask that the codes do not keep (the weights were rotated or scaled after they were pruned).
    """
    refuse_unknown(model)
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in packed_layers(model).items():
        start = packing.unpack(layer.stored_tensors(), bits=layer.bits, group_size=layer.group_size, name=name)
        mask = keep.get(name)
        if mask is not None:
            mask = mask.to(start.codes.device)
            if bool((start.dequantize()[~mask] != 0).any()):
                raise ModelError(f"{name} has values where its pruned ancestor has zeros; expected a quantization that "
                                 "keeps them: quantize without rotation, or train before it")
        bias = None if layer.bias is None else layer.bias.detach()
        made[name] = FakeQuantLinear(start, bias, mask, near.get(name), draw)
        _put(model, name, made[name])
    return made


def same_but(model: nn.Module, other: nn.Module, layers: Container[str]) -> bool:
    """Whether two models have the same parameters but for the weights of `layers`.

    After a quantization that folds factors or rotations into its neighbours they have not, and weights of the one mean
    nothing for the other.
    """
    mine, theirs = (dict(each.named_parameters()) for each in (model, other))
    rest = {name for name in theirs if name.rpartition(".")[0] not in layers or not name.endswith(".weight")}
    return rest == set(mine) and all(
        mine[name].shape == theirs[name].shape and torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in rest)


def adapt(adapted: nn.Module) -> list[FakeQuantLinear]:
    """Let the adapters on fake-quantized layers be seen quantized with their weight: What = Q(W + s B A), with DoRA
    Q(m V / ||V||) of V = W + s B A.

    adapted: of `add_lora` without dropout. Returns these layers.
    """
    found = [layer for layer in adapters(adapted).values() if isinstance(layer.get_base_layer(), FakeQuantLinear)]
    for layer in found:
        layer.forward = MethodType(_adapted_forward, layer)
        if hasattr(layer, "zero_mask"):  # of the values that rounding made zero; what stays zero is the layer's own
            del layer.zero_mask
    return [layer.get_base_layer() for layer in found]


def fold_adapters(adapted: nn.Module) -> None:
    """What adapters make of the latent weights into them, in place; merging adds nothing to them afterwards: B is zero,
    and DoRA is over."""
    with torch.no_grad():
        for layer in adapters(adapted).values():
            base = layer.get_base_layer()
            if isinstance(base, FakeQuantLinear):
                base.weight.copy_(base.latent(_delta(layer)))
                layer.lora_B[NAME].weight.zero_()
                layer.lora_variant.pop(NAME, None)


def harden(model: nn.Module, storage: torch.dtype) -> dict[str, QuantizedWeight]:
    """Put an ordinary linear layer with the values of its codes in the place of every fake-quantized one, in place.

    The whole model goes to `storage`, as it will be stored. Returns the codes by layer name. Raises ModelError for a
    weight that is not finite.
    """
    weights = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}
    settled = {}
    for name, layer in weights.items():
        if not bool(torch.isfinite(layer.weight).all() & torch.isfinite(layer.log_scale).all()):
            raise ModelError(f"{name}: the trained weight holds NaN or infinity; expected finite values (was training "
                             "stable?): lower the learning rate")
        settled[name] = layer.settled()
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(settled[name].dequantize(), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        _put(model, name, dense)
    for parameter in model.parameters():  # buffers (rotary frequencies) keep their type
        parameter.data = parameter.data.to(storage)
    return settled


def _adapted_forward(self: Any, x: Tensor) -> Tensor:
    base = self.base_layer
    added = None if self.disable_adapters else _delta(self)
    return F.linear(x, base.seen(added), base.bias)


def _delta(layer: Any) -> Tensor:
    """What an adapter adds to its weight. DoRA's ||V|| is kept out of the gradient, as in its section 4.3."""
    added = lora_delta(layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME])
    if NAME not in layer.lora_magnitude_vector:
        return added
    W = layer.get_base_layer().latent()
    V = W + added
    factor: Tensor = layer.lora_magnitude_vector[NAME].weight / V.detach().norm(dim=1)
    return factor.unsqueeze(1) * V - W


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)

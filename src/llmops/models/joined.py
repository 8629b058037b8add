"""Linear layers that read the same input, run as one: q, k and v of an attention, gate and up of an MLP.

At a few tokens a layer costs a launch and the reading of its weight; one launch in the place of three, over a weight
three times as tall, fills a GPU that a small projection leaves half idle. Nothing is rounded anew: rows of codes and
their scales are laid below each other, and every row of the product is what it was.

The model does not know. Each layer is replaced by a `Part`; the first that is asked with a new input runs the joined
layer, the others hand out their rows. A part that is asked alone, or with another input, computes all and is right.

Not joined: layers of different schemes, types or inputs, a tensor scale of NVFP4 that differs, NF4 that bitsandbytes
runs itself (`nf4_joined.py`), and what an adapter wraps. The names of a joined model are not those of its checkpoint:
it generates, it is not saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmops.errors import ModelError
from llmops.models.arch import decoder_layers
from llmops.models.formatted import FormattedLinear
from llmops.models.nf4_joined import joined_nf4
from llmops.models.packed import PackedLinear
from llmops.models.sparse24 import Sparse24Linear
from llmops.ops.bitstream import pack_bits, unpack_bits

__all__ = ["GROUPS", "Joined", "Part", "join", "joined"]

#: Layers of one module that read the same input, by name.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
NF4 = ("llmops.models.nf4", "Linear4bit")  # by name: its file imports bitsandbytes


class Joined(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy, so its classes are Any
    """linear: the layers below each other; sizes: the rows of each."""

    def __init__(self, linear: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, tuple(sizes)
        self.x: Tensor | None = None  # the input whose parts are not all handed out yet
        self.parts: list[Tensor | None] = []
        self.given: tuple[Tensor, torch.dtype] | None = None  # of an input that is codes: scales, type of the output

    def part(self, x: Tensor, index: int) -> Tensor:
        if self.x is not x or self.parts[index] is None:
            self.x, self.parts = x, list(self._run(x).split(self.sizes, -1))
        found = self.parts[index]
        assert found is not None
        self.parts[index] = None
        if all(part is None for part in self.parts):
            self.x, self.parts, self.given = None, [], None
        return found

    def _run(self, x: Tensor) -> Tensor:
        """x: numbers, or codes whose scales wait in `given` (`fused.py`)."""
        y: Tensor = self.linear(x) if self.given is None else self.linear.on_codes(x, *self.given)
        return y


class Part(nn.Module):  # type: ignore[misc]
    """Rows of a joined layer, in the place of the layer they came from."""

    def __init__(self, whole: Joined, index: int, in_features: int) -> None:
        super().__init__()
        self.whole, self.index = whole, index
        self.in_features, self.out_features = in_features, whole.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.whole.part(x, self.index)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, part {self.index} of a joined layer"


def join(model: Any) -> int:
    """Join what can be, in place, block by block; returns how many joined layers there are now."""
    try:
        _, blocks = decoder_layers(model)
    except ModelError:
        return 0
    made = 0
    for block in blocks:
        for parent in list(block.modules()):
            for names in GROUPS:
                layers = [parent._modules.get(name) for name in names]
                if all(layer is not None for layer in layers):
                    made += _replace(parent, names, [layer for layer in layers if layer is not None])
    return made


def _replace(parent: nn.Module, names: Sequence[str], layers: list[Any]) -> int:
    linear = joined(layers)
    if linear is None:
        return 0
    whole = Joined(linear.eval(), [layer.out_features for layer in layers])
    for index, (name, layer) in enumerate(zip(names, layers, strict=True)):
        setattr(parent, name, Part(whole, index, layer.in_features))
    return 1


def joined(layers: Sequence[Any]) -> nn.Module | None:
    """One layer that gives the outputs of all, one after the other; None where there is none."""
    kinds = {type(layer) for layer in layers}
    kind = kinds.pop()
    make = joined_nf4 if (kind.__module__, kind.__name__) == NF4 else _JOIN.get(kind)
    if kinds or make is None or len({layer.in_features for layer in layers}) > 1:
        return None
    return make(layers)


def _dense(layers: Sequence[Any]) -> nn.Module | None:
    if len({layer.weight.dtype for layer in layers}) > 1:
        return None
    made = nn.Linear(layers[0].in_features, 1, bias=False, device="meta")
    made.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    made.out_features = len(made.weight)
    bias = _bias(layers)
    made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return made


def _sparse(layers: Sequence[Any]) -> nn.Module | None:
    """2:4 weights, made dense for a moment and packed anew: what cuSPARSELt keeps has an order of its own."""
    if len({layer.values.dtype for layer in layers}) > 1:
        return None
    whole = nn.Linear(layers[0].in_features, 1, bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([layer.dequantized() for layer in layers]), requires_grad=False)
    bias = _bias(layers)
    whole.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return Sparse24Linear(whole, all(layer.compressed is not None for layer in layers))


def _packed(layers: Sequence[Any]) -> nn.Module | None:
    if len({(layer.bits, layer.group_size, layer.asked, layer.weight_zero_point is None, layer.weight_scale.dtype)
            for layer in layers}) > 1:
        return None
    stored = [layer.stored_tensors() for layer in layers]
    parts = {name: torch.cat([each[name] for each in stored]) for name in ("weight_packed", "weight_scale")}
    rows = sum(layer.out_features for layer in layers)
    parts["weight_shape"] = torch.tensor([rows, layers[0].in_features])
    if layers[0].weight_zero_point is not None:  # packed along the rows: (words, groups)
        bits = layers[0].bits
        zeros = [unpack_bits(each["weight_zero_point"].t().contiguous(), bits, layer.out_features)
                 for each, layer in zip(stored, layers, strict=True)]
        parts["weight_zero_point"] = pack_bits(torch.cat(zeros, 1), bits).t().contiguous()
    return PackedLinear(parts, bits=layers[0].bits, group_size=layers[0].group_size, bias=_bias(layers),
                        kernel=layers[0].asked)


def _formatted(layers: Sequence[Any]) -> nn.Module | None:
    stored, kind = [layer.stored_tensors() for layer in layers], layers[0].kind
    if len({(layer.kind, layer.asked) for layer in layers}) > 1:
        return None
    if kind == "fp8-block" and any(layer.out_features % 128 for layer in layers[:-1]):
        return None
    if kind == "fp8-tensor":  # a scale for each of them is a scale for each of their rows
        for parts, layer in zip(stored, layers, strict=True):
            parts["weight_scale"] = parts["weight_scale"].reshape(1, 1).repeat(layer.out_features, 1)
        kind = "fp8-channel"
    if "weight_global_scale" in stored[0] and len({float(parts["weight_global_scale"]) for parts in stored}) > 1:
        return None
    made = {name: torch.cat([parts[name] for parts in stored]) if name != "weight_global_scale" else stored[0][name]
            for name in stored[0]}
    return FormattedLinear(made, kind, bias=_bias(layers), kernel=layers[0].asked)


def _bias(layers: Sequence[Any]) -> Tensor | None:
    """The biases below each other; zeros where one has none and another has."""
    if all(layer.bias is None for layer in layers):
        return None
    like = next(layer.bias for layer in layers if layer.bias is not None)
    return torch.cat([like.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
                      for layer in layers])


_JOIN: dict[type, Callable[[Sequence[Any]], nn.Module | None]] = {
    nn.Linear: _dense, PackedLinear: _packed, FormattedLinear: _formatted, Sparse24Linear: _sparse}

"""Cut a decoder narrower: fewer hidden features, FFN channels, heads and KV groups; an ordinary model of its class.

What runs along each axis of each parameter is known (`widths`). The narrow model is made anew from a config that says
its shape (head_dim is written out where the architecture reads it: with fewer features it is no longer hidden / heads),
and takes the rows and columns that stay.

What is cut of FFN channels and heads is exactly as if their activations were zero. Hidden features are another matter:
a norm divides by the root mean square of all features it reads, and the mean of those that stay is another. Each norm's
gain is therefore multiplied by

    c = sqrt( mean of squares of those that stay / mean of squares of all )         over calibration data

so that what it gives keeps its scale; where the features that go are zero this is exact. The same is done for a norm
over all heads (OLMo 2) when some go. A layer norm (GPT-2, GPT-NeoX) takes the features' mean off first: squares are
then of x - mean, less the square of how far the mean of those that stay is from that of all, and its bias gains what
that shift takes. Embeddings that the architecture multiplies by sqrt(hidden) (Gemma) are multiplied by what that loses,
and the final norm divided, whose output meets the same tied matrix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmops.models.arch import decoder_layers, text_config
from llmops.models.experts import Experts, split_experts
from llmops.models.fold import norm_offset
from llmops.models.widths import (
    Shape,
    axes_of,
    check_shape,
    ffn_of,
    head_norms_of,
    norms_of,
    put_shape,
    refusal,
    shape_of,
)

__all__ = ["Cut", "narrow"]

#: Architectures that multiply embeddings by sqrt(hidden).
SCALED_EMBEDDINGS = ("gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class Cut:
    """What stays, all ascending: hidden features, and of each layer FFN channels (by the FFN's path in the layer: mlp,
    mlp.experts.3), query heads and KV heads. shape: what comes of it."""

    shape: Shape
    hidden: Tensor
    channels: Sequence[Mapping[str, Tensor]]
    heads: Sequence[Sequence[int]]
    kv_heads: Sequence[Sequence[int]]


@torch.no_grad()  # type: ignore[untyped-decorator]
def narrow(model: Any, cut: Cut, squares: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None) -> Any:
    """A new model of what stays, its experts split if the given one's are. That is not changed; what is not cut along
    any axis is shared with it.

    squares: mean square of what each norm of `norms_of` and `head_norms_of` reads, feature by feature, by name; means:
    mean of the same, of layer norms alone, whose squares and means are of x - its mean over the features. Raises
    LlmopsError as `shape_of` and `check_shape` do.
    """
    from accelerate import init_empty_weights

    full, shape = shape_of(model), cut.shape
    check_shape(shape, full)
    config = copy.deepcopy(model.config)
    put_shape(config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config, shape)
    with init_empty_weights(include_buffers=False):
        made = type(model)(config)
    if any(isinstance(module, Experts) for module in model.modules()):
        split_experts(made)
    gains = _Gains(model, cut, full, squares, means or {})
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        axes = axes_of(name, parameter, owners) or ""
        value = gains(name, _taken(parameter.detach(), axes, _kept(name, axes, gains.path, cut, full)))
        parent, _, last = name.rpartition(".")
        place = made.get_submodule(parent)._parameters
        if place[last].shape != value.shape:
            raise refusal(model, f"made for {shape}, its {name} is {tuple(place[last].shape)}; expected "
                                 f"{tuple(value.shape)}")
        place[last] = nn.Parameter(value.contiguous(), requires_grad=False)
    made.tie_weights()
    made.to(dtype=model.dtype, device=next(model.parameters()).device)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


class _Gains:
    """What is done to the parameters of norms and to scaled embeddings once they are cut."""

    def __init__(self, model: Any, cut: Cut, full: Shape, squares: Mapping[str, Tensor],
                 means: Mapping[str, Tensor]) -> None:
        self.model, self.kept = model, cut.hidden
        self.path = decoder_layers(model)[0]
        self.stretch = _stretch(model, full, cut.shape)
        self.factor: dict[str, float] = dict.fromkeys(norms_of(model), 1.0)
        self.shift: dict[str, float] = {}
        if cut.shape.hidden < full.hidden:
            for name in self.factor:
                self.factor[name], self.shift[name] = _moments(squares[name], means.get(name), cut.hidden)
        for name, letter in head_norms_of(model).items():
            kept = _kept(f"{name}.weight", letter, self.path, cut, full)[letter]
            if len(kept) < full.sizes()[letter]:
                self.factor[name], _ = _moments(squares[name], None, kept)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """The cut value of the parameter `name`."""
        layer, _, part = name.rpartition(".")
        if layer in self.factor:
            norm = self.model.get_submodule(layer)
            if part == "bias":
                return self._shifted(layer, norm, value)
            last = self.stretch if not layer.startswith(f"{self.path}.") else 1.0
            factor, offset = self.factor[layer] / last, norm_offset(norm)
            return value if factor == 1.0 else ((value.float() + offset) * factor - offset).to(value.dtype)
        return value * self.stretch if name.endswith("embed_tokens.weight") and self.stretch != 1.0 else value

    def _shifted(self, layer: str, norm: nn.Module, value: Tensor) -> Tensor:
        shift = self.shift.get(layer, 0.0)
        if not shift:
            return value
        gain = norm.weight.detach().float()[self.kept.to(value.device)]
        return (value.float() + shift * gain).to(value.dtype)


def _kept(name: str, axes: str, path: str, cut: Cut, full: Shape) -> dict[str, Tensor]:
    """Letter -> what stays along it, for a parameter of this name."""
    found = {"H": cut.hidden}
    if not name.startswith(f"{path}."):
        return found
    number, _, inside = name.removeprefix(f"{path}.").partition(".")
    layer, query = int(number), full.heads * full.head_dim
    found |= {"Q": _spread(cut.heads[layer], full.head_dim), "K": _spread(cut.kv_heads[layer], full.head_dim),
              "I": _spread(cut.heads[layer], 3 * full.head_dim)}
    found["A"] = torch.cat([found["Q"] + i * query for i in range(3)])
    ffn = ffn_of(inside.rpartition(".")[0], axes)
    if ffn is not None:
        found |= dict.fromkeys("FES", cut.channels[layer][ffn])
    return found


def _spread(heads: Sequence[int], head_dim: int) -> Tensor:
    return (torch.tensor(list(heads)).unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def _taken(value: Tensor, axes: str, kept: Mapping[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis in kept and len(kept[axis]) < value.shape[dim]:
            value = value.index_select(dim, kept[axis].to(value.device))
    return value


def _moments(squares: Tensor, means: Tensor | None, kept: Tensor) -> tuple[float, float]:
    """(root of the mean square of those that stay over that of all; how far their mean is off, in roots of all's)."""
    whole = float(squares.double().mean())
    if whole <= 0:
        return 1.0, 0.0
    off = float(means.double()[kept].mean()) if means is not None else 0.0
    part = max(float(squares.double()[kept].mean()) - off**2, 0.0)
    return math.sqrt(part / whole), off / math.sqrt(whole)


def _stretch(model: nn.Module, full: Shape, shape: Shape) -> float:
    """What an embedding multiplied by sqrt(hidden) loses."""
    if text_config(model).model_type not in SCALED_EMBEDDINGS:
        return 1.0
    return math.sqrt(full.hidden / shape.hidden)

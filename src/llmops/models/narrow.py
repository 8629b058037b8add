"""Cut a decoder narrower: fewer hidden features, FFN channels, heads and KV groups; an ordinary model of its class.

Every parameter is known by its name, and each of its axes by what runs along it: H hidden features, F FFN channels, Q
query heads x head_dim, K KV heads x head_dim, or nothing that is cut. The narrow model is made anew from a config that
says so (head_dim is written out: with fewer features it is no longer hidden / heads), and takes the rows and columns
that stay. A parameter of a kind that is not in the table is refused by name, never passed by.

What is cut of FFN channels and heads is exactly as if their activations were zero. Hidden features are another matter:
an RMS norm divides by the root mean square of all features it reads, and the mean of those that stay is another. Each
norm's gain is therefore multiplied by

    c = sqrt( mean of squares of those that stay / mean of squares of all )         over calibration data

so that what it gives keeps its scale; where the features that go are zero this is exact. Embeddings that the
architecture multiplies by sqrt(hidden) (Gemma) are multiplied by what that loses, and the final norm divided, whose
output meets the same tied matrix.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError, ModelError
from llmops.models.arch import decoder_layers, text_config
from llmops.models.fold import norm_offset

__all__ = ["Cut", "Shape", "check_shape", "narrow", "norms_of", "parameters_of", "resized", "shape_of"]

#: Last part of a layer's name -> what runs along (out, in) of its weight; a bias runs along out.
AXES = {"q_proj": "QH", "k_proj": "KH", "v_proj": "KH", "o_proj": "HQ", "gate_proj": "FH", "up_proj": "FH",
        "down_proj": "HF", "embed_tokens": "VH", "lm_head": "VH"}
#: Architectures that multiply embeddings by sqrt(hidden).
SCALED_EMBEDDINGS = ("gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class Shape:
    """How wide a decoder is. head_dim stays."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def sizes(self) -> dict[str, int]:
        return {"H": self.hidden, "F": self.intermediate, "Q": self.heads * self.head_dim,
                "K": self.kv_heads * self.head_dim}

    def __str__(self) -> str:
        return (f"hidden {self.hidden}, intermediate {self.intermediate}, {self.heads} heads in {self.kv_heads} KV "
                "groups")


@dataclass(frozen=True)
class Cut:
    """What stays: hidden features, and of each layer FFN channels, query heads and KV heads, all ascending."""

    hidden: Tensor
    channels: Sequence[Tensor]
    heads: Sequence[Sequence[int]]
    kv_heads: Sequence[Sequence[int]]


def shape_of(model: nn.Module) -> Shape:
    """Raises LlmopsError for a model with a parameter that is not in the table, or layers of different widths."""
    config = text_config(model)
    if not hasattr(config, "intermediate_size") or not hasattr(config, "num_key_value_heads"):
        raise _refusal(model, f"{type(config).__name__} says neither intermediate_size nor num_key_value_heads")
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    shape = Shape(int(config.hidden_size), int(config.intermediate_size), heads,
                  int(config.num_key_value_heads or heads), head_dim)
    sizes = shape.sizes()
    for name, parameter in model.named_parameters():
        axes = _axes(name, parameter, shape)
        if axes is None:
            raise _refusal(model, f"{name} {tuple(parameter.shape)} is none of {', '.join(AXES)} or a norm")
        if any(axis in sizes and size != sizes[axis] for axis, size in zip(axes, parameter.shape, strict=True)):
            raise _refusal(model, f"{name} is {tuple(parameter.shape)}, which does not fit {shape}")
    return shape


def check_shape(shape: Shape, full: Shape) -> None:
    """Raises LlmopsError unless `shape` can be cut out of `full`."""
    for name in ("hidden", "intermediate", "heads", "kv_heads"):
        if not 1 <= getattr(shape, name) <= getattr(full, name):
            raise LlmopsError(f"{name} is {getattr(shape, name)}; expected 1 to {getattr(full, name)}, what there is")
    if shape.heads % shape.kv_heads:
        raise LlmopsError(f"{shape.heads} heads in {shape.kv_heads} KV groups; expected a multiple of the groups, each "
                          "of which has the same number of heads")
    if shape.heads // shape.kv_heads > full.heads // full.kv_heads:
        raise LlmopsError(f"{shape.heads} heads in {shape.kv_heads} KV groups, {shape.heads // shape.kv_heads} each; "
                          f"expected at most {full.heads // full.kv_heads} each, what a group has: fewer heads, or "
                          "more kv_heads")


@torch.no_grad()  # type: ignore[untyped-decorator]
def norms_of(model: nn.Module) -> dict[str, float]:
    """{full name: offset of its gain (1 in Gemma, else 0)} of the norms that read the residual stream's width."""
    width = int(text_config(model).hidden_size)
    found = {}
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        if last == "weight" and path.endswith("norm") and parameter.shape == (width,) and not _of_heads(path):
            found[path] = norm_offset(model.get_submodule(path))
    return found


def parameters_of(model: nn.Module, shape: Shape) -> int:
    """How many parameters the model would have in another shape."""
    full, sizes, total = shape_of(model), shape.sizes(), 0
    for name, parameter in model.named_parameters():
        axes = _axes(name, parameter, full) or ""
        total += math.prod(sizes.get(axis, size) for axis, size in zip(axes, parameter.shape, strict=True))
    return total


@torch.no_grad()  # type: ignore[untyped-decorator]
def narrow(model: Any, cut: Cut, squares: Mapping[str, Tensor]) -> Any:
    """A new model of what stays. The given one is not changed; what is not cut along any axis is shared with it.

    squares: (H,) mean square of what each norm of `norms_of` reads, by name. Raises LlmopsError as `shape_of` and
    `check_shape` do.
    """
    from accelerate import init_empty_weights

    full = shape_of(model)
    shape = Shape(len(cut.hidden), len(cut.channels[0]), len(cut.heads[0]), len(cut.kv_heads[0]), full.head_dim)
    check_shape(shape, full)
    config = copy.deepcopy(model.config)
    _put_shape(config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config, shape)
    with init_empty_weights(include_buffers=False):
        made = type(model)(config)
    gains = {name: _factor(squares[name], cut.hidden) if shape.hidden < full.hidden else 1.0
             for name in norms_of(model)}
    stretch = _stretch(model, full, shape)
    path, _ = decoder_layers(model)
    for name, parameter in model.named_parameters():
        value = _taken(parameter.detach(), _axes(name, parameter, full) or "", _kept(name, path, cut, full))
        layer = name.rpartition(".")[0]
        if layer in gains:
            value = _gained(value, gains[layer] / (stretch if not layer.startswith(f"{path}.") else 1.0),
                            norm_offset(model.get_submodule(layer)))
        if name.endswith("embed_tokens.weight"):
            value = value * stretch
        parent, _, last = name.rpartition(".")
        made.get_submodule(parent)._parameters[last] = nn.Parameter(value.contiguous(), requires_grad=False)
    made.tie_weights()
    made.to(dtype=model.dtype, device=next(model.parameters()).device)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def _put_shape(config: Any, shape: Shape) -> None:
    config.hidden_size, config.intermediate_size = shape.hidden, shape.intermediate
    config.num_attention_heads, config.num_key_value_heads = shape.heads, shape.kv_heads
    config.head_dim = shape.head_dim


def _axes(name: str, parameter: Tensor, shape: Shape) -> str | None:
    """What runs along each axis of a parameter, a letter each; None for a parameter that is not known."""
    layer, _, part = name.rpartition(".")
    last = layer.rpartition(".")[2]
    if ".experts." in name or parameter.dim() > 2 or part not in ("weight", "bias"):
        return None
    if last in AXES:
        return AXES[last] if part == "weight" and parameter.dim() == 2 else AXES[last][0] if part == "bias" else None
    if last.endswith("norm") and part == "weight" and parameter.dim() == 1:
        if _of_heads(layer):  # of each head by itself; over all heads at once it would be another norm
            return "D" if parameter.shape == (shape.head_dim,) else None
        return "H" if parameter.shape == (shape.hidden,) else None
    return None


def _of_heads(path: str) -> bool:
    return path.rpartition(".")[2] in ("q_norm", "k_norm")


def _kept(name: str, path: str, cut: Cut, full: Shape) -> dict[str, Tensor]:
    """Letter -> what stays along it, for a parameter of this name."""
    found = {"H": cut.hidden}
    if name.startswith(f"{path}."):
        layer = int(name.removeprefix(f"{path}.").partition(".")[0])
        found |= {"F": cut.channels[layer], "Q": _spread(cut.heads[layer], full.head_dim),
                  "K": _spread(cut.kv_heads[layer], full.head_dim)}
    return found


def _spread(heads: Sequence[int], head_dim: int) -> Tensor:
    return (torch.tensor(list(heads)).unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()


def _taken(value: Tensor, axes: str, kept: Mapping[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis in kept and len(kept[axis]) < value.shape[dim]:
            value = value.index_select(dim, kept[axis].to(value.device))
    return value


def _factor(squares: Tensor, kept: Tensor) -> float:
    mean = float(squares.double().mean())
    return math.sqrt(float(squares.double()[kept].mean()) / mean) if mean > 0 else 1.0


def _gained(weight: Tensor, factor: float, offset: float) -> Tensor:
    return ((weight.float() + offset) * factor - offset).to(weight.dtype)


def _stretch(model: nn.Module, full: Shape, shape: Shape) -> float:
    """What an embedding multiplied by sqrt(hidden) loses."""
    if text_config(model).model_type not in SCALED_EMBEDDINGS:
        return 1.0
    return math.sqrt(full.hidden / shape.hidden)


def _refusal(model: nn.Module, why: str) -> LlmopsError:
    return ModelError(f"{type(model).__name__} cannot be cut narrower: {why}; expected a Llama-like decoder (one gate, "
                      "up and down projection a layer, RMS norms): prune layers instead, method: depth")


def resized(shape: Shape, **sizes: int | None) -> Shape:
    """The shape with those sizes that are given."""
    return replace(shape, **{name: size for name, size in sizes.items() if size is not None})

"""How wide a decoder is, and what runs along each axis of each of its parameters.

Every parameter is known by its name (`arch.WIDTHS`): a letter for each axis says what runs along it, or that nothing
does which is ever cut. A parameter of a kind that is not in the table is refused by name, never passed by, and so is
one whose size is not what the config says.

A mixture has FFNs of up to three widths: of its experts, of an expert that all tokens see, of layers without experts.
`Shape.intermediate` is the experts' there; the others keep their proportion to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmops.errors import LlmopsError, ModelError
from llmops.models.arch import DIVIDED, FFN_KEYS, TIED, TRANSPOSED, WIDTHS, text_config
from llmops.models.expert_names import expert_of
from llmops.models.fold import norm_offset

__all__ = ["Shape", "axes_of", "check_shape", "ffn_of", "head_norms_of", "letter_of", "norms_of",
           "opens", "parameters_of", "put_shape", "refusal", "resized", "shape_of", "unit_of"]


@dataclass(frozen=True)
class Shape:
    """How wide a decoder is. head_dim stays. ffn: the letter of the FFNs that `intermediate` is the width of; beside:
    of the others; tied: whether hidden is heads x head_dim by the architecture; divided: whether it has to be a
    multiple of heads all the same (`arch.DIVIDED`)."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    ffn: str = "F"
    beside: tuple[tuple[str, int], ...] = ()
    divided: bool = False

    def sizes(self) -> dict[str, int]:
        """Letter -> how many numbers run along such an axis."""
        query = self.heads * self.head_dim
        return {"H": self.hidden, self.ffn: self.intermediate, "Q": query, "K": self.kv_heads * self.head_dim,
                "A": 3 * query, "I": 3 * query, "D": self.head_dim, **dict(self.beside)}

    def __str__(self) -> str:
        others = {"F": "layers without experts", "S": "the shared expert"}
        beside = "".join(f" ({size} in {others[letter]})" for letter, size in self.beside)
        return (f"hidden {self.hidden}, intermediate {self.intermediate}{beside}, {self.heads} heads in "
                f"{self.kv_heads} KV groups")


def shape_of(model: nn.Module) -> Shape:
    """Experts have to be split (`experts.split_experts`). Raises LlmopsError for a parameter that is not in the table,
    or layers of different widths."""
    config = text_config(model)
    owners = dict(model.named_modules())
    named = {name: axes_of(name, parameter, owners) for name, parameter in model.named_parameters()}
    letters = {letter for axes in named.values() for letter in axes or ""}
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    widths = {letter: _ffn_width(config, letter, hidden) for letter in FFN_KEYS if letter in letters}
    missing = next((letter for letter, width in widths.items() if width is None), None)
    if missing is not None:
        raise refusal(model, f"{type(config).__name__} says none of {', '.join(FFN_KEYS[missing])}")
    tied = bool(letters & {"A", "I"}) or config.model_type in TIED
    head_dim = (None if tied else getattr(config, "head_dim", None)) or hidden // heads
    ffn = "E" if "E" in widths else "F"
    shape = Shape(hidden, int(widths.get(ffn) or 0), heads, int(getattr(config, "num_key_value_heads", None) or heads),
                  int(head_dim), tied, ffn, tuple((letter, int(width or 0)) for letter, width in widths.items()
                                                  if letter != ffn), config.model_type in DIVIDED)
    sizes = shape.sizes()
    for name, parameter in model.named_parameters():
        axes = named[name]
        if axes is None:
            raise refusal(model, f"{name} {tuple(parameter.shape)} is neither a norm nor a layer of a "
                                 "known kind")
        if any(axis in sizes and size != sizes[axis] for axis, size in zip(axes, parameter.shape, strict=True)):
            raise refusal(model, f"{name} is {tuple(parameter.shape)}, which does not fit {shape}")
    return shape


def check_shape(shape: Shape, full: Shape) -> None:
    """Raises LlmopsError unless `shape` can be cut out of `full`."""
    for name in ("hidden", "intermediate", "heads", "kv_heads"):
        if not 1 <= getattr(shape, name) <= getattr(full, name):
            raise LlmopsError(f"{name} is {getattr(shape, name)}; expected 1 to {getattr(full, name)}, what there is")
    if shape.tied and shape.hidden != shape.heads * shape.head_dim:
        raise LlmopsError(f"hidden is {shape.hidden} with {shape.heads} heads of {shape.head_dim}; expected hidden = "
                          f"heads x {shape.head_dim}, which this architecture fixes: give one of the two, hidden as a "
                          f"multiple of {shape.head_dim}")
    if shape.heads % shape.kv_heads:
        raise LlmopsError(f"{shape.heads} heads in {shape.kv_heads} KV groups; expected a multiple of the groups, each "
                          "of which has the same number of heads")
    if shape.heads // shape.kv_heads > full.heads // full.kv_heads:
        raise LlmopsError(f"{shape.heads} heads in {shape.kv_heads} KV groups, {shape.heads // shape.kv_heads} each; "
                          f"expected at most {full.heads // full.kv_heads} each, what a group has: fewer heads, or "
                          "more kv_heads")


def opens(shape: Shape) -> bool:
    """Whether transformers opens a config of this shape."""
    return not shape.divided or shape.hidden % shape.heads == 0


def resized(shape: Shape, **sizes: int | None) -> Shape:
    """The shape with those sizes that are given, and what follows from them: heads from hidden or the other way where
    an architecture ties them, the widths beside experts'."""
    per_group = shape.heads // shape.kv_heads
    heads, hidden = sizes.get("heads") or (sizes.get("kv_heads") or 0) * per_group, sizes.get("hidden")
    if shape.tied and (heads or hidden):
        heads = heads or (hidden or 0) // shape.head_dim
        whole: dict[str, int | None] = {"hidden": heads * shape.head_dim, "heads": heads,
                                        "kv_heads": max(1, heads // per_group)}
        sizes = whole | {name: size for name, size in sizes.items() if size}
    width = sizes.get("intermediate") or shape.intermediate
    beside = tuple((letter, _beside(size, width, shape.intermediate)) for letter, size in shape.beside)
    return replace(shape, hidden=sizes.get("hidden") or shape.hidden, intermediate=width, beside=beside,
                   heads=sizes.get("heads") or shape.heads, kv_heads=sizes.get("kv_heads") or shape.kv_heads)


def _beside(size: int, width: int, full: int) -> int:
    """What is left of `size` as `full` becomes `width`: divisible by whatever divides both."""
    if width == full:
        return size
    unit = math.gcd(width, size)
    return max(unit, size * width // full // unit * unit)


def parameters_of(model: nn.Module, shape: Shape) -> int:
    """How many parameters the model would have in another shape."""
    sizes, owners, total = shape.sizes(), dict(model.named_modules()), 0
    for name, parameter in model.named_parameters():
        axes = axes_of(name, parameter, owners) or ""
        total += math.prod(sizes.get(axis, size) for axis, size in zip(axes, parameter.shape, strict=True))
    return total


@torch.no_grad()  # type: ignore[untyped-decorator]
def norms_of(model: nn.Module) -> dict[str, float]:
    """{full name: offset of its gain (1 in Gemma, else 0)} of the norms that read the residual stream's width."""
    owners = dict(model.named_modules())
    return {name.rpartition(".")[0]: norm_offset(owners[name.rpartition(".")[0]])
            for name, parameter in model.named_parameters()
            if name.endswith(".weight") and _is_norm(name) and axes_of(name, parameter, owners) == "H"}


def head_norms_of(model: nn.Module) -> dict[str, str]:
    """{full name: Q or K} of the norms over all heads at once (OLMo 2); those of each head by itself are not cut."""
    owners = dict(model.named_modules())
    found = {name.rpartition(".")[0]: axes_of(name, parameter, owners) for name, parameter in model.named_parameters()
             if _is_norm(name)}
    return {name: axes for name, axes in found.items() if axes in ("Q", "K")}


def axes_of(name: str, parameter: Tensor, owners: dict[str, nn.Module]) -> str | None:
    """What runs along each axis of a parameter, a letter each; None for a parameter that is not known."""
    layer, _, part = name.rpartition(".")
    if parameter.dim() > 2 or part not in ("weight", "bias"):
        return None
    if _is_norm(name):
        return _norm_axes(layer, parameter, owners)
    parts = layer.split(".")
    axes = WIDTHS.get(".".join(parts[-2:])) or WIDTHS.get(parts[-1])
    if axes is None or parameter.dim() != (2 if part == "weight" else 1):
        return None
    if "F" in axes:
        axes = axes.replace("F", letter_of(layer.rpartition(".")[0]))
    if part == "bias":
        return axes[0]
    return axes[::-1] if type(owners[layer]).__name__ in TRANSPOSED else axes


def _is_norm(name: str) -> bool:
    last = name.rpartition(".")[0].rpartition(".")[2]
    return last.endswith("norm") or last.startswith("ln_")


def _norm_axes(layer: str, parameter: Tensor, owners: dict[str, nn.Module]) -> str | None:
    """H, Q, K or D (a head): q_norm and k_norm are of what their projections give, as a whole or of each head."""
    last = layer.rpartition(".")[2]
    if parameter.dim() != 1:
        return None
    if last not in ("q_norm", "k_norm"):
        return "H"
    beside = owners.get(f"{layer.rpartition('.')[0]}.{last[0]}_proj")
    return last[0].upper() if len(parameter) == getattr(beside, "out_features", 0) else "D"


def letter_of(ffn: str) -> str:
    """Of the channels of an FFN, by its path: E an expert, S one that all tokens see, F a layer without experts."""
    return "E" if expert_of(f"{ffn}.") is not None else "S" if "shared_expert" in ffn else "F"


def unit_of(shape: Shape, multiple: int) -> int:
    """What hidden features come in multiples of: whole KV groups too, where they are tied; heads, where they divide."""
    if shape.tied:
        return math.lcm(multiple, shape.head_dim * (shape.heads // shape.kv_heads))
    return math.lcm(multiple, shape.heads) if shape.divided else multiple


def ffn_of(name: str, axes: str) -> str | None:
    """The path of the FFN that a parameter or layer of this full name is in; None where no channels run along it."""
    return name.rpartition(".")[0] if set(axes) & set(FFN_KEYS) else None


def put_shape(config: Any, shape: Shape) -> None:
    """Make a config say a shape."""
    config.hidden_size, config.num_attention_heads = shape.hidden, shape.heads
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = shape.kv_heads
    if not shape.tied:
        config.head_dim = shape.head_dim
    for letter, width in ((shape.ffn, shape.intermediate), *shape.beside):
        setattr(config, next(key for key in FFN_KEYS[letter] if hasattr(config, key)), width)


def _ffn_width(config: Any, letter: str, hidden: int) -> int | None:
    key = next((key for key in FFN_KEYS[letter] if hasattr(config, key)), None)
    if key is None:
        return None
    value = getattr(config, key)
    if value is None:
        return 4 * hidden if key == "n_inner" else None
    return int(value)


def refusal(model: nn.Module, why: str) -> LlmopsError:
    return ModelError(f"{type(model).__name__} cannot be cut narrower: {why}; expected a decoder whose parameters are "
                      "known by name (Llama-like, GPT-2, GPT-NeoX, OLMo 2, mixtures of such FFNs): prune layers "
                      "instead, method: depth")

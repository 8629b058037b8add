"""Which layer is stored how: the schemes of a folder, and the `quantization_config` that says so.

A folder may hold several schemes. compressed-tensors describes them as groups, each with its `targets`, the layers that
it is for: full names, regular expressions (`re:` before them), or the class name `Linear`. Of several that match, a
full name goes before an expression and that before a class, and within each kind the first in the alphabet. One scheme
for all layers is written as one group for `Linear`; several as one group each, with full names: no other layer can slip
in.

Servers run q, k and v of a block as one product, gate and up as another (`FUSED`), and refuse layers whose parts are
stored differently, so those always share a scheme here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmops.errors import LlmopsError, ModelError
from llmops.models import number_formats
from llmops.models.expert_names import expert_of

if TYPE_CHECKING:  # recipes are checked without torch
    from llmops.methods.quantize.floats import AnyWeight

__all__ = ["FUSED", "LayerScheme", "average_bits", "check_fused", "fused_groups", "packed_schemes",
           "quantization_config", "schemes_of", "stored_as", "told"]

#: Last names of layers that see one input and that servers run as one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

EXPERTS = r"re:.*\.experts\.\d+\..*"


@dataclass(frozen=True)
class LayerScheme:
    """How the weight of one linear layer is stored.

    kind: of its numbers, "int" or one of `number_formats.FORMATS`, which fix all the rest; bits: of each; group_size:
    columns that share a scale, -1 a whole row; symmetric: whether there are no zero points.
    """

    bits: int
    group_size: int
    symmetric: bool
    kind: str = "int"

    @classmethod
    def of(cls, weight: AnyWeight) -> LayerScheme:
        return cls(weight.bits, weight.group_size, weight.symmetric, weight.kind)

    def __str__(self) -> str:
        if self.kind != "int":
            return number_formats.TOLD[self.kind]
        size = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.kind}{self.bits} {size} {'symmetric' if self.symmetric else 'asymmetric'}"


Schemes = Mapping[str, LayerScheme]


# --------------------------------------------------------------------------------------------------------- writing


def quantization_config(schemes: Schemes, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` block of config.json. schemes: of every packed layer, by full name; ignore: full names
    of the linear layers left dense."""
    kinds = sorted(set(schemes.values()), key=lambda scheme: (scheme.kind, scheme.bits, scheme.group_size,
                                                              scheme.symmetric))
    groups = {f"group_{place}": _group(scheme, ["Linear"] if len(kinds) == 1 else
                                       _named(name for name, each in schemes.items() if each == scheme))
              for place, scheme in enumerate(kinds)}
    formats = {each["format"] for each in groups.values()}
    whole = formats.pop() if len(formats) == 1 else "mixed-precision"
    return {"quant_method": "compressed-tensors", "format": whole, "quantization_status": "compressed",
            "ignore": list(ignore), "kv_cache_scheme": None, "global_compression_ratio": None,
            "config_groups": groups}


def _group(scheme: LayerScheme, targets: Sequence[str]) -> dict[str, Any]:
    if scheme.kind != "int":
        return {"targets": list(targets), "input_activations": number_formats.activations(scheme.kind),
                "output_activations": None, "weights": number_formats.weights(scheme.kind),
                "format": number_formats.FORMATS[scheme.kind]}
    weights = {"num_bits": scheme.bits, "type": scheme.kind, "symmetric": scheme.symmetric,
               "strategy": "channel" if scheme.group_size == -1 else "group",
               "group_size": None if scheme.group_size == -1 else scheme.group_size, "dynamic": False,
               "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {}}
    return {"targets": list(targets), "input_activations": None, "output_activations": None, "weights": weights,
            "format": "pack-quantized"}


def _named(names: Iterable[str]) -> list[str]:
    """Targets for layers of those names; experts as one pattern, by which transformers finds the scheme of experts."""
    return sorted({EXPERTS if expert_of(name) is not None else name for name in names})


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """`names` (full, of linear layers) in tuples of those that must share a scheme, in the order in which they came."""
    found: dict[tuple[str, int | str], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        place = next((place for place, each in enumerate(FUSED) if last in each), None)
        found.setdefault((parent, last if place is None else place), []).append(name)
    return [tuple(each) for each in found.values()]


def check_fused(schemes: Schemes) -> None:
    """Raises LlmopsError when layers that servers run as one product, or experts, are stored differently."""
    experts = {scheme: name for name, scheme in schemes.items() if expert_of(name) is not None}
    if len(experts) > 1:
        raise LlmopsError(f"{', '.join(f'{name} {scheme}' for scheme, name in experts.items())}; expected one scheme "
                          "for all experts of a model: readers fuse them")
    for names in fused_groups(schemes):
        if len({schemes[name] for name in names}) > 1:
            listed = ", ".join(f"{name} {schemes[name]}" for name in names)
            raise LlmopsError(f"{listed}; expected one scheme for layers that servers run as one product")


# --------------------------------------------------------------------------------------------------------- reading


def schemes_of(block: Mapping[str, Any], names: Iterable[str]) -> dict[str, LayerScheme]:
    """The scheme of each layer of `names` as a compressed-tensors `quantization_config` tells it.

    Raises ModelError for a scheme that no kind here has, and for a layer that no target names.
    """
    targets: dict[str, LayerScheme] = {}
    for group in (block.get("config_groups") or {}).values():
        scheme = _read(group)
        targets |= dict.fromkeys(group.get("targets") or ["Linear"], scheme)
    ranked = sorted(targets, key=lambda target: ("re:" in target, target))
    found = {}
    for name in names:
        matches = [target for target in ranked if _matches(name, target)] or [t for t in ranked if t == "Linear"]
        if not matches:
            raise ModelError(f"{name} is stored packed, but none of the {len(targets)} targets in config.json names "
                             "it; expected its name, a re: pattern that matches it, or Linear in config_groups")
        found[name] = targets[matches[0]]
    return found


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _read(group: Mapping[str, Any]) -> LayerScheme:
    weights, kind = group.get("weights") or {}, number_formats.kind_of(group)
    if kind is not None:
        return LayerScheme(int(weights["num_bits"]), int(weights.get("group_size") or -1), True, kind)
    if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
        raise ModelError(f"weights of type {weights.get('type')!r}, strategy {weights.get('strategy')!r}; expected "
                         f"int in groups or channels")
    return LayerScheme(int(weights["num_bits"]), int(weights.get("group_size") or -1),
                       bool(weights.get("symmetric", True)))


# ----------------------------------------------------------------------------------------------------------- telling


def packed_schemes(weights: Mapping[str, AnyWeight]) -> dict[str, LayerScheme]:
    return {name: LayerScheme.of(weight) for name, weight in weights.items()}


def average_bits(weights: Mapping[str, AnyWeight]) -> float:
    """Bits a packed weight takes on average, scales and zero points counted."""
    numbers = {name: weight.codes.numel() for name, weight in weights.items()}
    total = sum(weight.bits_per_weight * numbers[name] for name, weight in weights.items())
    return float(total / sum(numbers.values()))


def told(schemes: Schemes) -> str:
    """For people: `int4 g128 symmetric`, or `int3 g32 symmetric in 20 layers, int4 g32 symmetric in 8 layers`."""
    return stored_as(quantization_config(schemes, ())) or "dense"


def stored_as(block: Mapping[str, Any]) -> str | None:
    """`told` for a compressed-tensors `quantization_config`, whatever its numbers are; None where it has no groups."""
    found: dict[str, int] = {}
    for group in (block.get("config_groups") or {}).values():
        try:
            name = str(_read(group))
        except ModelError:  # another tool's, which is told and not read
            name = " ".join(str((group.get("weights") or {}).get(key, "")) for key in ("type", "num_bits", "strategy"))
        found[name] = found.get(name, 0) + len(group.get("targets") or ["Linear"])
    if len(found) < 2:
        return next(iter(found), None)
    return ", ".join(f"{name} in {count} layers" for name, count in found.items())

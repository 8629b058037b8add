"""What may follow a quantized variant: training through the rounding, pruning that leaves the codes that stay, and
nothing that would round it again.

A healed variant is stored in the integers of its parent, so it is quantized too, and so are its own children. An
adapter left apart on packed layers is not: it is merged into a base written out in 16 bits before any step, as one on a
4-bit base is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmops.recipe.model import Dims
from llmops.recipe.schema import BASE, Variant
from llmops.recipe.source import Problems, Trail, shown

if TYPE_CHECKING:
    from llmops.methods.finetune.options import Dpo, Lora

__all__ = ["check_healing", "quantized_by"]

#: Integer weights with activations in 16 bit: the formats whose rounding can be trained.
_TRAINABLE = re.compile(r"w[2-8]a16\Z")


#: Pruning that leaves the codes that stay as they are.
_PRUNES = ("magnitude", "wanda", "depth")


def quantized_by(variants: Mapping[str, Variant], name: str, dims: Dims | None = None) -> str | None:
    """The variant whose `quantize` made the integers that `name` is stored in; None where it is in 16 bit or more.

    base stands for a model that came in integers.
    """
    seen: set[str] = set()
    while name in variants and name not in seen:
        seen.add(name)
        variant = variants[name]
        if variant.kind == "quantize":
            return name
        if not _keeps_integers(variant):
            return None
        name = variant.parent
    return BASE if name == BASE and dims is not None and dims.quantized else None


def check_healing(problems: Problems, variants: Mapping[str, Variant], variant: Variant, dims: Dims | None) -> None:
    """Steps that cannot follow a quantized parent, and options that have no meaning there."""
    made_by = quantized_by(variants, variant.parent, dims)
    if made_by is None:
        return
    trail: Trail = ("variants", variant.name, "from")
    trains = variant.method in ("lora", "full", "dpo", "logits")
    follows = trains or variant.method in _PRUNES
    if made_by == BASE:
        if not (follows and dims is not None and dims.integers):
            problems.add(trail, "given a base model that is quantized already (quantization_config or llmops_kv_cache "
                                "in its config.json); expected 16- or 32-bit weights and cache: start from the model "
                                "it was made of (it can be scored as it is: variants: {})")
            return
    elif variants[made_by].method == "kv_cache":
        dtype = variants[made_by].options.dtype
        problems.add(trail, f"given {shown(variant.parent)}, whose keys and values are kept in {dtype}, which no "
                            f"later step carries on; expected {shown(variants[made_by].parent)}, whose weights are the "
                            "same" + (f", and kv_cache: {dtype} here" if hasattr(variant.options, "scheme") else
                                      ", and this step before that one"))
        return
    elif not follows:
        problems.add(trail, _refusal(variant, made_by, variants[made_by].parent))
        return
    elif other := _beyond_integers(variants[made_by]):
        problems.add(trail, f"given {shown(variant.parent)}, {other}, whose rounding cannot be "
                            f"{'trained' if trains else 'pruned'}; expected "
                            "integer weights alone, with activations in 16 bit (w2a16 to w8a16), or to "
                            f"{'train' if trains else 'prune'} {shown(variants[made_by].parent)} and quantize the "
                            "result")
        return
    if variant.method in ("lora", "dpo"):
        _check_adapters(problems, ("variants", variant.name, variant.kind), variant.options, variant.parent)


def _keeps_integers(variant: Variant) -> bool:
    """Whether a child of a quantized parent is stored in its integers."""
    merged = variant.method in ("lora", "dpo") and variant.options.merge
    return variant.method in ("full", "logits", *_PRUNES) or merged


def _beyond_integers(variant: Variant) -> str:
    """What of a quantized variant is something else than integer weights of linear layers; empty where nothing is."""
    scheme = getattr(variant.options, "scheme", None)
    if isinstance(scheme, str) and not _TRAINABLE.match(scheme):
        return f"in {scheme}"
    if getattr(variant.options, "kv_cache", None) is not None:
        return "with keys and values rounded, too"
    return "with embeddings in few bits" if getattr(variant.options, "embeddings", False) else ""


def _refusal(variant: Variant, made_by: str, before: str) -> str:
    given = f"given {shown(variant.parent)}, "
    if variant.kind == "quantize":
        return (f"{given}which is quantized already; expected a variant in 16 bit: start from {shown(before)}, as "
                f"{'it' if made_by == variant.parent else shown(made_by)} does")
    if variant.method == "qlora":
        return (f"{given}a quantized variant, which method: qlora would round once more; expected method: lora with "
                f"merge: false, for an adapter on its integers, or method: qlora from {shown(before)}, which it "
                "rounds itself")
    return (f"{given}a quantized variant, whose packed weights {variant.kind} cannot change; expected a variant in 16 "
            f"bit: {variant.kind} from {shown(before)} and quantize the result")


def _check_adapters(problems: Problems, trail: Trail, options: Lora | Dpo, parent: str) -> None:
    on = f"after {shown(parent)}, whose weights are integers"
    if getattr(options, "dora", False) and not options.merge:
        problems.add((*trail, "dora"), f"given true {on} and have to stay as they are under an adapter apart (DoRA "
                                       "rescales whole rows of them); expected merge: true, or rslora in its place")
    if options.rank is not None and options.merge and options.dropout:
        problems.add((*trail, "dropout"), f"given {options.dropout:g} {on}: what is rounded is the sum of weight and "
                                          "adapter, which has no input of its own; expected 0, or merge: false")
    if not options.merge and getattr(options, "init", "default") == "pissa":
        problems.add((*trail, "init"), f"given pissa {on} and have to stay as they are under an adapter apart; "
                                       "expected init: default, or merge: true")

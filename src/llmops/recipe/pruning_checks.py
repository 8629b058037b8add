"""What can be wrong with a pruning step although every field has the right type, and how wide what it leaves is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmops.recipe.model import DIVIDED, LLAMA_LIKE, Dims
from llmops.recipe.schema import BASE, Variant
from llmops.recipe.source import Problems, Trail, shown

if TYPE_CHECKING:
    from llmops.methods.prune.options import Depth, Masks, Width

__all__ = ["check_depth", "check_masks", "check_width", "dims_after", "layers_after"]

#: Families that width can cut, of those whose dimensions are read; and of these, where heads fill the features.
KNOWN = LLAMA_LIKE | {"gpt_neox"}
TIED = ("gpt_neox",)
ALIVE = 0.9  # of a layer's rows have to keep a weight (`methods.prune.patterns.MOST_SILENCED`)
SHARES = ("parameters", "latency", "joules")
WORKLOAD = ("prompt_tokens", "new_tokens", "batch_size", "repeats")
WIDTHS = ("hidden", "intermediate", "heads", "kv_heads")


def layers_after(variants: Mapping[str, Variant], name: str, dims: Dims | None) -> int | None:
    """How many decoder layers the variant `name` has, or None when that is not known before it is built."""
    count = dims.layers if dims is not None else None
    for options in _above(variants, name, "depth"):
        if options.layers is None:
            return None
        return options.layers if isinstance(options.layers, int) else len(options.layers)
    return count


def dims_after(variants: Mapping[str, Variant], name: str, dims: Dims | None) -> Dims | None:
    """The dimensions of the variant `name`, None when a width was searched for: they are known once it is built."""
    if dims is None:
        return None
    for options in reversed(list(_above(variants, name, "width"))):
        if not any(getattr(options, width) is not None for width in WIDTHS):
            return None
        heads, groups = options.heads or dims.heads, options.kv_heads or dims.kv_heads
        hidden = options.hidden or dims.hidden
        if dims.family in TIED:
            heads = groups = options.heads or options.kv_heads or hidden // dims.head_dim
            hidden = heads * dims.head_dim
        dims = replace(dims, hidden=hidden, heads=heads, kv_heads=groups,
                       intermediate=options.intermediate or dims.intermediate)
    return dims


def _above(variants: Mapping[str, Variant], name: str, method: str) -> list[Any]:
    """Options of the steps of `method` from the variant up to base, nearest first."""
    found: list[Any] = []
    seen: set[str] = set()
    while name != BASE and name in variants and name not in seen:
        seen.add(name)
        if getattr(variants[name].options, "student", None) is not None:
            break  # whose weights are others; `dims` are its own
        if variants[name].method == method:
            found.append(variants[name].options)
        name = variants[name].parent
    return found


def check_masks(problems: Problems, trail: Trail, options: Masks, widths: Mapping[str, int]) -> None:
    """widths: inputs of each layer that is not ignored, empty where they are not known."""
    scope, ratios = getattr(options, "scope", "layer"), getattr(options, "ratios", "uniform")
    if options.pattern == "unstructured":
        for key, needed in (("reach", ratios == "uniform"), ("outliers", ratios != "owl")):
            if key in options.model_fields_set and needed:
                problems.add((*trail, key), f"given {key} with ratios: {ratios}, which has no use for it; expected "
                             f"ratios: {'owl' if key == 'outliers' else 'owl or sensitivity'}, or no {key}", key=True)
        _check_rows(problems, (*trail, "sparsity"), options, widths)
        return
    zeros, group = (int(part) for part in options.pattern.split(":"))
    if abs(options.sparsity - zeros / group) > 1e-9:
        problems.add((*trail, "sparsity"), f"given sparsity {options.sparsity:g} with pattern {options.pattern}; "
                     f"expected {zeros / group:g}, which is what {options.pattern} leaves: change one of the two",
                     key="sparsity" not in options.model_fields_set)
    for name, width in widths.items():
        if width % group:
            problems.add((*trail, "pattern"), f"given {options.pattern}, but {name} takes {width} inputs, no multiple "
                                              f"of {group}; expected unstructured, or {name} in `ignore`")
            break
    for key, given, plain in (("scope", scope, "layer"), ("ratios", ratios, "uniform")):
        if given != plain:
            problems.add((*trail, key), f"given {given} with pattern {options.pattern}, which fixes the sparsity of "
                                        f"every layer; expected pattern: unstructured, or {key}: {plain}")


def _check_rows(problems: Problems, trail: Trail, options: Any, widths: Mapping[str, int]) -> None:
    """A sparsity that must leave more outputs without a weight than a step allows, whatever the weights are."""
    sparsity, scope = options.sparsity, getattr(options, "scope", "layer")
    inputs = (max if scope == "global" else min)(widths.values(), default=0)
    if not inputs:
        return
    if getattr(options, "method", "") == "wanda":
        most = max(widths.values())
        if round(sparsity * most) == 0 and options.ratios == "uniform":
            problems.add(trail, f"given {sparsity:g}, which of the {most} inputs of a row at the most is none: nothing "
                                f"would be cut; expected at least {1 / most:.2g}")
        elif round(sparsity * inputs) == inputs:
            problems.add(trail, f"given {sparsity:g}, which of the {inputs} inputs of a row is all of them: every "
                                f"output would be silent; expected at most {1 - 1 / inputs:.3g}")
    elif (1 - sparsity) * inputs < ALIVE:
        problems.add(trail, f"given {sparsity:g}, which leaves {(1 - sparsity) * inputs:.2g} weights to each row of "
                            f"{inputs} inputs on average: more than a tenth of the outputs would be silent; expected "
                            f"less, at the very most {math.floor(1e4 * (1 - ALIVE / inputs)) / 1e4:g}")


def check_depth(problems: Problems, trail: Trail, options: Depth, available: int | None, dims: Dims | None) -> None:
    """available: layers of the parent, dims: of the same; None where that is not known."""
    if not _one_target(problems, trail, options, ("layers",)):
        return
    _check_workload(problems, trail, options, dims)
    if dims is not None and available is not None and dims.family in LLAMA_LIKE:
        _check_share(problems, trail, options, dims.parameters(1) / dims.parameters(available),
                     "one layer and what is around it")
    scored = options.choose != "even"
    if scored and options.data is None:
        problems.add(trail, f"given choose: {options.choose} without data; expected the calibration data beside it, as "
                            "data: calib", key=True)
    if not scored and options.data is not None:
        problems.add((*trail, "data"), f"given data with choose: {options.choose}, which reads none; expected choose: "
                                       "block_influence or perplexity, or no data", key=True)
    for key in ("contiguous", "steps"):
        if key in options.model_fields_set and not scored:
            problems.add((*trail, key), f"given {key} with choose: even, which has no scores; expected choose: "
                                        f"block_influence or perplexity, or no {key}", key=True)
    if available == 1:
        problems.add((*trail, "method"), "given depth for a parent of one layer, which leaves none to drop; expected "
                     "another method, or another parent")
        return
    has = f"the {available} layers there are" if available is not None else "the layers there are"
    place: Trail = (*trail, "layers")
    if isinstance(options.layers, int):
        if options.layers < 1 or (available is not None and options.layers > available):
            problems.add(place, f"given {options.layers}; expected how many layers to keep, from 1 to "
                                f"{available - 1 if available is not None else 'one less than there are'}")
        elif options.layers == available:
            problems.add(place, f"given {available} of {has}, which leaves none out; expected fewer, or no such step")
    elif options.layers is not None:
        _check_list(problems, place, options, available, has)


def _check_list(problems: Problems, place: Trail, options: Depth, available: int | None, has: str) -> None:
    kept = options.layers
    assert isinstance(kept, list)
    if options.choose != "even":
        problems.add((*place[:-1], "choose"), f"given {options.choose} with a list of layers, which leaves nothing to "
                                              "choose; expected layers as a number, or no choose")
    if not kept:
        problems.add(place, f"given an empty list; expected at least one of {has}")
    elif kept == list(range(available or 0)):
        problems.add(place, f"given all of {has}, which leaves none out; expected fewer, or no such step")
    for index, layer in enumerate(kept):
        if layer < 0 or (available is not None and layer >= available):
            top = f"to {available - 1}" if available is not None else "up"
            problems.add((*place, index), f"given {layer}; expected a layer from 0 {top}, the first being 0")
        elif layer in kept[:index]:
            problems.add((*place, index), f"given {layer} twice; expected each layer once: remove one")
        elif index and layer < kept[index - 1]:
            problems.add((*place, index), f"given {layer} after {kept[index - 1]}; expected the order they have in the "
                                          f"model: {sorted(set(kept))}")


def check_width(problems: Problems, trail: Trail, options: Width, dims: Dims | None) -> None:
    """dims: of the parent, None where they are not known."""
    if not _one_target(problems, trail, options, WIDTHS):
        return
    _check_workload(problems, trail, options, dims)
    searched = any(getattr(options, name) is not None for name in SHARES)
    for key in ("axes", "multiple"):
        if key in options.model_fields_set and not searched and not (key == "multiple" and options.steps > 1):
            problems.add((*trail, key), f"given {key} with a shape that leaves nothing to search; expected parameters, "
                                        f"latency or joules, or no {key}", key=True)
    if not options.axes:
        problems.add((*trail, "axes"), "given an empty list; expected at least one of hidden, intermediate, heads")
    if dims is None:
        return
    if dims.family not in KNOWN:
        problems.add((*trail, "method"), f"given width for a model of type {dims.family}, whose layers it does not "
                                         "know how to cut narrower; expected a Llama-like decoder, GPT-2, GPT-NeoX or "
                                         "a mixture of experts, or method: depth")
        return
    full = {"hidden": dims.hidden, "intermediate": dims.intermediate, "heads": dims.heads, "kv_heads": dims.kv_heads}
    fits = True
    for name, size in full.items():
        asked = getattr(options, name)
        if asked is not None and asked > size:
            problems.add((*trail, name), f"given {asked}; expected 1 to {size}, what there is to keep")
            fits = False
    named = [name for name in WIDTHS if getattr(options, name) is not None]
    if named and all(getattr(options, name) == full[name] for name in named):
        problems.add((*trail, named[0]), f"given {', '.join(f'{name} {full[name]}' for name in named)}, what the "
                     "parent has: nothing would be cut; expected less of one of them, or no such step", key=True)
        return
    _check_share(problems, trail, options, _narrowest(options, dims), "the smallest shape that is searched, "
                 f"{', '.join(options.axes)} in multiples of {options.multiple},")
    if fits:
        (_check_tied if dims.family in TIED else _check_heads)(problems, trail, options, dims)


def _check_share(problems: Problems, trail: Trail, options: Any, least: float, what: str) -> None:
    """A share of the parameters that nothing meets. least: of what is left at the most, as far as dimensions tell."""
    if options.parameters is not None and options.parameters < 0.97 * least:
        problems.add((*trail, "parameters"), f"given {options.parameters:g}; {what} has about {least:.2g} of the "
                                             "parameters: expected a larger share")


def _check_workload(problems: Problems, trail: Trail, options: Any, dims: Dims | None) -> None:
    """What is decoded to measure candidates: only where one is measured, and within the context."""
    if options.latency is None and options.joules is None:
        for key in WORKLOAD:
            if key in options.model_fields_set:
                problems.add((*trail, key), f"given {key} with a target that is not measured; expected latency or "
                                            f"joules as the target, or no {key}", key=True)
        return
    tokens = options.prompt_tokens + options.new_tokens
    if dims is not None and dims.context is not None and tokens > dims.context:
        long = "prompt_tokens" if options.prompt_tokens >= options.new_tokens else "new_tokens"
        problems.add((*trail, long if long in options.model_fields_set else "latency"),
                     f"given {options.prompt_tokens} prompt_tokens and {options.new_tokens} new_tokens, {tokens} "
                     f"together; expected at most the {dims.context} of the model's context")


def _narrowest(options: Width, dims: Dims) -> float:
    """Share of the parameters that the deepest cut of all `axes` leaves (`build/shape_search.py`)."""
    unit = options.multiple
    sizes: dict[str, int] = {axis: min(getattr(dims, axis), max(unit, getattr(dims, axis) // 8 // unit * unit))
                             for axis in ("hidden", "intermediate") if axis in options.axes}
    if "heads" in options.axes or (dims.family in TIED and "hidden" in options.axes):
        groups = max(1, dims.kv_heads // 8)
        sizes |= {"kv_heads": groups, "heads": groups * (dims.heads // dims.kv_heads)}
    return replace(dims, hidden=sizes.get("hidden", dims.hidden), heads=sizes.get("heads", dims.heads),
                   intermediate=sizes.get("intermediate", dims.intermediate),
                   kv_heads=sizes.get("kv_heads", dims.kv_heads)).parameters() / dims.parameters()


def _check_divided(problems: Problems, trail: Trail, options: Width, dims: Dims) -> None:
    """Hidden sizes that transformers does not open: heads that are there as asked, or as they are."""
    heads = options.heads or dims.heads
    hidden = options.hidden or dims.hidden
    if (options.hidden or options.heads) and hidden % heads:
        near = [size for size in (hidden // heads * heads, (hidden // heads + 1) * heads) if 0 < size <= dims.hidden]
        problems.add((*trail, "hidden" if options.hidden else "heads"),
                     f"given {hidden} hidden features with {heads} heads; expected a multiple of {heads}, as "
                     f"{' or '.join(map(str, near))}: transformers opens no {dims.family} otherwise")


def _check_tied(problems: Problems, trail: Trail, options: Width, dims: Dims) -> None:
    """hidden and heads, where the architecture makes one of the other."""
    heads = options.heads or options.kv_heads
    if options.hidden is not None and options.hidden != (heads or options.hidden // dims.head_dim) * dims.head_dim:
        asked = f" with {heads} heads" if heads else ""
        problems.add((*trail, "hidden"), f"given {options.hidden}{asked}; expected heads x {dims.head_dim}, which a "
                     f"{dims.family} has: give one of hidden and heads, hidden as a multiple of {dims.head_dim}")
    if options.kv_heads is not None and options.kv_heads != (options.heads or options.kv_heads):
        problems.add((*trail, "kv_heads"), f"given {options.kv_heads} with {options.heads} heads; a {dims.family} has "
                     "a KV head for each: give heads alone")


def _check_heads(problems: Problems, trail: Trail, options: Width, dims: Dims) -> None:
    heads, groups = options.heads or dims.heads, options.kv_heads or dims.kv_heads
    key: Trail = (*trail, "heads" if options.heads is not None else "kv_heads")
    per_group = dims.heads // dims.kv_heads
    if heads < groups:
        problems.add(key, f"given {heads} heads in {groups} KV groups; expected at least one head a group: more heads, "
                          "or fewer kv_heads")
    elif heads % groups:
        problems.add(key, f"given {heads} heads in {groups} KV groups; expected a multiple of {groups}: each of them "
                          "has the same number of heads")
    elif heads // groups > per_group:
        problems.add(key, f"given {heads} heads in {groups} KV groups, {heads // groups} each; expected at most "
                          f"{per_group} each, what a group has: heads: {groups * per_group}, or more kv_heads")
    elif dims.family in DIVIDED:
        _check_divided(problems, trail, options, dims)


def _one_target(problems: Problems, trail: Trail, options: Any, shape: Sequence[str]) -> bool:
    """Whether exactly one target is given: a shape (of one or more fields), or one share."""
    named = [name for name in shape if getattr(options, name) is not None]
    shares = [name for name in SHARES if getattr(options, name) is not None]
    targets = [*([" and ".join(named)] if named else []), *shares]
    if len(targets) == 1:
        return True
    given = ", ".join(targets) if targets else "no target"
    place: Trail = (*trail, shares[-1]) if targets else trail
    problems.add(place, f"given {given}; expected one: {', '.join(shape)}{' (together)' if len(shape) > 1 else ''}, or "
                        f"parameters, latency or joules as a share to keep, such as parameters: {shown(0.7)}", key=True)
    return False

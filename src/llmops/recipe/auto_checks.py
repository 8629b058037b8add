"""What can be wrong with a budget of bits: whether anything fits in it is arithmetic, so it is known before a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmops.methods.quantize.allocation import smallest, stored_bits
from llmops.models.schemes import fused_groups
from llmops.recipe.model import LLAMA_LIKE, Dims
from llmops.recipe.source import Problems, Trail

if TYPE_CHECKING:
    from llmops.methods.quantize.options import Auto

__all__ = ["auto_sizes", "check_auto", "layer_shapes"]

Shapes = Mapping[str, tuple[int, int]]


def check_auto(problems: Problems, trail: Trail, options: Auto, dims: Dims | None, layers: int | None) -> None:
    """layers: how many the parent has, None when that is not known."""
    if (options.bits is None) == (options.bytes is None):
        given = "neither bits nor bytes" if options.bits is None else "both bits and bytes"
        problems.add(trail, f"given {given}; expected one budget: bits, the average of a quantized weight, as bits: "
                            "3.5, or bytes, of all weights on disk", key=True)
        return
    if not options.sizes:
        problems.add((*trail, "group_size"), "given an empty list; expected at least one size, such as 128 or -1")
        return
    if options.factors is not None and options.solver not in ("gptq", "autoround"):
        why = "which folds such factors of itself" if options.solver == "awq" else "which rounds to nearest"
        problems.add((*trail, "factors"), f"given {options.factors} with solver: {options.solver}, {why}; expected "
                     "solver: gptq or autoround beside it, or no factors")
    if "iterations" in options.model_fields_set and options.solver != "autoround":
        problems.add((*trail, "iterations"), f"given {options.iterations} with solver: {options.solver}, which has no "
                     "steps; expected solver: autoround beside it, or no iterations")
    shapes = layer_shapes(dims, layers, options.ignore) if dims is not None and layers is not None else {}
    if any(size != -1 and (size < 1 or any(width % size for _, width in shapes.values())) for size in options.sizes):
        return  # told with the groups
    if dims is None or layers is None or not shapes:
        fewest = min(bits for bits, _ in options.grids())
        if options.bits is not None and options.bits <= fewest:
            problems.add((*trail, "bits"), f"given {options.bits:g}, with nothing left for scales; expected more than "
                                           f"{fewest}, the bits of the smallest candidate")
        return
    _check_budget(problems, trail, options, dims, layers)


def _check_budget(problems: Problems, trail: Trail, options: Auto, dims: Dims, layers: int) -> None:
    shapes = layer_shapes(dims, layers, options.ignore)
    least = smallest(auto_sizes(options, dims, shapes))
    weights = sum(rows * columns for rows, columns in shapes.values())
    bits, size = options.grids()[0]
    smallest_one = f"w{bits}a16 with a scale for every {'row' if size == -1 else f'{size} weights'}"
    if options.bits is not None and options.bits * weights < least:
        problems.add((*trail, "bits"), f"given {options.bits:g}; expected at least {_up(least / weights)}, all layers "
                                       f"in the smallest candidate: {smallest_one}. Give more bits, or smaller "
                                       "candidates or larger groups")
    if options.bytes is not None:
        rest = dims.parameters(layers) - weights
        if "r1" in options.rotations and dims.tied:
            rest += dims.vocab * dims.hidden  # the head, untied
        needed = rest * _scale_bits(dims) + 128 * len(shapes) + least
        if 8 * options.bytes < needed:
            problems.add((*trail, "bytes"), f"given {options.bytes:,}; expected at least {-(-needed // 8):,}: "
                                            f"{rest * _scale_bits(dims) // 8:,} that stay in 16 bit (embeddings, "
                                            f"norms), and all layers in {smallest_one}")


def layer_shapes(dims: Dims, layers: int, ignore: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer that is not ignored, by full name; empty where a family's are not known."""
    if dims.family not in LLAMA_LIKE:
        return {}
    named = {f"model.layers.{layer}.{name}": shape for layer in range(layers)
             for name, shape in dims.linear_shapes().items()}
    if not dims.tied:
        named["lm_head"] = (dims.vocab, dims.hidden)
    return {name: shape for name, shape in named.items()
            if not any(name == end or name.endswith("." + end) for end in ignore)}


def auto_sizes(options: Auto, dims: Dims, shapes: Shapes) -> list[list[int]]:
    """Bits of each group of layers that share a scheme (in rows) with each candidate."""
    return [[sum(stored_bits(*shapes[name], bits=bits, group_size=size, symmetric=options.symmetric,
                             scale_bits=_scale_bits(dims)) for name in group) for bits, size in options.grids()]
            for group in fused_groups(shapes)]


def _scale_bits(dims: Dims) -> int:
    return 32 if dims.dtype == "float32" else 16


def _up(value: float) -> str:
    """Rounded up to three decimals: a number that is enough when it is written back."""
    return f"{-(-value * 1000 // 1) / 1000:g}"

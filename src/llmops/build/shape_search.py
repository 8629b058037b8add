"""Which shape a model takes to meet a share of its parameters, its decode time or its energy.

A share leaves open where to cut. So several *paths* through the space of shapes are walked: each axis alone, all
together by the same factor, and two of them with one cut twice as deep. On each path the largest shape that meets the
target is found (by counting, or by measuring candidates beside the parent, a bisection); of these candidates the one
whose output diverges least from the parent's on calibration crops, as it is cut, is taken. That ranking before any
healing is what is cheap to know; the candidates and all figures are in the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from llmops.build.job import Job
from llmops.build.measured_cost import cost_of, largest_within, ratio_to
from llmops.errors import LlmopsError
from llmops.methods.prune.options import Width
from llmops.methods.quantize.sensitivity import divergence
from llmops.models import parity
from llmops.models.widths import Shape, opens, parameters_of, resized, shape_of, unit_of

__all__ = ["find_shape", "paths"]

CROPS = 16  # that divergences are measured on
LEAST = 1 / 8  # of an axis that a path leaves
POINTS = 256  # shapes on a path, at most

Cutter = Callable[[Any, Shape], Any]


def paths(full: Shape, axes: Sequence[str], multiple: int) -> dict[str, list[Shape]]:
    """{name: shapes, ascending, the full one left out} of every path through `axes`."""
    if full.tied and "heads" in axes:  # which go with the hidden features
        axes = list(dict.fromkeys("hidden" if axis == "heads" else axis for axis in axes))
    ways: dict[str, dict[str, float]] = {axis: {axis: 1.0} for axis in axes}
    if len(axes) > 1:
        ways["all"] = dict.fromkeys(axes, 1.0)
        ways |= {f"{axis} first": {other: 2.0 if other == axis else 1.0 for other in axes} for axis in axes}
    found = {}
    for name, powers in ways.items():
        shapes = [_scaled(full, powers, 1 - i / POINTS, multiple) for i in range(1, POINTS)]
        found[name] = _ascending(shape for shape in dict.fromkeys(reversed(shapes)) if shape != full and opens(shape))
    return {name: shapes for name, shapes in found.items() if shapes}


def _ascending(shapes: Iterable[Shape]) -> list[Shape]:
    """Those that are nowhere narrower than the one before: where heads have to divide hidden, some are."""
    found: list[Shape] = []
    for shape in shapes:
        if not found or all(shape.sizes()[letter] >= size for letter, size in found[-1].sizes().items()):
            found.append(shape)
    return found


def _scaled(full: Shape, powers: dict[str, float], factor: float, multiple: int) -> Shape:
    def size(axis: str, whole: int, step: int) -> int:
        wanted = whole * max(factor ** powers[axis], LEAST)
        return min(whole, max(step, int(wanted // step) * step))

    sizes: dict[str, int] = {}
    if "heads" in powers:
        groups = size("heads", full.kv_heads, 1)
        sizes |= {"kv_heads": groups, "heads": groups * (full.heads // full.kv_heads)}
    units = {"hidden": unit_of(resized(full, **sizes), multiple), "intermediate": multiple}
    sizes |= {axis: size(axis, getattr(full, axis), unit) for axis, unit in units.items() if axis in powers}
    return resized(full, **sizes)


def find_shape(job: Job, options: Width, crops: Tensor, cut: Cutter) -> tuple[Shape, dict[str, Any]]:
    """(the shape, what was tried: for the row, with its "events"). Raises LlmopsError when no path meets the target."""
    full, kind = shape_of(job.model), cost_of(options) or "parameters"
    target = float(getattr(options, kind))
    total = parity.count_parameters(job.model)
    tried: dict[Shape, dict[str, Any]] = {}

    def cost(shape: Shape) -> float:
        if shape not in tried:
            if kind == "parameters":
                tried[shape] = {"ratio": parameters_of(job.model, shape) / total}
            else:
                model = cut(job.model, shape)
                measured = ratio_to(lambda: nullcontext(job.model), lambda: nullcontext(model), job, options)
                tried[shape] = measured.as_dict()
        return float(tried[shape]["ratio"])

    met: dict[Shape, str] = {}
    least = 1.0
    for name, shapes in paths(full, options.axes, options.multiple).items():
        shape = largest_within(shapes, cost, target)
        if shape is not None:
            met.setdefault(shape, name)
        least = min(least, cost(shapes[0]))
    if not met:
        raise LlmopsError(f"{kind} is {target:g}; the smallest shape of the axes {', '.join(options.axes)} has "
                          f"{least:.3f}; expected a larger share, or more axes")
    kl = {shape: _divergence(job, cut(job.model, shape), crops) for shape in met} if len(met) > 1 else {}
    best = min(met, key=lambda shape: kl.get(shape, 0.0))
    record = {"target": kind, "share": target, "chosen": str(best), "unit": "nats a token",
              "tried": [{"shape": str(shape), "candidate": shape in met, "path": met.get(shape), **figures,
                         "divergence": kl.get(shape)} for shape, figures in tried.items()]}
    figures = tried[best]
    beside = f" ({figures['candidate']:.4g} against {figures['parent']:.4g} {figures['unit']}; {figures['method']})" \
        if kind != "parameters" else ""
    told = [f"{figures['ratio']:.3f} of the {kind}{beside}"]
    if kl:
        told.append("divergence of each shape as cut, nats a token: "
                    + "; ".join(f"{shape}: {kl[shape]:.3g}" for shape in sorted(kl, key=lambda each: kl[each])))
    return best, {**record, "events": told}


@torch.no_grad()  # type: ignore[untyped-decorator]
def _divergence(job: Job, model: Any, crops: Tensor) -> float:
    total: float = 0.0
    device = next(iter(job.model.parameters())).device
    for batch in crops[:CROPS].split(4):
        ids = batch.to(device)
        exact, found = (each(input_ids=ids, use_cache=False).logits for each in (job.model, model))
        total += float(divergence(exact, found))
    return total / int(crops[:CROPS].numel())

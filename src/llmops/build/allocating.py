"""The step that gives each layer its own bits: measure what fewer cost, choose within the budget, then quantize.

Every group of layers that must share a scheme (q, k and v; gate and up) is quantized once a candidate by the solver
that will do it in the end, on what the unchanged model sees; its cost is what the swap does to the model's output
(`methods/quantize/sensitivity.py`). The choice is exact (`allocation.py`), and the solver's own step makes the weights:
later layers then see what earlier ones became, which the costs, taken one at a time, did not. Candidates are kept as
8-bit codes until they were measured: a byte a weight and candidate. Where the solver's walk will rotate the weights or
fold factors into them, costs are those of a copy to which the same was done before. The table of costs does not depend
on the budget, so it is measured once for all budgets of the same parent, data and candidates.

The experts of a mixture get one scheme, all of them: readers take it so. Their cost is the sum over the blocks of what
the experts of each cost, as the choice takes costs to add up anyway; the picture shows it block by block.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmops import calibrate, swaps
from llmops.build.job import Job, Work, bar, calibration
from llmops.build.layer_schemes import check_groups
from llmops.build.preparing import prepare
from llmops.build.quantizing import autoround_step, awq_step, computed, gptq_step, rtn_step
from llmops.data.render import answer_crops
from llmops.errors import LlmopsError
from llmops.methods.quantize.allocation import allocate, smallest, stored_bits
from llmops.methods.quantize.gptq import gptq
from llmops.methods.quantize.options import Auto, Autoround, Awq, Gptq, Rtn, WeightOnly
from llmops.methods.quantize.rtn import rtn
from llmops.methods.quantize.sensitivity import divergence, fisher_cost, shift
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models.embeddings import is_tied
from llmops.models.expert_names import expert_of
from llmops.models.experts import Routing
from llmops.models.schemes import LayerScheme, average_bits, fused_groups

__all__ = ["auto_step"]

KL_CROPS = 16  # of a measurement that names none: one forward pass a swap
Candidates = dict[str, list[QuantizedWeight]]
Costs = list[list[float]]
Groups = Sequence[tuple[str, ...]]


def auto_step(job: Job, options: Auto) -> Work:
    schemes = [LayerScheme(bits, group, options.symmetric) for bits, group in options.grids()]
    shapes = _shapes(job, options)
    tokens = calibration(job, options.data, options.length)
    groups = measured_groups(shapes)
    numbers = [sum(math.prod(shapes[name]) for name in group) for group in groups]
    sizes = _sizes(shapes, groups, schemes, torch.finfo(job.storage).bits)
    budget = _budget(job, options, sum(numbers), len(shapes), smallest(sizes))
    crops, where = _crops(job, options, tokens)
    costs, measured = _remembered(job, groups, schemes,
                                  lambda: _costs(_changed(job, options, shapes, schemes, tokens), options, groups,
                                                 schemes, tokens, crops, where))
    choice = chosen_alike(costs, sizes, budget, [group[0] for group in groups])
    chosen = {name: schemes[c] for group, c in zip(groups, choice, strict=True) for name in group}
    work = _solve(job, options, chosen)
    predicted = sum(row[c] for row, c in zip(costs, choice, strict=True))
    work.allocation = {
        "sensitivity": options.sensitivity, "unit": "nats a token", "crops": list(crops.shape),
        "counted": int(where.sum()), "judge": options.judge,
        "budget": {"bits": options.bits} if options.bits is not None else {"bytes": options.bytes},
        "average_bits": average_bits(work.packed), "predicted": predicted,
        "candidates": [str(scheme) for scheme in schemes],
        "groups": [{"layers": list(group), "bits": [size / number for size in row], "cost": cost, "chosen": c}
                   for group, row, number, cost, c in zip(groups, sizes, numbers, costs, choice, strict=True)]}
    work.events.insert(1, f"bits chosen by {options.sensitivity} on {crops.shape[0]} crops of {crops.shape[1]} tokens"
                       + (f", {int(where.sum()):,} of them answers of {options.judge}" if options.judge else "")
                       + ("" if measured else " (measured before, for another budget)") + f": {_counted(chosen)}; "
                       f"expected to cost {predicted:.3g} nats a token")
    work.tokens += crops.numel() if measured else 0
    return work


def measured_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers that are swapped together: those that servers fuse, and all experts of a block."""
    names = list(names)
    experts: dict[str, list[str]] = {}
    for name in names:
        if (found := expert_of(name)) is not None:
            experts.setdefault(found[0], []).append(name)
    return [*fused_groups(name for name in names if expert_of(name) is None), *map(tuple, experts.values())]


def chosen_alike(costs: Costs, sizes: Sequence[Sequence[int]], budget: int, firsts: Sequence[str]) -> list[int]:
    """The candidate of each group as `allocate` chooses it, with one for all groups of experts. firsts: a layer of
    each."""
    apart = [place for place, name in enumerate(firsts) if expert_of(name) is None]
    together = [place for place, name in enumerate(firsts) if expert_of(name) is not None]
    dear, large = [costs[place] for place in apart], [list(sizes[place]) for place in apart]
    if together:
        dear.append([sum(column) for column in zip(*(costs[place] for place in together), strict=True)])
        large.append([sum(column) for column in zip(*(sizes[place] for place in together), strict=True)])
    found = allocate(dear, large, budget)
    choice = dict(zip(apart, found, strict=False)) | dict.fromkeys(together, found[-1])
    return [choice[place] for place in range(len(firsts))]


def _counted(chosen: dict[str, LayerScheme]) -> str:
    counts = {scheme: sum(each == scheme for each in chosen.values()) for scheme in chosen.values()}
    return ", ".join(f"{count} layers {scheme}" for scheme, count in sorted(counts.items(), key=lambda item: str(item)))


# --------------------------------------------------------------------------------------------- candidates and costs


def _remembered(job: Job, groups: Groups, schemes: Sequence[LayerScheme],
                measure: Callable[[], Costs]) -> tuple[Costs, bool]:
    """(costs, whether they were measured now): a table that another budget's build left is taken as it is."""
    asked = {"groups": [list(group) for group in groups], "candidates": [str(scheme) for scheme in schemes]}
    if job.memory is not None:
        with suppress(OSError, ValueError, KeyError):
            found = json.loads(job.memory.read_text(encoding="utf-8"))
            if {key: found[key] for key in asked} == asked:
                return found["costs"], False
    costs = measure()
    if job.memory is not None:
        with suppress(OSError):  # a full disk costs the next build its time, not this one its result
            job.memory.parent.mkdir(parents=True, exist_ok=True)
            scratch = job.memory.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps({**asked, "costs": costs}), encoding="utf-8")
            scratch.replace(job.memory)
    return costs, True


def _changed(job: Job, options: Auto, shapes: Mapping[str, Any], schemes: Sequence[LayerScheme],
             tokens: Tensor) -> Job:
    """The job with a copy of its model on which costs are measured: rotated and with factors folded, as the solver's
    walk will do to the model itself. Factors hang a little on the scheme; here they are those of a middle one."""
    if not options.rotations and options.factors is None:
        return job
    copied = replace(job, model=deepcopy(job.model))
    ready = prepare(copied, _solver_options(options), dict.fromkeys(shapes, schemes[(len(schemes) - 1) // 2]))
    if options.factors is None:
        calibrate.walk(copied.model, None, "none", lambda *_: None, ignore=options.ignore, prepare=ready.block,
                       compute=ready.compute(), progress=bar(job))
    else:
        calibrate.walk_blocks(copied.model, tokens, lambda _: None, ignore=options.ignore, prepare=ready.block,
                              tail=ready.tail, compute=ready.compute(), progress=bar(job),
                              routing=Routing(options.experts == "all"))
    return copied


def _costs(job: Job, options: Auto, groups: Groups, schemes: Sequence[LayerScheme], tokens: Tensor,
           crops: Tensor, where: Tensor) -> Costs:
    """(groups, schemes) nats a token."""
    candidates = _candidates(job, options, schemes, tokens)
    return {"kl": _kl, "gradient": _gradient}[options.sensitivity](job, candidates, groups, crops, where)


def _candidates(job: Job, options: Auto, schemes: Sequence[LayerScheme], tokens: Tensor) -> Candidates:
    """Each layer in each scheme, as the solver would make it from the unchanged model; rounded to nearest for awq."""
    found: Candidates = {}

    def update(name: str, layer: nn.Linear, H: Tensor | None) -> None:
        made = []
        for scheme in schemes:
            how: dict[str, Any] = {"bits": scheme.bits, "group_size": scheme.group_size, "clip": "mse",
                                   "symmetric": scheme.symmetric, "dtype": job.storage}
            made.append(rtn(layer.weight, **how) if H is None else gptq(layer.weight, H, **how)[0])
        found[name] = made

    if options.solver in ("gptq", "autoround"):  # of what sees the inputs, GPTQ is the quicker stand-in
        calibrate.walk(job.model, tokens, "hessian", update, ignore=options.ignore, sequential=True,
                       compute=computed(job), progress=bar(job), routing=Routing(options.experts == "all"))
    else:
        calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=bar(job))
    return found


def _crops(job: Job, options: Auto, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(crops, length) ids that costs are measured on, and where they count."""
    count = options.crops or (KL_CROPS if options.sensitivity == "kl" else len(tokens))
    if options.judge is None:
        return tokens[:count], torch.ones_like(tokens[:count], dtype=torch.bool)
    rows = job.rows(options.judge)
    crops, where = answer_crops(rows, job.tokenizer, samples=count, length=tokens.shape[1], seed=job.seed)
    if not bool(where.any()):
        raise LlmopsError(f"no answer in {crops.shape[0]} crops of {rows.name}; expected data with answers, as the "
                          "task has them: name other data in `judge`, or leave it out")
    return crops, where


def _kl(job: Job, candidates: Candidates, groups: Groups, crops: Tensor, where: Tensor) -> Costs:
    count = len(next(iter(candidates.values())))
    tried = [{name: candidates[name][c] for name in group} for group in groups for c in range(count)]
    scores = swaps.swap_scores(job.model, crops, tried, divergence, where=where, compute=computed(job),
                               progress=bar(job))
    return [scores[first:first + count] for first in range(0, len(scores), count)]


def _gradient(job: Job, candidates: Candidates, groups: Groups, crops: Tensor, where: Tensor) -> Costs:
    count = len(next(iter(candidates.values())))
    owner = {name: place for place, group in enumerate(groups) for name in group}
    shifts = torch.zeros(len(groups), count, len(crops))

    def take(crops: slice, name: str, G: Tensor) -> None:
        W = job.model.get_submodule(name).weight
        for c, candidate in enumerate(candidates[name]):
            D = candidate.dequantize().float() - W.float()
            shifts[owner[name], c, crops] += shift(G, D.to(G.device)).cpu()

    swaps.crop_gradients(job.model, crops, list(candidates), take, where=where, seed=job.seed, compute=computed(job),
                         progress=bar(job))
    return [[fisher_cost(each, int(where.sum())) for each in row] for row in shifts]


# --------------------------------------------------------------------------------------------- budget and solution


def _shapes(job: Job, options: Auto) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer to be quantized, by full name. Raises LlmopsError where a group does not fit one."""
    found = calibrate.targets(job.model, options.ignore)
    check_groups(found, *options.grids())
    return {name: (layer.out_features, layer.in_features) for name, layer in found.items()}


def _sizes(shapes: Mapping[str, tuple[int, int]], groups: Groups, schemes: Sequence[LayerScheme],
           scale_bits: int) -> list[list[int]]:
    return [[sum(stored_bits(*shapes[name], bits=scheme.bits, group_size=scheme.group_size, scale_bits=scale_bits,
                             symmetric=scheme.symmetric) for name in group) for scheme in schemes] for group in groups]


def _budget(job: Job, options: Auto, total: int, layers: int, least: int) -> int:
    """Bits for the `total` weights of `layers`. Raises LlmopsError when they are fewer than `least`, in the unit that
    was asked for."""
    if options.bits is not None:
        if options.bits * total < least:
            raise LlmopsError(f"bits is {options.bits:g}; expected at least {least / total:.4g}, what the smallest "
                              "candidates take with their scales")
        return int(options.bits * total)
    if options.bytes is None:
        raise LlmopsError("neither bits nor bytes; expected one budget, as bits: 3.5")
    rest = sum(parameter.numel() for parameter in job.model.parameters()) - total
    if "r1" in options.rotations and is_tied(job.model):
        rest += job.model.get_input_embeddings().weight.numel()  # the head, which a final norm's gain unties
    outside = rest * torch.finfo(job.storage).bits + 128 * layers  # and the shape of each layer, two int64
    if 8 * options.bytes < least + outside:
        raise LlmopsError(f"bytes is {options.bytes:,}; expected at least {-(-(least + outside) // 8):,}: "
                          f"{outside // 8:,} of what stays in 16 bit, and the smallest candidates")
    return int(8 * options.bytes - outside)


def _solver_options(options: Auto) -> WeightOnly:
    """The options of the solver's own step; the scheme among them is no layer's."""
    shared: dict[str, Any] = {"method": options.solver, "scheme": options.candidates[0], "ignore": options.ignore,
                              "symmetric": options.symmetric, "rotate": options.rotate}
    seen = {"data": options.data, "length": options.length, "experts": options.experts}
    if options.solver == "rtn":
        return Rtn(clip="mse", **shared)
    if options.solver == "awq":
        return Awq(**shared, **seen)
    if options.solver == "gptq":
        return Gptq(factors=options.factors, **shared, **seen)
    return Autoround(factors=options.factors, iterations=options.iterations, **shared, **seen)


def _solve(job: Job, options: Auto, chosen: dict[str, LayerScheme]) -> Work:
    solvers: dict[str, Callable[..., Work]] = {"rtn": rtn_step, "gptq": gptq_step, "awq": awq_step,
                                               "autoround": autoround_step}
    return solvers[options.solver](job, _solver_options(options), chosen)

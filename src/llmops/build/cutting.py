"""The steps that leave layers, features, channels and heads out: the result is an ordinary smaller model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmops import importance, swaps
from llmops.build.job import Job, Work, bar, calibrated, calibration
from llmops.build.measured_cost import Cost, cost_of, largest_within, ratio_to
from llmops.build.shape_search import find_shape
from llmops.errors import LlmopsError
from llmops.methods.prune.depth import even_layers, in_rounds, influential_layers, least_run
from llmops.methods.prune.options import Depth, Width
from llmops.methods.prune.width import keep_channels, keep_heads, widths_in_rounds
from llmops.models import parity
from llmops.models.arch import decoder_layers, renumber_layers
from llmops.models.experts import fuse_experts, split_experts
from llmops.models.narrow import Cut, narrow
from llmops.models.save import save_dense
from llmops.models.widths import Shape, check_shape, letter_of, opens, resized, shape_of, unit_of

__all__ = ["cut_to", "depth_step", "width_step"]


# -------------------------------------------------------------------------------------------------------------- depth
def depth_step(job: Job, options: Depth) -> Work:
    """Leave decoder layers out."""
    _, layers = decoder_layers(job.model)
    total, before = len(layers), parity.count_parameters(job.model)
    events: list[str] = []
    search: dict[str, Any] = {}
    count = len(options.layers) if isinstance(options.layers, list) else _layer_count(job, options, events, search)
    if count == total:
        raise LlmopsError(f"layers keeps all {total} of the parent, so that none is left out; expected fewer")
    keep, tokens = (sorted(options.layers), 0) if isinstance(options.layers, list) \
        else _chosen(job, options, count, events)
    model = renumber_layers(job.model, keep) if tokens == 0 or options.choose == "even" else job.model
    events.append(f"kept layers {', '.join(map(str, keep))} of {total}: {parity.count_parameters(model) / before:.3f}x "
                  "the parameters")
    return Work(model, partial(save_dense, model, job.tokenizer, dtype=job.storage), parity.Expected(layers=len(keep)),
                tokens=tokens, events=events, search=search)


def _layer_count(job: Job, options: Depth, events: list[str], search: dict[str, Any]) -> int:
    """How many layers stay: as asked, or the most that meet the target."""
    _, layers = decoder_layers(job.model)
    asked = [name for name in ("layers", "parameters", "latency", "joules") if getattr(options, name) is not None]
    if len(asked) != 1:
        raise LlmopsError(f"{' and '.join(asked) or 'no target'}; expected one of layers, parameters, latency, joules")
    if options.layers is not None:
        assert isinstance(options.layers, int)
        return options.layers
    total = parity.count_parameters(job.model)
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    if options.parameters is not None:
        rest = total - sum(sizes)
        fits = [n for n in range(1, len(sizes)) if rest + sum(sorted(sizes)[-n:]) <= options.parameters * total]
        if not fits:
            raise LlmopsError(f"parameters is {options.parameters}; expected more: one layer and what is around it "
                              f"are {(rest + max(sizes)) / total:.3f} of this model")
        return max(fits)
    kind = str(cost_of(options))
    target = float(getattr(options, kind))
    tried: list[dict[str, Any]] = []

    def cost(count: int) -> float:
        found: Cost = ratio_to(lambda: nullcontext(job.model), lambda: _first(job.model, count), job, options)
        tried.append({"layers": count, **found.as_dict()})
        return found.ratio

    count = largest_within(range(1, len(sizes)), cost, target)
    if count is None:
        raise LlmopsError(f"{kind} is {target}; one layer of {len(sizes)} still costs {tried[-1]['ratio']:.3f} of the "
                          "whole; expected a larger share")
    search |= {"target": kind, "share": target, "tried": tried}
    met = next(each for each in tried if each["layers"] == count)
    events.append(f"{count} layers cost {met['ratio']:.3f} of the {kind} of all ({met['candidate']:.4g} against "
                  f"{met['parent']:.4g} {met['unit']}; {met['method']})")
    return count


@contextmanager
def _first(model: nn.Module, count: int) -> Iterator[nn.Module]:
    """The model with its first `count` layers alone, for as long as the block lasts."""
    path, layers = decoder_layers(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(list(layers)[:count]))
    try:
        yield model
    finally:
        setattr(model.get_submodule(parent), name, layers)


def _chosen(job: Job, options: Depth, count: int, events: list[str]) -> tuple[list[int], int]:
    """(the layers that stay, by the number they had; tokens run to find out). Where scores are asked for, the model
    has been cut already: later rounds score what earlier ones left."""
    _, layers = decoder_layers(job.model)
    if options.choose == "even":
        return even_layers(len(layers), count), 0
    crops = calibration(job, str(options.data), options.length)
    events.append(calibrated(crops))
    kept, tokens = list(range(len(layers))), 0
    for left in in_rounds(len(layers), count, options.steps):
        stay = _round(job, options, crops, left, events)
        renumber_layers(job.model, stay)
        kept, tokens = [kept[i] for i in stay], tokens + crops.numel()
    return kept, tokens


def _round(job: Job, options: Depth, crops: Tensor, left: int, events: list[str]) -> list[int]:
    _, layers = decoder_layers(job.model)
    if left == len(layers):
        return list(range(left))
    length = len(layers) - left if options.contiguous else 1
    if options.choose == "block_influence":
        scores = importance.run_influence(job.model, crops, length, progress=bar(job))
    else:
        scores = swaps.skip_losses(job.model, crops, length, progress=bar(job))
    what = "block influence" if options.choose == "block_influence" else "loss without"
    events.append(f"{what}{f' runs of {length} layers' if options.contiguous else ' each layer'}: "
                  + ", ".join(f"{score:.3f}" for score in scores))
    return least_run(scores, length) if options.contiguous else influential_layers(scores, left)


# -------------------------------------------------------------------------------------------------------------- width
def width_step(job: Job, options: Width) -> Work:
    """Leave hidden features, FFN channels, heads and KV groups out, in rounds."""
    crops, before = calibration(job, options.data, options.length), parity.count_parameters(job.model)
    split_experts(job.model)
    full = shape_of(job.model)
    events, tokens = [calibrated(crops)], 0
    search: dict[str, Any] = {}
    shape = _asked(options, full)
    if shape is None:
        found = importance.width_importance(job.model, crops, options.aggregate, progress=bar(job))
        shape, search = find_shape(job, options, crops, lambda model, to: cut_to(model, to, found))
        events += search.pop("events")
        tokens += crops.numel() * 2
    model = job.model
    for step in _rounds(full, shape, options):
        found = importance.width_importance(model, crops, options.aggregate, progress=bar(job))
        model, tokens = cut_to(model, step, found), tokens + crops.numel()
    if found.unseen:
        events.append(f"{len(found.unseen)} experts saw no calibration token; their channels were chosen by weight: "
                      f"{', '.join(found.unseen[:4])}{', ...' if len(found.unseen) > 4 else ''}")
    fuse_experts(model)
    events.append(f"{shape}, cut from {full}: {parity.count_parameters(model) / before:.3f}x the parameters")
    return Work(model, partial(save_dense, model, job.tokenizer, dtype=job.storage), parity.Expected(), tokens=tokens,
                events=events, search=search)


def _asked(options: Width, full: Shape) -> Shape | None:
    """The shape that the options name, None where a share is asked for. Raises LlmopsError for both, or neither."""
    sizes = {name: getattr(options, name) for name in ("hidden", "intermediate", "heads", "kv_heads")}
    shares = [name for name in ("parameters", "latency", "joules") if getattr(options, name) is not None]
    named = [name for name, size in sizes.items() if size is not None]
    if len(shares) > 1 or bool(shares) == bool(named):
        raise LlmopsError(f"{' and '.join([*named, *shares]) or 'no target'}; expected a shape (hidden, intermediate, "
                          "heads, kv_heads), or one of parameters, latency, joules")
    if shares:
        return None
    shape = resized(full, **sizes)
    check_shape(shape, full)
    if shape == full:
        raise LlmopsError(f"{', '.join(f'{name} is {getattr(full, name)}' for name in named)}, what the parent has, so "
                          "that nothing is cut; expected less of one of them")
    if not opens(shape):
        raise LlmopsError(f"hidden is {shape.hidden} with {shape.heads} heads; expected a multiple of {shape.heads}, "
                          "without which transformers does not open such a model")
    return shape


def _rounds(full: Shape, target: Shape, options: Width) -> list[Shape]:
    """Shapes on the way; heads go in the last round, for their numbers are small."""
    hidden = widths_in_rounds(full.hidden, target.hidden, options.steps, unit_of(full, options.multiple))
    channels = widths_in_rounds(full.intermediate, target.intermediate, options.steps, options.multiple)
    shapes = [resized(full, hidden=h, intermediate=f) for h, f in zip(hidden, channels, strict=True)]
    return [*shapes[:-1], target]


def cut_to(model: Any, shape: Shape, found: importance.Importance) -> Any:
    """The model in another shape, cut by importance."""
    full = shape_of(model)
    heads = [keep_heads(each, full.kv_heads, shape.heads, shape.kv_heads) for each in found.heads]
    sizes = shape.sizes()
    channels = [{name: keep_channels(each, sizes[letter_of(name)]) for name, each in layer.items()}
                for layer in found.channels]
    cut = Cut(shape, keep_channels(found.hidden, shape.hidden), channels, [kept for kept, _ in heads],
              [groups for _, groups in heads])
    return narrow(model, cut, found.squares, found.means)

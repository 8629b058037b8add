"""The steps that quantize: prepare the model, then solve.

Whatever changes the weights and not the function (`llmops.build.preparing`) is done to a block just before its weights
are looked at; a solver from `llmops.methods.quantize` then gets what the calibration walk has measured.

On a CPU a block computes in float32 while it is worked on, whatever it is stored in: statistics, folds and gradients
are then exact where they can be. Scales are rounded to the stored dtype by the solvers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops import calibrate
from llmops.build.job import Job, Work, bar, calibrated, calibration
from llmops.build.kept import Kept
from llmops.build.layer_schemes import Chosen, scheme, shared
from llmops.build.preparing import Prepared, awq_factors, folded, head_awq_factors, prepare
from llmops.build.solving import Together
from llmops.methods.quantize.autoround import Product, Tuned, autoround, inputs_of
from llmops.methods.quantize.awq import awq_clip
from llmops.methods.quantize.floats import FLOATS, AnyWeight
from llmops.methods.quantize.gptq import Factor, Solved, factorize, usual
from llmops.methods.quantize.grid import Kind, group_of
from llmops.methods.quantize.hqq import hqq
from llmops.methods.quantize.options import BITSANDBYTES, Autoround, Awq, Gptq, Hqq, Rtn, Smoothquant, WeightOnly
from llmops.methods.quantize.rtn import rtn
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models import parity
from llmops.models.expert_names import expert_of
from llmops.models.experts import Routing
from llmops.models.imitated import imitate
from llmops.models.quantized import save_quantized
from llmops.models.schemes import average_bits, packed_schemes
from llmops.models.tail import Tail

__all__ = ["autoround_step", "awq_step", "computed", "gptq_step", "hqq_step", "rtn_step", "smoothquant_step"]

Weights = dict[str, AnyWeight]
INSTEAD = "rounded to nearest"  # what becomes of experts that saw too little
How = Callable[[str], dict[str, Any]]  # layer -> the keyword arguments that tell its scheme


# ---------------------------------------------------------------------------------------- from the weights alone
def rtn_step(job: Job, options: Rtn, chosen: Chosen = None) -> Work:
    if options.scheme in BITSANDBYTES:
        from llmops.build.bnb import bitsandbytes_step

        return bitsandbytes_step(job, options)

    def solve(layer: nn.Linear, how: dict[str, Any]) -> AnyWeight:
        weight: AnyWeight = rtn(layer.weight, **how, clip=options.clip, dtype=job.storage)
        return weight

    return _alone(job, options, solve, chosen)


def hqq_step(job: Job, options: Hqq) -> Work:
    def solve(layer: nn.Linear, how: dict[str, Any]) -> AnyWeight:
        return hqq(layer.weight, bits=how["bits"], group_size=how["group_size"], iterations=options.iterations,
                   dtype=job.storage)

    return _alone(job, options, solve)


def _alone(job: Job, options: WeightOnly, solve: Callable[[nn.Linear, dict[str, Any]], AnyWeight],
           chosen: Chosen = None) -> Work:
    """Every layer by itself, nothing run."""
    weights: Weights = Kept()

    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        weights[name] = solve(layer, how(name))
        return weights[name].dequantize().to(layer.weight.dtype)

    ready = prepare(job, options, chosen)
    how = _schemes(job, options, chosen, ready)
    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, prepare=ready.block,
                   compute=ready.compute(), progress=bar(job))
    return _quantized(job, options, weights, ready)


# ------------------------------------------------------------------------------------------ from what a layer sees
def gptq_step(job: Job, options: Gptq, chosen: Chosen = None) -> Work:
    weights: Weights = Kept()
    solved: dict[str, Solved] = {}

    def update(name: str, layer: nn.Linear, H: Tensor | Factor | None) -> Tensor:
        if H is None:  # an expert that saw too little
            weights[name] = rtn(layer.weight, **how(name), dtype=job.storage)
            return weights[name].dequantize().to(layer.weight.dtype)
        weights[name], solved[name] = solve(name, layer, H)
        return weights[name].dequantize().to(layer.weight.dtype)

    def settings(bits: Kind) -> dict[str, Any]:
        order, damping = usual(bits)
        return {"order": options.order or order, "damping": options.damping or damping}

    def once(H: Tensor) -> Tensor | Factor:
        """Layers that share an input share its factorisation, unless groups or widths differ from layer to layer."""
        if len(sizes) > 1 or any(settings(each) != settings(bits[0]) for each in bits):
            return H
        return factorize(H, group_size=min(sizes), **settings(bits[0]))

    bits: list[Kind] = ([each.bits for each in chosen.values()] if chosen
                        else [FLOATS.get(options.number_format or "", options.bits)])
    sizes = {each.group_size for each in chosen.values()} if chosen else {group_of(bits[0], options.group)}
    tokens, routing = calibration(job, options.data, options.length), Routing(options.experts == "all")
    ready = prepare(job, options, chosen)
    how = _schemes(job, options, chosen, ready)
    solve = Together(job.model, options.ignore, lambda name: how(name) | settings(how(name)["bits"]),
                     clip=options.clip, dtype=job.storage)
    calibrate.walk(job.model, tokens, "hessian", update, ignore=options.ignore, sequential=True, prepare=ready.block,
                   tail=ready.tail, compute=ready.compute(computed(job)), once=once, progress=bar(job), routing=routing)
    return _quantized(job, options, weights, ready, tokens, [*_troubles(solved), *routing.events(INSTEAD)])


def _troubles(solved: dict[str, Solved]) -> list[str]:
    """One event for each layer whose damping had to be raised, one for all that have inputs never seen."""
    events = [f"{name}: not positive definite with damping {', '.join(f'{value:g}' for value in each.failed)}; solved "
              f"with {each.damping:g}" for name, each in solved.items() if each.failed]
    dead = {name: each.dead for name, each in solved.items() if each.dead}
    if dead:
        events.append(f"{sum(dead.values())} input features of {len(dead)} layers were always zero in the calibration "
                      "data; their columns are rounded to nearest")
    return events


# ------------------------------------------------------------------------------------------ from what a block does
def awq_step(job: Job, options: Awq, chosen: Chosen = None) -> Work:
    """The factors of a block and the clipping after them share one Hessian."""
    weights: Weights = Kept()
    found: list[int] = []
    ends: list[int] = []

    def rounded(name: str, W: Tensor, H: Tensor | None, how: dict[str, Any]) -> Tensor:
        weights[name] = awq_clip(W, H, **how) if options.clip and H is not None else rtn(W, **how)
        return weights[name].dequantize().to(W.dtype)

    def update(block: calibrate.Block) -> None:
        H, links = awq_factors(block, options, options.grid, job.storage, chosen)
        found.append(links)
        alike = shared(options, block.layers)
        for name, layer in block.layers.items():
            how = scheme(options, chosen, name) | alike.get(name, {}) | {"dtype": job.storage}
            block.put(name, rounded(name, layer.weight, H.pop(name, None), how))

    def last(tail: Tail) -> None:
        H, links = head_awq_factors(tail, options, options.grid, job.storage, chosen)
        ends.append(links)
        tail.put(rounded(tail.name, tail.head.weight, H, scheme(options, chosen, tail.name) | {"dtype": job.storage}))

    tokens, routing = calibration(job, options.data, options.length), Routing(options.experts == "all")
    ready = prepare(job, options, chosen)
    calibrate.walk_blocks(job.model, tokens, update, ignore=options.ignore, compute=torch.float32, prepare=ready.block,
                          tail=last, progress=bar(job), routing=routing)
    events = [folded(found, ends)] if options.grid else []
    return _quantized(job, options, weights, ready, tokens, [*events, *routing.events(INSTEAD)])


def smoothquant_step(job: Job, options: Smoothquant) -> Work:
    """All of the method is in its preparation; what is left is to round."""
    weights: Weights = Kept()

    def update(block: calibrate.Block) -> None:
        alike = shared(options, block.layers)
        for name, layer in block.layers.items():
            how = scheme(options, None, name) | alike.get(name, {})
            weights[name] = rtn(layer.weight, **how, clip=options.clip, dtype=job.storage)
            block.put(name, weights[name].dequantize().to(layer.weight.dtype))

    def last(tail: Tail) -> None:
        ready.tail(tail)
        weights[tail.name] = rtn(tail.head.weight, **scheme(options, None, tail.name), clip=options.clip,
                                 dtype=job.storage)
        tail.put(weights[tail.name].dequantize().to(tail.head.weight.dtype))

    tokens, routing = calibration(job, options.data, options.length), Routing(options.experts == "all")
    ready = prepare(job, options)
    calibrate.walk_blocks(job.model, tokens, update, ignore=options.ignore, compute=ready.compute(),
                          prepare=ready.block, tail=last, progress=bar(job), routing=routing)
    return _quantized(job, options, weights, ready, tokens, routing.events("left without factors"))


def autoround_step(job: Job, options: Autoround, chosen: Chosen = None) -> Work:
    weights: Weights = Kept()
    tuned: list[Tuned] = []

    def update(block: calibrate.Block) -> None:
        def loss(product: Product, batch: int) -> Tensor:
            out = block.run(batch, product, list(tuning))
            return nn.functional.mse_loss(out.float(), block.targets[batch].to(out.device).float())

        inside = [name for name in block.layers if expert_of(name) is not None]
        few = [name for name, seen in block.measure("x_absmax", inside).items() if seen is None] if inside else []
        for name in few:
            weights[name] = rtn(block.layers[name].weight, **scheme(options, chosen, name), dtype=job.storage)
            block.put(name, weights[name].dequantize().to(block.layers[name].weight.dtype))
        tuning = {name: layer.weight for name, layer in block.layers.items() if name not in few}
        made, report = autoround(tuning, loss, block.batches, bits=options.bits, group_size=options.group,
                                 symmetric=options.symmetric, iterations=options.iterations,
                                 seed=job.seed + block.index, dtype=job.storage,
                                 schemes={name: scheme(options, chosen, name) for name in tuning})
        tuned.append(report)
        for name, weight in made.items():
            weights[name] = weight
            block.put(name, weight.dequantize().to(block.layers[name].weight.dtype))

    def last(tail: Tail) -> None:
        """A head is a block of one layer, whose output's error is a quadratic form of its inputs: no pass is needed."""
        ready.tail(tail)
        W, X = tail.head.weight.detach().float(), inputs_of(tail.measure("hessian"))
        exact = X @ W.t()

        def loss(product: Product, _: int) -> Tensor:
            return (product(tail.name, X) - exact).square().sum(0).mean()

        made, report = autoround({tail.name: W}, loss, 1, **scheme(options, chosen, tail.name),
                                 iterations=options.iterations, seed=job.seed + len(tuned), dtype=job.storage)
        tuned.append(report)
        weights[tail.name] = made[tail.name]
        tail.put(weights[tail.name].dequantize().to(tail.head.weight.dtype))

    tokens, routing = calibration(job, options.data, options.length), Routing(options.experts == "all")
    ready = prepare(job, options, chosen)
    calibrate.walk_blocks(job.model, tokens, update, ignore=options.ignore, batch_size=options.batch_size,
                          compute=ready.compute(computed(job)), targets=True, prepare=ready.block, tail=last,
                          progress=bar(job), routing=routing)
    gained = ", ".join(f"{each.start:.3g} to {each.best:.3g}" for each in tuned)
    return _quantized(job, options, weights, ready, tokens, [f"squared error of each block's output: {gained}",
                                                             *routing.events(INSTEAD)])


# ------------------------------------------------------------------------------------------ what all of them share
def _schemes(job: Job, options: WeightOnly, chosen: Chosen, ready: Prepared) -> How:
    """What each layer is rounded to; where that hangs on its weights, as they are once its block is prepared."""
    alike = shared(options, {name: module for name, module in job.model.named_modules()
                             if isinstance(module, nn.Linear)})
    if alike and ready.steps:
        ready.looks.append(lambda block: alike.update(shared(options, block.layers)))
    return lambda name: scheme(options, chosen, name) | alike.get(name, {})


def computed(job: Job) -> torch.dtype | None:
    """The type that blocks compute in while they are worked on; None for the one they are stored in."""
    return torch.float32 if job.model.device.type == "cpu" else None


def _quantized(job: Job, options: WeightOnly, found: Weights, ready: Prepared, tokens: Tensor | None = None,
               events: Sequence[str] = ()) -> Work:
    weights: Weights = {name: replace(weight, activation_bits=8)
                        if options.scheme == "w8a8" and isinstance(weight, QuantizedWeight) else weight
                        for name, weight in found.items()}
    imitate(job.model, weights)
    schemes = set(packed_schemes(weights).values())
    if len(schemes) > 1:
        told = [f"{len(weights)} linear layers in {average_bits(weights):.2f} bits on average, scales counted"]
    else:
        one = str(schemes.pop()) if options.number_format is not None else f"{options.bits} bits"
        told = [f"{len(weights)} linear layers in {one}"]
    if tokens is not None:
        told.append(calibrated(tokens))
        widest = max(weight.shape[1] for weight in weights.values())
        if tokens.numel() < widest:
            told.append(f"{tokens.numel()} calibration tokens are fewer than the {widest} inputs of the widest layer: "
                        "what they say of it is thin")
    if any(expert_of(name) is not None and not weight.symmetric for name, weight in weights.items()):
        told.append("experts with zero points: llmops.load runs them, transformers 5.17 with compressed-tensors 0.20 "
                    "refuses the folder (it takes no weight_zero_point of an expert); symmetric: true is read by both")
    return Work(job.model, partial(save_quantized, job.model, weights, tokenizer=job.tokenizer),
                parity.Expected(bits={name: weight.bits for name, weight in weights.items()},
                                number_format=options.number_format),
                tokens=0 if tokens is None else tokens.numel(), events=[*told, *ready.events(), *events],
                packed=weights)

"""The steps that quantize: a solver from `llmops.methods.quantize`, given what the calibration walk has measured.

On a CPU a block computes in float32 while it is worked on, whatever it is stored in: statistics, folds and gradients
are then exact where they can be. Scales are rounded to the stored dtype by the solvers themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops import calibrate
from llmops.build.job import Job, Work, bar, calibrated, calibration
from llmops.methods.quantize.autoround import Tuned, autoround
from llmops.methods.quantize.awq import awq_clip, awq_scales
from llmops.methods.quantize.floats import FLOATS, AnyWeight
from llmops.methods.quantize.gptq import Solved, gptq
from llmops.methods.quantize.hqq import hqq
from llmops.methods.quantize.options import Autoround, Awq, Gptq, Hqq, Rtn, WeightOnly
from llmops.methods.quantize.rtn import rtn
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models import parity
from llmops.models.fold import find_links, fold
from llmops.models.imitated import imitate
from llmops.models.quantized import save_quantized
from llmops.models.schemes import LayerScheme, average_bits, fused_groups, packed_schemes

__all__ = ["autoround_step", "awq_step", "computed", "gptq_step", "hqq_step", "rtn_step"]

Weights = dict[str, AnyWeight]
Chosen = Mapping[str, LayerScheme] | None  # a scheme for each layer, in place of the one that the options name


def _scheme(options: WeightOnly, chosen: Chosen, name: str) -> dict[str, Any]:
    """The keyword arguments that tell a solver the scheme of a layer."""
    if chosen is None:
        return {"bits": FLOATS.get(options.number_format or "", options.bits), "group_size": options.group,
                "symmetric": options.symmetric}
    scheme = chosen[name]
    return {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}


def rtn_step(job: Job, options: Rtn, chosen: Chosen = None) -> Work:
    weights: Weights = {}
    shared = _shared(options, _linears(job.model))

    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        how = _scheme(options, chosen, name) | shared.get(name, {})
        weights[name] = rtn(layer.weight, **how, clip=options.clip)
        return weights[name].dequantize().to(layer.weight.dtype)

    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=bar(job))
    return _quantized(job, options, weights)


def hqq_step(job: Job, options: Hqq) -> Work:
    weights: Weights = {}

    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        weights[name] = hqq(layer.weight, bits=options.bits, group_size=options.group, iterations=options.iterations)
        return weights[name].dequantize().to(layer.weight.dtype)

    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=bar(job))
    return _quantized(job, options, weights)


def gptq_step(job: Job, options: Gptq, chosen: Chosen = None) -> Work:
    weights: Weights = {}
    solved: dict[str, Solved] = {}
    shared = _shared(options, _linears(job.model))

    def update(name: str, layer: nn.Linear, H: Tensor | None) -> Tensor:
        assert H is not None
        how = _scheme(options, chosen, name) | shared.get(name, {})
        weights[name], solved[name] = gptq(layer.weight, H, **how, damping=options.damping, order=options.order,
                                           clip=options.clip, dtype=job.storage)
        return weights[name].dequantize().to(layer.weight.dtype)

    tokens = calibration(job, options.data, options.length)
    calibrate.walk(job.model, tokens, "hessian", update, ignore=options.ignore, sequential=True,
                   compute=computed(job), progress=bar(job))
    return _quantized(job, options, weights, tokens, _troubles(solved))


def _troubles(solved: dict[str, Solved]) -> list[str]:
    """One event for each layer whose damping had to be raised, one for all that have inputs never seen."""
    events = [f"{name}: not positive definite with damping {', '.join(f'{value:g}' for value in each.failed)}; solved "
              f"with {each.damping:g}" for name, each in solved.items() if each.failed]
    dead = {name: each.dead for name, each in solved.items() if each.dead}
    if dead:
        events.append(f"{sum(dead.values())} input features of {len(dead)} layers were always zero in the calibration "
                      "data; their columns are rounded to nearest")
    return events


def awq_step(job: Job, options: Awq, chosen: Chosen = None) -> Work:
    weights: Weights = {}
    found: list[int] = []

    def update(block: calibrate.Block) -> None:
        turns = block.turns()
        seen = block.measure("hessian", [turn[0] for turn in turns])
        H = {name: seen[turn[0]] for turn in turns for name in turn}
        found.append(_folded(block, options, H, job.storage, chosen) if options.grid else 0)
        shared = _shared(options, block.layers)
        for name, layer in block.layers.items():
            how = _scheme(options, chosen, name) | shared.get(name, {}) | {"dtype": job.storage}
            weights[name] = awq_clip(layer.weight, H[name], **how) if options.clip else rtn(layer.weight, **how)
            block.put(name, weights[name].dequantize().to(layer.weight.dtype))

    tokens = calibration(job, options.data, options.length)
    calibrate.walk_blocks(job.model, tokens, update, ignore=options.ignore, compute=torch.float32, progress=bar(job))
    events = [f"factors folded into {sum(found)} norms and layers of {len(found)} blocks"] if options.grid else []
    return _quantized(job, options, weights, tokens, events)


def _folded(block: calibrate.Block, options: Awq, H: dict[str, Tensor], storage: torch.dtype, chosen: Chosen) -> int:
    """Fold the best factors of every link of a block, and change H with the inputs. Returns how many were folded."""
    count = 0
    for link in find_links(block.module, block.run):
        targets = [f"{block.name}.{name}" for name in link.targets]
        quantized = [name for name in targets if name in block.layers]
        if not quantized:
            continue
        scales = awq_scales([block.layers[name].weight for name in quantized], H[quantized[0]],
                            **_scheme(options, chosen, quantized[0]), steps=options.grid, shared=link.shared,
                            dtype=storage)
        if scales.alpha:
            s = fold(block.module, link, scales.s, storage)
            changed = H[targets[0]] / torch.outer(s, s)
            H.update(dict.fromkeys(targets, changed))
            count += 1
    return count


def autoround_step(job: Job, options: Autoround) -> Work:
    weights: Weights = {}
    tuned: list[Tuned] = []

    def update(block: calibrate.Block) -> None:
        def loss(candidate: Mapping[str, Tensor], batch: int) -> Tensor:
            out = block.run(batch, candidate)
            return nn.functional.mse_loss(out.float(), block.targets[batch].to(out.device).float())

        made, report = autoround({name: layer.weight for name, layer in block.layers.items()}, loss, block.batches,
                                 bits=options.bits, group_size=options.group, symmetric=options.symmetric,
                                 iterations=options.iterations, seed=job.seed + block.index, dtype=job.storage)
        tuned.append(report)
        for name, weight in made.items():
            weights[name] = weight
            block.put(name, weight.dequantize().to(block.layers[name].weight.dtype))

    tokens = calibration(job, options.data, options.length)
    calibrate.walk_blocks(job.model, tokens, update, ignore=options.ignore, batch_size=options.batch_size,
                          compute=computed(job), targets=True, progress=bar(job))
    gained = ", ".join(f"{each.start:.3g} to {each.best:.3g}" for each in tuned)
    return _quantized(job, options, weights, tokens, [f"squared error of each block's output: {gained}"])


def _shared(options: WeightOnly, layers: Mapping[str, nn.Linear]) -> dict[str, dict[str, Any]]:
    """For formats with a scale of the whole weight: the same scale for q, k and v, and for gate and up, as a keyword
    argument for the solver. Servers run them as one product, and round again where their scales differ."""
    kind = FLOATS.get(options.number_format or "")
    if kind is None or not kind.whole:
        return {}
    return {name: {"bits": replace(kind, reach=max(float(layers[each].weight.detach().abs().max()) for each in names))}
            for names in fused_groups(layers) for name in names}


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def computed(job: Job) -> torch.dtype | None:
    """The type that blocks compute in while they are worked on; None for the one they are stored in."""
    return torch.float32 if job.model.device.type == "cpu" else None


def _quantized(job: Job, options: WeightOnly, found: Weights, tokens: Tensor | None = None,
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
    return Work(job.model, partial(save_quantized, job.model, weights, tokenizer=job.tokenizer),
                parity.Expected(bits={name: weight.bits for name, weight in weights.items()},
                                number_format=options.number_format),
                tokens=0 if tokens is None else tokens.numel(), events=[*told, *events], packed=weights)

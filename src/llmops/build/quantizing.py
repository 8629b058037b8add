"""The steps that quantize: a solver from `llmops.methods.quantize`, given what the calibration walk has measured.

On a CPU a block computes in float32 while it is worked on, whatever it is stored in: statistics, folds and gradients
are then exact where they can be. Scales are rounded to the stored dtype by the solvers themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from llmops import calibrate
from llmops.build.job import Job, Work, bar, calibrated, calibration
from llmops.methods.quantize.autoround import Tuned, autoround
from llmops.methods.quantize.awq import awq_clip, awq_scales
from llmops.methods.quantize.gptq import Solved, gptq
from llmops.methods.quantize.hqq import hqq
from llmops.methods.quantize.options import Autoround, Awq, Gptq, Hqq, Rtn
from llmops.methods.quantize.rtn import rtn
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models import parity
from llmops.models.fold import find_links, fold
from llmops.models.quantized import save_quantized

__all__ = ["autoround_step", "awq_step", "gptq_step", "hqq_step", "rtn_step"]

Weights = dict[str, QuantizedWeight]


def rtn_step(job: Job, options: Rtn) -> Work:
    weights: Weights = {}

    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        weights[name] = rtn(layer.weight, bits=options.bits, group_size=options.group, symmetric=options.symmetric,
                            clip=options.clip)
        return weights[name].dequantize().to(layer.weight.dtype)

    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=bar(job))
    return _quantized(job, options.bits, weights)


def hqq_step(job: Job, options: Hqq) -> Work:
    weights: Weights = {}

    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        weights[name] = hqq(layer.weight, bits=options.bits, group_size=options.group, iterations=options.iterations)
        return weights[name].dequantize().to(layer.weight.dtype)

    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=bar(job))
    return _quantized(job, options.bits, weights)


def gptq_step(job: Job, options: Gptq) -> Work:
    weights: Weights = {}
    solved: dict[str, Solved] = {}

    def update(name: str, layer: nn.Linear, H: Tensor | None) -> Tensor:
        assert H is not None
        weights[name], solved[name] = gptq(layer.weight, H, bits=options.bits, group_size=options.group,
                                           symmetric=options.symmetric, damping=options.damping, order=options.order,
                                           clip=options.clip, dtype=job.storage)
        return weights[name].dequantize().to(layer.weight.dtype)

    tokens = calibration(job, options.data, options.length)
    calibrate.walk(job.model, tokens, "hessian", update, ignore=options.ignore, sequential=True,
                   compute=_compute(job), progress=bar(job))
    return _quantized(job, options.bits, weights, tokens, _troubles(solved))


def _troubles(solved: dict[str, Solved]) -> list[str]:
    """One event for each layer whose damping had to be raised, one for all that have inputs never seen."""
    events = [f"{name}: not positive definite with damping {', '.join(f'{value:g}' for value in each.failed)}; solved "
              f"with {each.damping:g}" for name, each in solved.items() if each.failed]
    dead = {name: each.dead for name, each in solved.items() if each.dead}
    if dead:
        events.append(f"{sum(dead.values())} input features of {len(dead)} layers were always zero in the calibration "
                      "data; their columns are rounded to nearest")
    return events


def awq_step(job: Job, options: Awq) -> Work:
    weights: Weights = {}
    found: list[int] = []
    solve = partial(awq_clip if options.clip else rtn, bits=options.bits, group_size=options.group,
                    symmetric=options.symmetric, dtype=job.storage)

    def update(block: calibrate.Block) -> None:
        turns = block.turns()
        seen = block.measure("hessian", [turn[0] for turn in turns])
        H = {name: seen[turn[0]] for turn in turns for name in turn}
        found.append(_folded(block, options, H, job.storage) if options.grid else 0)
        for name, layer in block.layers.items():
            weights[name] = solve(layer.weight, H[name]) if options.clip else solve(layer.weight)
            block.put(name, weights[name].dequantize().to(layer.weight.dtype))

    tokens = calibration(job, options.data, options.length)
    calibrate.walk_blocks(job.model, tokens, update, ignore=options.ignore, compute=torch.float32, progress=bar(job))
    events = [f"factors folded into {sum(found)} norms and layers of {len(found)} blocks"] if options.grid else []
    return _quantized(job, options.bits, weights, tokens, events)


def _folded(block: calibrate.Block, options: Awq, H: dict[str, Tensor], storage: torch.dtype) -> int:
    """Fold the best factors of every link of a block, and change H with the inputs. Returns how many were folded."""
    count = 0
    for link in find_links(block.module, block.run):
        targets = [f"{block.name}.{name}" for name in link.targets]
        quantized = [name for name in targets if name in block.layers]
        if not quantized:
            continue
        scales = awq_scales([block.layers[name].weight for name in quantized], H[quantized[0]], bits=options.bits,
                            group_size=options.group, symmetric=options.symmetric, steps=options.grid,
                            shared=link.shared, dtype=storage)
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
                          compute=_compute(job), targets=True, progress=bar(job))
    gained = ", ".join(f"{each.start:.3g} to {each.best:.3g}" for each in tuned)
    return _quantized(job, options.bits, weights, tokens, [f"squared error of each block's output: {gained}"])


def _compute(job: Job) -> torch.dtype | None:
    return torch.float32 if job.model.device.type == "cpu" else None


def _quantized(job: Job, bits: int, weights: Weights, tokens: Tensor | None = None,
               events: Sequence[str] = ()) -> Work:
    told = [f"{len(weights)} linear layers in {bits} bits"]
    if tokens is not None:
        told.append(calibrated(tokens))
        widest = max(weight.shape[1] for weight in weights.values())
        if tokens.numel() < widest:
            told.append(f"{tokens.numel()} calibration tokens are fewer than the {widest} inputs of the widest layer: "
                        "what they say of it is thin")
    return Work(job.model, partial(save_quantized, job.model, weights, tokenizer=job.tokenizer),
                parity.Expected(bits={name: weight.bits for name, weight in weights.items()}),
                tokens=0 if tokens is None else tokens.numel(), events=[*told, *events], packed=weights)

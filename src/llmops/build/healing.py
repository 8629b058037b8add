"""Training a quantized parent: what rounding lost is won back with the rounding in place.

    full, logits   all latent weights, scales, norms and embeddings: quantization-aware training, or distillation
    lora           the latent weight is W + s B A, W frozen; scales are trained, what is not quantized is frozen
    lora, apart    an adapter on top of the packed layers, whose bytes stay as they are

The first two are stored as the parent was, in its bits and groups, layer by layer: the codes that the trained model
computes with (`models/fake_quant.py`). The third is a PEFT folder on the parent's build (`models/packed_lora.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from llmops.build.distilling import logits_step
from llmops.build.job import Job, Work
from llmops.build.lora import adapted_model, rate_scale_of, trained_parameters
from llmops.build.training import Rows as TrainingRows
from llmops.build.training import Trained, keeping_zeros, run_fit, trainable, training_rows, work_of
from llmops.errors import StepError
from llmops.methods.distill.options import Logits
from llmops.methods.finetune.lora import merge_lora, zero_masks
from llmops.methods.finetune.options import Full, Lora, Training
from llmops.methods.finetune.starts import start_pissa
from llmops.models import parity
from llmops.models.fake_quant import (
    FakeQuantLinear,
    adapt,
    fake_quantized,
    fold_adapters,
    harden,
    packed_layers,
    refuse_unknown,
    same_but,
    soften,
)
from llmops.models.quantized import save_quantized
from llmops.models.save import save_adapter
from llmops.models.token_loss import next_token_loss
from llmops.models.zeros import keep_masks
from llmops.train import Loss

__all__ = ["hardened", "heal_full_step", "heal_logits_step", "heal_lora_step", "learn_scales", "softened"]

LEARN_SCALES = True  # measured in LOG.md


def heal_full_step(job: Job, options: Full) -> Work:
    """Every weight is trained, the quantized ones through their rounding."""
    return _train_all(job, options, next_token_loss)


def heal_logits_step(job: Job, options: Logits) -> Work:
    """The same, towards the teacher's distribution."""
    return logits_step(job, options, _train_all)


def heal_lora_step(job: Job, options: Lora) -> Work:
    """Adapters on a quantized parent: rounded together with its weights, or kept apart from them."""
    if options.init == "loftq":
        raise StepError("init: loftq rounds the base itself, and this one is rounded already; use init: default")
    if options.dora and not options.merge:
        raise StepError("dora: true rescales the rows of a weight, and under an adapter apart they are integers that "
                        "stay; use merge: true, which rounds the rescaled rows, or rslora")
    return _rounded(job, options) if options.merge else _apart(job, options)


def _train_all(job: Job, options: Training, loss: Loss, rows: TrainingRows | None = None) -> Work:
    rows = training_rows(job, options) if rows is None else rows
    start, events = softened(job)
    model = trainable(job.model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    learn_scales(fake_quantized(model))
    dense = {name: mask for name, mask in zero_masks(model).items() if name not in start} if job.keeps_zeros else {}
    done = run_fit(job, options, model, rows, loss, keeping_zeros(model, dense))
    done.events.extend(events)
    return hardened(job, model, done, start, backward=2.0)


def _rounded(job: Job, options: Lora) -> Work:
    if options.dropout:
        raise StepError(f"dropout: {options.dropout:g} on adapters that are rounded with their weight, which have no "
                        "input of their own; use dropout: 0, or merge: false")
    rows = training_rows(job, options)
    start, events = softened(job)
    model = trainable(job.model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted = adapted_model(model, job, options)
    reached = adapt(adapted)
    if not reached:
        raise StepError(f"targets {options.targets} name no quantized layer; expected one of "
                        f"{', '.join(sorted({name.rpartition('.')[2] for name in start}))}, or all-linear")
    if options.init == "pissa":
        start_pissa(adapted)
    learn_scales(reached)
    done = run_fit(job, options, adapted, rows, rate_scale=rate_scale_of(options))
    done.events.extend([trained_parameters(adapted, options), *events])
    fold_adapters(adapted)
    return hardened(job, merge_lora(adapted), done, start, backward=1.0)


def _apart(job: Job, options: Lora) -> Work:
    """The packed layers are run as they are; the gradient passes through them to the adapters below."""
    if options.init == "pissa":
        raise StepError("init: pissa takes the adapter's start off the base, whose integers have to stay as they are; "
                        "use init: default, or merge: true")
    if job.keeps_zeros:
        raise StepError("an adapter apart fills the zeros of a pruned parent; use merge: true, which keeps them")
    refuse_unknown(job.model)
    rows = training_rows(job, options)
    model = trainable(job.model, frozen=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    from llmops.models.packed_lora import CUSTOM, targets_of  # brings PEFT

    adapted = adapted_model(model, job, options, targets=targets_of(model, options.targets), custom=CUSTOM)
    done = run_fit(job, options, adapted, rows, rate_scale=rate_scale_of(options))
    done.events.extend([trained_parameters(adapted, options), f"on {len(packed_layers(model))} packed layers, whose "
                        "codes and scales stayed as they were"])
    save = partial(save_adapter, adapted, job.tokenizer, base=job.base_source, revision=job.revision)
    return work_of(job, adapted, save, done, backward=1.0, expected=parity.Expected(adapter_rank=options.rank))


def softened(job: Job) -> tuple[dict[str, Tensor], list[str]]:
    """Make the job's model trainable, in place: (codes it starts with, by layer, int8; events)."""
    packed = packed_layers(job.model)
    before = job.unrounded() if job.unrounded is not None else None
    events, near, keep = [], {}, {}
    if before is not None and same_but(job.model, before, packed):
        near = {name: before.get_submodule(name).weight.detach() for name in packed}
        events.append("latent weights begin near those that were quantized")
    else:
        events.append("latent weights begin anywhere in their cells: what was quantized "
                      + ("is not there" if before is None else "has other weights around it"))
    if job.zeros is not None:
        keep = keep_masks(job.zeros, {name: (layer.out_features, layer.in_features) for name, layer in packed.items()})
    elif job.keeps_zeros and before is not None and not job.pruned_as_quantized:
        keep = zero_masks(before)
    elif job.keeps_zeros:
        why = ("it was pruned once it was quantized" if job.pruned_as_quantized else
               "the variant that was pruned is not there")
        keep = {name: layer.dequantized() != 0 for name, layer in packed.items()}
        events.append(f"{why}: all weights that are zero now stay zero, those that "
                      "rounding made so too")
    layers = soften(job.model, keep=keep, near=near, seed=job.seed)
    if keep:
        held = sum(int((~layer.keep).sum()) for layer in layers.values() if layer.keep is not None)
        events.append(f"{held:,} pruned weights were held at zero")
    return {name: layer.settled().codes for name, layer in layers.items()}, events


def learn_scales(layers: Iterable[FakeQuantLinear]) -> None:
    for layer in layers:
        layer.log_scale.requires_grad_(LEARN_SCALES)


def hardened(job: Job, model: Any, done: Trained, start: Mapping[str, Tensor], backward: float) -> Work:
    """Codes in the place of the latent weights, and the folder of the parent's scheme that holds them."""
    weights = harden(model, job.storage)
    changed = sum(int((weights[name].codes != codes).sum()) for name, codes in start.items())
    total = sum(codes.numel() for codes in start.values())
    bits = {name: weight.bits for name, weight in weights.items()}
    done.events.append(f"{len(weights)} linear layers in {', '.join(map(str, sorted(set(bits.values()))))} bits; "
                       f"{changed / total:.1%} of "
                       "their codes are others than the parent's")
    work = work_of(job, model, partial(save_quantized, model, weights, tokenizer=job.tokenizer), done,
                   backward=backward, expected=parity.Expected(bits=bits))
    work.packed = {**weights}
    return work

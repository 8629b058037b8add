"""Preferences on a quantized parent: `finetune: {method: dpo}` with the rounding in place.

DPO compares what is trained with the parent, so both have to be rounded alike, and they are: the parent is made
trainable first (`healing.py`), which changes nothing that it computes, and the reference's log-probabilities are those
of that model before its first step, in the same arithmetic. So the reward margin begins at 0, as it should.

    rank: null     all latent weights and scales are trained through their rounding
    merge: true    the adapters are rounded together with the weight they are on
    merge: false   adapters on top of the packed layers, whose bytes stay as they are
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from llmops.build.healing import hardened, learn_scales, softened
from llmops.build.job import Job, Work
from llmops.build.preferences import adapters_of, learn, saved_apart
from llmops.build.training import Rows, keeping_zeros, run_fit, trainable
from llmops.errors import StepError
from llmops.methods.finetune.lora import merge_lora, zero_masks
from llmops.methods.finetune.options import Dpo
from llmops.models.fake_quant import adapt, fake_quantized, fold_adapters, packed_layers, refuse_unknown
from llmops.train import Loss

__all__ = ["heal_dpo_step"]


def heal_dpo_step(job: Job, options: Dpo) -> Work:
    """Learn from pairs through the rounding, or beside it. Raises StepError for dropout on adapters that are rounded
    with their weight, zeros under an adapter apart, and formats whose rounding cannot be trained."""
    if options.rank is not None and not options.merge:
        return _apart(job, options)
    if options.rank is not None and options.dropout:
        raise StepError(f"dropout: {options.dropout:g} on adapters that are rounded with their weight, which have no "
                        "input of their own; use dropout: 0, or merge: false")
    start: dict[str, Tensor] = {}
    events: list[str] = []

    def prepared() -> Any:
        codes, told = softened(job)
        start.update(codes)
        events.extend(told)
        model = trainable(job.model)
        for parameter in model.parameters():
            parameter.requires_grad_(options.rank is None)
        learn_scales(fake_quantized(model))
        return model

    def whole(job: Job, options: Dpo, loss: Loss, rows: Rows) -> Work:
        model = job.model
        dense = {name: mask for name, mask in zero_masks(model).items() if name not in start} if job.keeps_zeros else {}
        done = run_fit(job, options, model, rows, loss, keeping_zeros(model, dense))
        done.events.extend(events)
        return hardened(job, model, done, start, backward=2.0)

    def rounded(job: Job, options: Dpo, loss: Loss, rows: Rows) -> Work:
        adapted = adapters_of(job, options)
        reached = adapt(adapted)
        if not reached:
            raise StepError(f"targets {options.targets} name no quantized layer; expected one of "
                            f"{', '.join(sorted({name.rpartition('.')[2] for name in start}))}, or all-linear")
        learn_scales(reached)
        done = run_fit(job, options, adapted, rows, loss)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        done.events.extend([f"{trained:,} parameters trained (rank {options.rank})", *events])
        fold_adapters(adapted)
        return hardened(job, merge_lora(adapted), done, start, backward=1.0)

    return learn(job, options, prepared, whole if options.rank is None else rounded)


def _apart(job: Job, options: Dpo) -> Work:
    if job.keeps_zeros:
        raise StepError("an adapter apart fills the zeros of a pruned parent; use merge: true, which keeps them")
    refuse_unknown(job.model)

    def packed(job: Job, options: Dpo, loss: Loss, rows: Rows) -> Work:
        from llmops.models.packed_lora import CUSTOM, targets_of  # brings PEFT

        adapted = adapters_of(job, options, targets=targets_of(job.model, options.targets), custom=CUSTOM)
        done = run_fit(job, options, adapted, rows, loss)
        done.events.append(f"on {len(packed_layers(job.model))} packed layers, whose codes and scales stayed as they "
                           "were")
        return saved_apart(job, options, adapted, done)

    return learn(job, options, partial(trainable, job.model, frozen=True), packed)

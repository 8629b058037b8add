"""The steps that train adapters: LoRA on a base in 16 or 32 bits, QLoRA on one in 4; merged or kept apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.build.job import Job, Work
from llmops.build.merging import Candidate, held_out_rows, measure_merges
from llmops.build.training import run_fit, trainable, training_rows, work_of
from llmops.errors import StepError
from llmops.methods.finetune.lora import add_lora, lora_plus_scale, merge_lora, scaling_of, set_adapters
from llmops.methods.finetune.options import Adapters, Lora, Qlora
from llmops.methods.finetune.peft_library import hush_bitsandbytes
from llmops.methods.finetune.starts import Pair, loftq_init, pissa_init, pissa_to_lora, start_pissa
from llmops.models import parity
from llmops.models.save import save_adapter, save_dense

__all__ = ["adapted_model", "lora_step", "qlora_step", "rate_scale_of", "trained_parameters"]


def lora_step(job: Job, options: Lora) -> Work:
    """Low-rank adapters on a frozen model, merged or kept apart."""
    if options.init == "loftq":
        raise StepError("init: loftq makes up for the rounding of a 4-bit base, and this base has none; use method: "
                        "qlora, or init: pissa")
    rows = training_rows(job, options)
    model = trainable(job.model, frozen=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted = adapted_model(model, job, options)
    starts = start_pissa(adapted) if options.init == "pissa" else {}
    done = run_fit(job, options, adapted, rows, rate_scale=rate_scale_of(options))
    done.events.append(trained_parameters(adapted, options))
    if options.merge:
        plain = merge_lora(adapted)
        save: Callable[[Path], None] = partial(save_dense, plain, job.tokenizer, dtype=job.storage)
        return work_of(job, plain, save, done, backward=1.0)
    if starts:
        pissa_to_lora(adapted, starts)
        done.events.append(f"PiSSA's adapters were written as ordinary ones of rank {2 * options.rank} for the base "
                           "as it came")
    save = partial(save_adapter, adapted, job.tokenizer, base=job.base_source, revision=job.revision)
    expected = parity.Expected(adapter_rank=options.rank * (2 if starts else 1))
    return work_of(job, adapted, save, done, backward=1.0, expected=expected)


def qlora_step(job: Job, options: Qlora) -> Work:
    """Adapters on a base in 4 bits; every way of keeping them is measured against what was trained."""
    hush_bitsandbytes()
    from llmops.models import nf4

    if job.keeps_zeros:
        raise StepError("given a pruned parent; expected one without zeros to keep: adapters on a 4-bit base would "
                        "fill them; use method: lora, which masks its adapters")
    rows = training_rows(job, options)
    parent = job.parent if job.parent is not None else _copies_of(job.model)
    device = job.device if job.device is not None else next(iter(job.model.parameters())).device
    compute = torch.float32 if device.type == "cpu" else torch.bfloat16
    scaling = scaling_of(options.rank, options.alpha, options.rslora)
    starts: dict[str, Pair] = {}
    shift: dict[str, Pair] = {}

    def rest(name: str, weight: Tensor) -> Tensor:
        found = _start(options, weight, scaling, device) if _targeted(name, options) else None
        if found is None:
            return weight
        starts[name], shift[name], left = found
        return left

    base = nf4.quantize_base(job.model.cpu(), quant=options.quant, double_quant=options.double_quant, compute=compute,
                             device=device, rest=rest)
    adapted = adapted_model(job.model, job, options)
    set_adapters(adapted, starts)
    done = run_fit(job, options, adapted, rows, rate_scale=rate_scale_of(options))
    done.events.append(trained_parameters(adapted, options))
    base = nf4.Base(**{**vars(base), "source": job.base_source, "revision": job.revision,
                       "parent_key": job.parent_key, "scaling": scaling if shift else None})

    def merged_into(keep_base: bool) -> Any:
        model = nf4.fill(parent(), adapted, keep_base=keep_base, starts=starts)
        for parameter in model.parameters():  # the values are those of the storage type; they are run as in training
            parameter.data = parameter.data.to(device, compute)
        return model.to(device).eval()

    def apart() -> Any:
        model = parent()
        nf4.quantize_base(model, quant=options.quant, double_quant=options.double_quant, compute=compute,
                          device=device, rest=nf4.shifted(shift, scaling))
        again = adapted_model(model, job, options)
        _copy_adapters(adapted, again)
        return again.eval()

    candidates: dict[str, Candidate] = {
        "apart": apart, "original": partial(merged_into, True), "dequantized": partial(merged_into, False)}
    model, merge, events = measure_merges(adapted, candidates, options.merge, held_out_rows(rows.train, rows.held_out),
                                          rows.held_out)
    done.events.extend([f"base of {base.layers} linear layers in {options.quant}"
                        f"{' with double quantization' if options.double_quant else ''}", *events])

    def save(folder: Path) -> None:
        if options.merge != "apart":
            save_dense(model, job.tokenizer, folder, dtype=job.storage)
            return
        save_adapter(model, job.tokenizer, folder, base=job.base_source, revision=job.revision)
        nf4.record(folder, base, shift)

    expected = (parity.Expected(adapter_rank=options.rank, base=(options.quant, options.double_quant))
                if options.merge == "apart" else parity.Expected(dtype=job.storage))
    work = work_of(job, model, save, done, backward=1.0, expected=expected)
    work.merge = merge
    return work


def _start(options: Qlora, weight: Tensor, scaling: float, device: torch.device) -> tuple[Pair, Pair, Tensor] | None:
    """(start of the adapter, what is taken off the weight before it is rounded, what is left), or None for zero.

    weight: (out, in), float32, on the CPU. The singular vectors are computed on `device`.
    """
    from llmops.models.nf4 import round_trip

    if options.init == "pissa":
        A, B, _ = pissa_init(weight.to(device), options.rank, scaling)
        start = before = (A.cpu(), B.cpu())
    elif options.init == "loftq":
        found = loftq_init(weight.to(device), options.rank, lambda left: round_trip(
            left.cpu(), options.quant, options.double_quant).to(device), options.loftq_iterations, scaling)
        start, before = (found.A.cpu(), found.B.cpu()), (found.before[0].cpu(), found.before[1].cpu())
    else:
        return None
    return start, before, weight - scaling * (before[1] @ before[0])


def _targeted(name: str, options: Adapters) -> bool:
    """Whether PEFT gives the layer an adapter."""
    return options.targets == "all-linear" or any(name == end or name.endswith(f".{end}") for end in options.targets)


def adapted_model(model: Any, job: Job, options: Adapters, **changes: Any) -> Any:
    """The model with the adapters that the options ask for; `changes` to what `add_lora` is given."""
    given = {"rank": options.rank, "alpha": options.alpha, "dropout": options.dropout, "targets": options.targets,
             "seed": job.seed, "keep_zeros": job.keeps_zeros, "rslora": options.rslora, "dora": options.dora}
    return add_lora(model, **given | changes)


def rate_scale_of(options: Adapters) -> Callable[[str], float] | None:
    """What LoRA+ multiplies the learning rate of a parameter by; None where all learn alike."""
    return lora_plus_scale(options.lora_plus_ratio) if options.lora_plus_ratio else None


def trained_parameters(adapted: Any, options: Adapters) -> str:
    """The event that says how many parameters were trained, and in which way."""
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    named = [name for name, on in (("rsLoRA", options.rslora), ("DoRA", options.dora),
                                   ("PiSSA", options.init == "pissa"), ("LoftQ", options.init == "loftq")) if on]
    return f"{count:,} parameters trained ({', '.join([f'rank {options.rank}', *named])})"


def _copies_of(model: Any) -> Callable[[], Any]:
    """What opens a model again that came from memory: copies of it as it was given."""
    kept = copy.deepcopy(model).cpu()
    return lambda: copy.deepcopy(kept)


def _copy_adapters(source: Any, target: Any) -> None:
    trained = {name: value for name, value in source.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, value in target.named_parameters():
            if name in trained:
                value.copy_(trained[name])

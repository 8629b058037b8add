"""Build one variant: load its parent from disk, take the step, save, read back, check, and say what it cost.

One function a step kind and method, all of one shape: `(job, options) -> Work`. They bring together what the lower
floors keep apart (a method knows tensors, a loader knows folders, the loop knows no method), and nothing else.

Training runs in float32 on a CPU and in bf16 autocast on a GPU; every variant is stored in the data type of the model
it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmops import calibrate
from llmops.data.options import DataSource
from llmops.data.render import Encoded, calibration_tokens, encode
from llmops.data.sources import Rows, load_rows
from llmops.errors import StepError
from llmops.measure.meter import Meter
from llmops.methods.distill.logits import distill_loss
from llmops.methods.distill.options import Logits
from llmops.methods.finetune.lora import add_lora, merge_lora, zero_masks
from llmops.methods.finetune.options import Full, Lora, Training
from llmops.methods.prune.depth import even_layers, influential_layers
from llmops.methods.prune.magnitude import magnitude_mask
from llmops.methods.prune.options import Depth, Magnitude, Wanda
from llmops.methods.prune.wanda import wanda_mask
from llmops.methods.quantize.options import Rtn
from llmops.methods.quantize.rtn import rtn
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models import parity
from llmops.models.arch import decoder_layers, renumber_layers
from llmops.models.builtin import locate
from llmops.models.load import load, merged
from llmops.models.quantized import save_quantized
from llmops.models.save import save_adapter, save_dense, staged, write_manifest
from llmops.options import Options
from llmops.quantity import Quantity
from llmops.recipe.plan import Stage
from llmops.recipe.schema import Recipe
from llmops.store import Store
from llmops.train import IGNORED, Fit, Loss, Progress, Schedule, fit, next_token_loss

__all__ = ["STEPS", "Job", "Work", "apply_step", "build"]

MASKING = ("prune:magnitude", "prune:wanda")  # steps whose zeros every later training has to keep


@dataclass
class Job:
    """What every step needs beside its options: its parent in memory, data by name, seed, and a place to report to."""

    model: Any
    tokenizer: Any
    storage: torch.dtype
    chain: list[str]
    rows: Callable[[str], Rows]
    limits: Callable[[str], DataSource]
    seed: int
    teacher: Callable[[str], Any] | None = None
    base_source: str = ""
    progress: Progress | None = None

    @property
    def keeps_zeros(self) -> bool:
        return any(step in MASKING for step in self.chain)


@dataclass
class Work:
    """What a step made: the model in memory, how to save it, what it promises, and what is known of its cost."""

    model: Any
    save: Callable[[Path], None]
    expected: parity.Expected = field(default_factory=parity.Expected)
    tokens: int = 0
    flops: Quantity = field(default_factory=lambda: Quantity.null("FLOP", "nothing was trained"))
    loss: list[tuple[int, float]] = field(default_factory=list)
    data: dict[str, int] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    packed: dict[str, QuantizedWeight] = field(default_factory=dict)


# -------------------------------------------------------------------------------------------------- steps that train


def _lora(job: Job, options: Lora) -> Work:
    encoded = _encoded(job, options)
    model = _trainable(job.model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted = add_lora(model, rank=options.rank, alpha=options.alpha, dropout=options.dropout,
                       targets=options.targets, seed=job.seed, keep_zeros=job.keeps_zeros)
    done = _fit(job, options, adapted, encoded)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    events = [f"{trained:,} parameters trained (rank {options.rank})"]
    if options.merge:
        plain = merge_lora(adapted)
        save = partial(save_dense, plain, job.tokenizer, dtype=job.storage)
        return _trained(job, plain, save, done, encoded, backward=1.0, events=events)
    save = partial(save_adapter, adapted, job.tokenizer, base=job.base_source)
    return _trained(job, adapted, save, done, encoded, backward=1.0, events=events)


def _full(job: Job, options: Full) -> Work:
    return _train_all(job, options, next_token_loss)


def _logits(job: Job, options: Logits) -> Work:
    if job.teacher is None:
        raise StepError("distillation needs a teacher; name one with `teacher:`")
    teacher = job.teacher(options.teacher)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)

    def loss(student: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        kept = batch["labels"][:, 1:] != IGNORED
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            taught = teacher(**inputs).logits[:, :-1][kept]
        return distill_loss(student(**inputs).logits[:, :-1][kept], taught, batch["labels"][:, 1:][kept],
                            temperature=options.temperature, direction=options.loss, hard_weight=options.hard_weight)

    work = _train_all(job, options, loss)
    forward = 2.0 * sum(p.numel() for p in teacher.parameters()) * work.tokens
    if work.flops.value is not None:
        work.flops = Quantity(work.flops.value + forward, "FLOP", "estimated",
                              f"{work.flops.method}, and 2 x the teacher's parameters x tokens")
    return work


def _train_all(job: Job, options: Training, loss: Loss) -> Work:
    encoded = _encoded(job, options)
    model = _trainable(job.model)
    masks = zero_masks(model) if job.keeps_zeros else {}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    modules = dict(model.named_modules())

    def keep_zeros() -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                modules[name].weight.mul_(mask)

    done = _fit(job, options, model, encoded, loss, keep_zeros if masks else None)
    return _trained(job, model, partial(save_dense, model, job.tokenizer, dtype=job.storage), done, encoded,
                    backward=2.0, events=[])


def _trainable(model: Any) -> Any:
    """The model in float32: gradients and the optimizer's steps are lost in 16 bit."""
    return model.float()


def _encoded(job: Job, options: Training) -> Encoded:
    length = min(options.max_length, job.model.config.max_position_embeddings)
    return encode(job.rows(options.data), job.tokenizer, max_length=length, limits=job.limits(options.data).limits,
                  progress=job.progress)


def _fit(job: Job, options: Training, model: Any, encoded: Encoded, loss: Loss = next_token_loss,
         after_step: Callable[[], None] | None = None) -> Fit:
    schedule = Schedule(options.epochs, options.max_steps, options.learning_rate, options.schedule, options.warmup,
                        options.batch_size, options.accumulate, options.weight_decay)
    rows = job.rows(options.data)
    return fit(model, encoded.examples, schedule, pad_id=job.tokenizer.pad_token_id, seed=job.seed, loss=loss,
               after_step=after_step, progress=job.progress, place=lambda index: rows.place(encoded.origin[index]))


def _trained(job: Job, model: Any, save: Callable[[Path], None], done: Fit, encoded: Encoded, *, backward: float,
             events: list[str]) -> Work:
    parameters = sum(p.numel() for p in model.parameters())
    flops = Quantity(2 * (1 + backward) * parameters * done.tokens, "FLOP", "estimated",
                     f"{2 * (1 + backward):g} x parameters x tokens (Kaplan et al. 2020, attention scores left out)")
    expected = parity.Expected(sparsity=_zero_share(job.model) if job.keeps_zeros else None)
    return Work(model, save, expected, done.tokens, flops, done.loss, {**encoded.report, "steps": done.steps},
                [f"{done.steps} steps, {done.tokens:,} tokens in {done.wall_s:.1f} s", *events])


def _zero_share(model: nn.Module) -> float:
    zeros, total = parity.sparsity(model)
    return zeros / max(1, total)


# ------------------------------------------------------------------------------------------- steps that compress


def _magnitude(job: Job, options: Magnitude) -> Work:
    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        return layer.weight * magnitude_mask(layer.weight, options.sparsity, options.pattern)

    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=_bar(job))
    return _pruned(job, options.sparsity, [])


def _wanda(job: Job, options: Wanda) -> Work:
    def update(name: str, layer: nn.Linear, x_norm: Tensor | None) -> Tensor:
        assert x_norm is not None
        return layer.weight * wanda_mask(layer.weight, x_norm, options.sparsity, options.pattern)

    tokens = _calibration(job, options.data, options.length)
    calibrate.walk(job.model, tokens, "x_norm", update, ignore=options.ignore, progress=_bar(job))
    work = _pruned(job, options.sparsity, [_calibrated(tokens)])
    work.tokens = tokens.numel()
    return work


def _pruned(job: Job, sparsity: float, events: list[str]) -> Work:
    zeros, total = parity.sparsity(job.model)
    events = [*events, f"{zeros:,} of {total:,} linear weights are zero"]
    return Work(job.model, partial(save_dense, job.model, job.tokenizer, dtype=job.storage),
                parity.Expected(sparsity=min(sparsity, zeros / max(1, total))), events=events)


def _depth(job: Job, options: Depth) -> Work:
    _, layers = decoder_layers(job.model)
    events, tokens = [], 0
    if isinstance(options.layers, list):
        keep = sorted(options.layers)
    elif options.choose == "block_influence":
        crops = _calibration(job, str(options.data), options.length)
        scores = calibrate.block_influence(job.model, crops, progress=_bar(job))
        keep, tokens = influential_layers(scores, options.layers), crops.numel()
        events = [_calibrated(crops), "block influence: " + ", ".join(f"{score:.3f}" for score in scores)]
    else:
        keep = even_layers(len(layers), options.layers)
    model = renumber_layers(job.model, keep)
    events.append(f"kept layers {', '.join(map(str, keep))} of {len(layers)}")
    return Work(model, partial(save_dense, model, job.tokenizer, dtype=job.storage),
                parity.Expected(layers=len(keep)), tokens=tokens, events=events)


def _rtn(job: Job, options: Rtn) -> Work:
    weights: dict[str, QuantizedWeight] = {}

    def update(name: str, layer: nn.Linear, _: Tensor | None) -> Tensor:
        weights[name] = rtn(layer.weight, bits=options.bits, group_size=options.group, symmetric=options.symmetric)
        return weights[name].dequantize().to(layer.weight.dtype)

    calibrate.walk(job.model, None, "none", update, ignore=options.ignore, progress=_bar(job))
    return Work(job.model, partial(save_quantized, job.model, weights, tokenizer=job.tokenizer),
                parity.Expected(bits=options.bits), events=[f"{len(weights)} linear layers in {options.bits} bits"],
                packed=weights)


def _calibration(job: Job, data: str, length: int) -> Tensor:
    source, rows = job.limits(data), job.rows(data)
    length = min(length, job.model.config.max_position_embeddings)
    return calibration_tokens(rows, job.tokenizer, samples=source.samples or 128, length=length, seed=job.seed)


def _calibrated(tokens: Tensor) -> str:
    return f"calibrated on {tokens.shape[0]} crops of {tokens.shape[1]} tokens"


def _bar(job: Job) -> Callable[[int, int], None] | None:
    progress = job.progress
    return (lambda done, total: progress(done, total, "")) if progress is not None else None


STEPS: dict[tuple[str, str], Callable[[Job, Any], Work]] = {
    ("finetune", "lora"): _lora, ("finetune", "full"): _full, ("distill", "logits"): _logits,
    ("prune", "magnitude"): _magnitude, ("prune", "wanda"): _wanda, ("prune", "depth"): _depth,
    ("quantize", "rtn"): _rtn}


def apply_step(kind: str, job: Job, options: Options) -> Work:
    """Take one step on the job's model, in memory. Raises StepError where the numbers break."""
    return STEPS[kind, options.method](job, options)  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------- one whole build


def build(stage: Stage, recipe: Recipe, store: Store, meter: Meter, progress: Progress | None = None) -> dict[str, Any]:
    """Build `stage` into the store and return its manifest. Leaves nothing behind when it fails."""
    variant, runtime = recipe.variants[stage.variant], recipe.runtime
    parent = stage.parent_keys[0] if stage.parent_keys else None
    with meter.window(stage.variant) as window:
        job = _job(stage, recipe, store, progress)
        work = apply_step(variant.kind, job, variant.options)
    assert stage.key is not None
    with staged(store.build(stage.key)) as folder:
        before = parity.snapshot(work.model, job.tokenizer, _probe(job, recipe))
        work.save(folder)
        manifest = {
            "schema": 1, "variant": stage.variant, "kind": variant.kind, "method": variant.method,
            "options": variant.options.model_dump(mode="json"),
            "chain": [*job.chain, f"{variant.kind}:{variant.method}"], "key": stage.key,
            "key_parts": stage.key_parts, "parent_key": parent,
            "parent_keys": list(stage.parent_keys), "base_model": recipe.model.id, "revision": recipe.model.revision,
            "recipe": recipe.name, "recipe_sha256": recipe.sha256, "seed": recipe.seed,
            "data": {name: job.rows(name).sha256 for name in variant.data_names()},
            "versions": versions(), "events": work.events, "loss": work.loss, "data_report": work.data,
            "cost": {"wall_s": Quantity.measured(window.wall_s, "s", "wall clock of the step").as_dict(),
                     "energy_j": window.energy.as_dict(), "flops": work.flops.as_dict(),
                     "tokens": Quantity.measured(work.tokens, "tokens", "tokens run through the model").as_dict()}}
        write_manifest(folder, manifest)
        model, tokenizer = load(folder, dtype=runtime.dtype, device=runtime.device, kernel=runtime.kernel,
                                trust_remote_code=recipe.model.trust_remote_code)
        manifest["parity"] = parity.check(before, model, tokenizer, folder, work.expected)
        write_manifest(folder, manifest)
    return manifest


def source_of(variant: str, recipe: Recipe, store: Store, keys: Mapping[str, str]) -> str | Path:
    """What to load for a variant: its build, or for `base` the model that the recipe names."""
    return recipe.model.id if variant == "base" else store.build(keys[variant])


def versions() -> dict[str, str]:
    """Versions of the packages that make a build what it is."""
    found = {}
    for package in ("llmops", "torch", "transformers", "peft", "accelerate", "compressed-tensors", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _job(stage: Stage, recipe: Recipe, store: Store, progress: Progress | None) -> Job:
    variant, runtime = recipe.variants[stage.variant], recipe.runtime
    keys = dict(zip(variant.parents(), stage.parent_keys, strict=True))
    cache: dict[str, Rows] = {}

    def rows(name: str) -> Rows:
        if name not in cache:
            cache[name] = load_rows(name, recipe.data, recipe.base_dir, recipe.seed)
        return cache[name]

    def open_model(name: str) -> tuple[Any, Any]:
        return load(source_of(name, recipe, store, keys), base_dir=recipe.base_dir, revision=recipe.model.revision,
                    device=runtime.device, trust_remote_code=recipe.model.trust_remote_code)

    model, tokenizer = open_model(variant.parent)
    model = merged(model)
    chain = store.manifest(keys[variant.parent])["chain"] if variant.parent != "base" else []
    base = locate(str(source_of(variant.parent, recipe, store, keys)), recipe.base_dir)
    return Job(model, tokenizer, model.dtype, chain, rows, lambda name: recipe.data[name], recipe.seed,
               lambda name: merged(open_model(name)[0]), base, progress)


def _probe(job: Job, recipe: Recipe, rows: int = 4, length: int = 64) -> Tensor:
    """(rows, length) token ids for the parity check: a seeded draw from the whole vocabulary."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = min(len(job.tokenizer), job.model.config.vocab_size)
    return torch.randint(0, size, (rows, min(length, job.model.config.max_position_embeddings)), generator=generator)

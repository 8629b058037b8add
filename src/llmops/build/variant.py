"""Build one variant: load its parent from disk, take the step, save, read back, check, and say what it cost.

One function a step kind and method, all of one shape: `(job, options) -> Work`. They bring together what the lower
floors keep apart (a method knows tensors, a loader knows folders, the loop knows no method), and nothing else.

Training runs in float32 on a CPU and in bf16 autocast on a GPU; every variant is stored in the data type of the model
it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.build.allocating import auto_step
from llmops.build.attempts import Attempts
from llmops.build.charging import cost_of
from llmops.build.cutting import depth_step, width_step
from llmops.build.distilling import logits_step
from llmops.build.embedding import joined, prepared
from llmops.build.healing import heal_full_step, heal_logits_step, heal_lora_step
from llmops.build.healing_preferences import heal_dpo_step
from llmops.build.job import Job, Work
from llmops.build.kv_cache import kv_cache_step, with_kv_cache
from llmops.build.lora import lora_step, qlora_step
from llmops.build.masking import magnitude_step, sparsegpt_step, wanda_step
from llmops.build.on_integers import on_integers
from llmops.build.preferences import dpo_step
from llmops.build.quantizing import autoround_step, awq_step, gptq_step, hqq_step, rtn_step, smoothquant_step
from llmops.build.shares import Shares
from llmops.build.trace import Trace
from llmops.build.training import full_step
from llmops.data.sources import Rows
from llmops.errors import LlmopsError, ModelError, StepError, StoreError
from llmops.measure.meter import Meter
from llmops.methods.finetune.options import Training
from llmops.methods.quantize.options import KV_RECORD
from llmops.models import parity
from llmops.models.builtin import locate
from llmops.models.embeddings import is_tied
from llmops.models.experts import split_experts
from llmops.models.fake_quant import is_packed
from llmops.models.kv_cache import attached
from llmops.models.load import load, merged, pick_device
from llmops.models.save import staged, write_manifest
from llmops.models.zeros import zero_bits
from llmops.options import Options
from llmops.recipe.keys import key_of
from llmops.recipe.plan import Plan, Stage
from llmops.recipe.schema import Recipe
from llmops.store import Store
from llmops.train import Checkpoints, Progress
from llmops.train.ranks import tell, together

__all__ = ["STEPS", "apply_step", "assist", "build", "source_of", "versions"]

Log = Callable[[int, Mapping[str, float]], None]
STEPS: dict[tuple[str, str], Callable[[Job, Any], Work]] = {
    ("finetune", "lora"): lora_step, ("finetune", "qlora"): qlora_step, ("finetune", "full"): full_step,
    ("finetune", "dpo"): dpo_step,
    ("distill", "logits"): logits_step,
    ("prune", "magnitude"): magnitude_step, ("prune", "wanda"): wanda_step, ("prune", "sparsegpt"): sparsegpt_step,
    ("prune", "depth"): depth_step, ("prune", "width"): width_step,
    ("quantize", "rtn"): rtn_step, ("quantize", "gptq"): gptq_step, ("quantize", "awq"): awq_step,
    ("quantize", "hqq"): hqq_step, ("quantize", "autoround"): autoround_step,
    ("quantize", "auto"): auto_step, ("quantize", "smoothquant"): smoothquant_step,
    ("quantize", "kv_cache"): kv_cache_step}


#: The steps that leave weights out: what is left are the parent's own.
CUTTING = (("prune", "depth"), ("prune", "width"))
#: The steps that a quantized parent can take; the others would change integers, or round them once more.
ON_QUANTIZED: dict[tuple[str, str], Callable[[Job, Any], Work]] = {
    ("finetune", "lora"): heal_lora_step, ("finetune", "full"): heal_full_step, ("finetune", "dpo"): heal_dpo_step,
    ("distill", "logits"): heal_logits_step}


def apply_step(kind: str, job: Job, options: Options) -> Work:
    """Take one step on the job's model, in memory. Raises StepError where the numbers break, or a quantized model is
    given to a step that cannot take one, LlmopsError for a model whose keys and values are rounded already."""
    rounded = attached(job.model)
    if rounded is not None:
        raise LlmopsError(f"the model keeps its keys and values in {rounded}, which would shape what this step learns "
                          f"and then be lost; expected a model in 16 bit: take {KV_RECORD} out of its config.json, and "
                          f"set kv_cache: {rounded} in the last step")
    taken = kind, str(options.method)  # type: ignore[attr-defined]
    held = held_zeros(job) if job.keeps_zeros and taken not in CUTTING else None
    work = _taken(taken, job, options)
    if held:
        work.expected = replace(work.expected, zeros=held)
    return work


def held_zeros(job: Job) -> Mapping[str, Tensor]:
    """The zeros that a step has to keep: of what was pruned, where that is known; else all there are."""
    if job.zeros is not None:
        return job.zeros
    known = is_packed(job.model) and not job.pruned_as_quantized and job.unrounded is not None
    before = job.unrounded() if known and job.unrounded is not None else None
    return zero_bits(job.model if before is None else before)


def _taken(taken: tuple[str, str], job: Job, options: Options) -> Work:
    kind = taken[0]
    if kind == "prune" and is_packed(job.model):
        return on_integers(taken[1], job, options)
    compressing = kind in ("quantize", "prune") and taken not in (("quantize", "kv_cache"), *CUTTING)
    if compressing or not is_packed(job.model):
        work = (_compressed if compressing else _plainly)(taken, job, options)
        dtype = getattr(options, "kv_cache", None)
        return work if dtype is None else with_kv_cache(work, dtype)
    if taken not in ON_QUANTIZED:
        raise StepError(f"{' '.join(taken)} was given a quantized model; expected one in 16 bit, or "
                        f"{', '.join(' '.join(step) for step in ON_QUANTIZED)}, which can train one")
    return ON_QUANTIZED[taken](job, options)


def _plainly(taken: tuple[str, str], job: Job, options: Options) -> Work:
    return STEPS[taken](job, options)


def _compressed(taken: tuple[str, str], job: Job, options: Options) -> Work:
    """A step that quantizes or prunes, with what comes before and after whatever its method: experts taken apart,
    embedding and head, notes."""
    _check_plain(job.model, taken[0])
    mixed = split_experts(job.model)  # what looks for linear layers would pass them by
    if mixed:
        _check_mixture(mixed[0], options)
    if taken[0] != "quantize":
        work = STEPS[taken](job, options)
    else:
        was_tied = is_tied(job.model)
        rounded = prepared(job, options)
        work = joined(STEPS[taken](job, options), rounded, was_tied)
    work.events += job.notes
    return work


def _check_mixture(name: str, options: Options) -> None:
    """Raises LlmopsError for what readers do not take of experts, and for what was not tried on a router."""
    scheme, rotations = getattr(options, "scheme", ""), getattr(options, "rotations", ())
    wrong = ("rotate" if rotations else f"scheme: {scheme}" if getattr(options, "number_format", None)
             else "sensitivity: gradient" if getattr(options, "sensitivity", "") == "gradient" else "")
    if wrong:
        raise LlmopsError(f"{name} holds experts, which readers take in one scheme of integers; given {wrong}, "
                          "expected a scheme of integers such as w4a16 by rtn, gptq, awq or autoround, not rotated, or "
                          "method: auto with sensitivity: kl")


def _check_plain(model: Any, kind: str) -> None:
    """Raises StepError for a model whose weights are codes, or lie beside an adapter, already."""
    coded = next((name for name, module in model.named_modules() if hasattr(module, "packed_tensors")), None)
    if coded is not None:
        raise StepError(f"{coded} is quantized already; expected a model in 16 or 32 bit to {kind}: take the one "
                        "that it was made of")
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise StepError(f"the model carries an adapter apart; expected a plain model to {kind}: merge it first "
                        "(merge_and_unload), or the adapter's own matrices would be taken for layers")


def build(stage: Stage, recipe: Recipe, store: Store, meter: Meter, progress: Progress | None = None,
          log: Log | None = None) -> dict[str, Any]:
    """Build `stage` into the store and return its manifest.

    When it fails, what was spent and the last checkpoint stay in the store's folder for work under way: the next try
    goes on from there, and pays for both. log: hears (step, figures) of every optimizer step.
    """
    variant, runtime = recipe.variants[stage.variant], recipe.runtime
    parent = stage.parent_keys[0] if stage.parent_keys else None
    assert stage.key is not None
    with meter.window(stage.variant) as window, Attempts(store.work(stage.key), window) as attempts:
        shares = Shares(recipe, store, stage, lambda: window.so_far())
        trace = Trace(store.work(stage.key) / "trace.json", log)
        take = partial(_take, stage, recipe, store, shares, attempts.watching(progress), attempts.joules, trace.log,
                       meter)
        if isinstance(variant.options, Training):
            tell(stage.variant)
            job, work = together(take)
        else:
            job, work = take()
    spent = attempts.total()
    cost = cost_of(spent, window.wall_s, work, shares.used, stage.key)
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
            "looks": work.looks, "merge": work.merge, "allocation": work.allocation,
            "search": work.search, "trace": trace.as_dict(), "attempts": spent.attempts, **cost}
        write_manifest(folder, manifest)
        model, tokenizer = load(folder, dtype=runtime.dtype, device=runtime.device, kernel=runtime.kernel,
                                trust_remote_code=recipe.model.trust_remote_code)
        manifest["parity"] = parity.check(before, model, tokenizer, folder, work.expected)
        write_manifest(folder, manifest)
    attempts.discard()
    return manifest


def assist(variant: str, plan: Plan, store: Store) -> None:
    """Take part in a step that rank 0 is building: the same training on this rank's rows; nothing of it is kept."""
    stage = plan.stage(variant)
    together(partial(_take, stage, plan.recipe, store, Shares(plan.recipe, store, stage), None, lambda: None))


def _take(stage: Stage, recipe: Recipe, store: Store, shares: Shares, progress: Progress | None,
          spent: Callable[[], float | None], log: Log | None = None,
          meter: Meter | None = None) -> tuple[Job, Work]:
    """Take the step of `stage` in memory, from its last checkpoint where there is one."""
    variant = recipe.variants[stage.variant]
    job = _job(stage, recipe, store, shares, progress)
    job.spent, job.log, job.meter, job.signals = spent, log, meter, shares.signals()
    job.answers = shares.answers if stage.answers else None
    job.memory = store.measured(key_of({name: part for name, part in stage.key_parts.items()
                                        if name not in ("option.bits", "option.bytes")}))
    job.checkpoints = Checkpoints(store.work(stage.key) / "checkpoints", recipe.runtime.checkpoint_s)
    return job, apply_step(variant.kind, job, variant.options)


def source_of(variant: str, recipe: Recipe, store: Store, keys: Mapping[str, str]) -> str | Path:
    """What to load for a variant: its build, or for `base` the model that the recipe names."""
    return recipe.model.id if variant == "base" else store.build(keys[variant])


def versions() -> dict[str, str]:
    """Versions of the packages that make a build what it is."""
    found = {}
    for package in ("llmops", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "compressed-tensors",
                    "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _job(stage: Stage, recipe: Recipe, store: Store, shares: Shares, progress: Progress | None) -> Job:
    variant, runtime = recipe.variants[stage.variant], recipe.runtime
    keys = dict(zip(variant.parents(), stage.parent_keys, strict=True))
    cache: dict[str, Rows] = {}

    def rows(name: str) -> Rows:
        if name not in cache:
            cache[name] = shares.rows(name, lambda writer: merged(open_model(writer)[0]), tokenizer, progress)
        return cache[name]

    def open_model(name: str, device: str = runtime.device, kernel: str = "auto") -> tuple[Any, Any]:
        return load(source_of(name, recipe, store, keys), base_dir=recipe.base_dir, revision=recipe.model.revision,
                    dtype="stored", device=device, kernel=kernel, trust_remote_code=recipe.model.trust_remote_code)

    def parent() -> Any:
        return merged(open_model(variant.parent, "cpu")[0])

    on_cpu = variant.method == "qlora"  # goes to the device layer by layer, in 4 bits
    kernel = "reference" if isinstance(variant.options, Training) else "auto"  # whose codes are laid out as stored
    model, tokenizer = open_model(variant.parent, "cpu" if on_cpu else runtime.device, kernel)
    model = merged(model)
    chain = store.manifest(keys[variant.parent])["chain"] if variant.parent != "base" else []
    base = locate(str(source_of(variant.parent, recipe, store, keys)), recipe.base_dir)
    from_base = variant.parent == "base"
    return Job(model, tokenizer, model.dtype, chain, rows, lambda name: recipe.data[name], recipe.seed,
               teacher=lambda name: merged(open_model(name)[0]), base_source=base,
               revision=recipe.model.revision if from_base else None,
               parent_key=None if from_base else keys[variant.parent], device=pick_device(runtime.device),
               parent=parent, unrounded=partial(_unrounded, keys.get(variant.parent), store, recipe),
               open=partial(_open, recipe), progress=progress)


def _open(recipe: Recipe, source: str, revision: str | None) -> tuple[Any, Any]:
    """Another model than the recipe's, as it is stored."""
    model, tokenizer = load(source, base_dir=recipe.base_dir, revision=revision, dtype="stored",
                            device=recipe.runtime.device, trust_remote_code=recipe.model.trust_remote_code)
    return merged(model), tokenizer


def _unrounded(key: str | None, store: Store, recipe: Recipe) -> Any:
    """The model that was quantized, and from which the build `key` came; None where it is not there."""
    if key is None:
        return None
    try:
        manifest = store.manifest(key)
        while not str(manifest["chain"][-1]).startswith("quantize:"):
            manifest = store.manifest(manifest["parent_key"])
        from_base = len(manifest["chain"]) == 1  # which is no build
        source = recipe.model.id if from_base else store.build(manifest["parent_key"])
        model, _ = load(source, base_dir=recipe.base_dir, revision=recipe.model.revision, dtype="stored", device="cpu",
                        trust_remote_code=recipe.model.trust_remote_code)
    except (StoreError, ModelError, KeyError, IndexError):
        return None
    return merged(model)


def _probe(job: Job, recipe: Recipe, rows: int = 4, length: int = 64) -> Tensor:
    """(rows, length) token ids for the parity check: a seeded draw from the whole vocabulary."""
    generator = torch.Generator().manual_seed(recipe.seed)
    size = min(len(job.tokenizer), job.model.config.vocab_size)
    return torch.randint(0, size, (rows, min(length, job.model.config.max_position_embeddings)), generator=generator)

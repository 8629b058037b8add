"""The steps that train every weight, and what all steps that train have in common; adapters are in `lora.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmops.build.job import Job, Work
from llmops.data.render import Encoded, encode
from llmops.errors import StepError
from llmops.methods.finetune.fused_lora import fuse
from llmops.methods.finetune.lora import zero_masks
from llmops.methods.finetune.neftune import noisy_embeddings
from llmops.methods.finetune.options import Full, Training
from llmops.models import parity
from llmops.models.packed_rows import can_pack
from llmops.models.save import save_dense
from llmops.models.token_loss import can_split, full_logits_loss, next_token_loss
from llmops.quantity import Quantity
from llmops.train import Fit, Hooks, Loss, Schedule, Stopping, TrainingSet, fit, token_rows
from llmops.train.finder import find_rate
from llmops.train.rows import to_device

__all__ = ["SEED_OF_SPLIT", "Rows", "Trained", "full_step", "keeping_zeros", "packing", "run_fit", "schedule_of",
           "train_all", "trainable", "training_rows", "work_of"]

SEED_OF_SPLIT = 1  # added to the recipe's seed for the draw of the held-out rows


@dataclass(frozen=True)
class Rows:
    """What a step trains on and holds out, with what became of its rows, a name for each, and events for the row."""

    train: TrainingSet
    held_out: TrainingSet | None
    report: dict[str, int]
    place: Callable[[int], str]
    events: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """A training that is done: what the loop says, on what, and the events that belong into the row."""

    done: Fit
    rows: Rows
    events: list[str]


def full_step(job: Job, options: Full) -> Work:
    """Every weight is trained."""
    return train_all(job, options, next_token_loss)


def train_all(job: Job, options: Training, loss: Loss, rows: Rows | None = None) -> Work:
    """Train every weight; the zeros of a pruned parent stay zero. rows: by default those of next-token prediction."""
    rows = training_rows(job, options) if rows is None else rows
    model = trainable(job.model)
    masks = {**zero_masks(model), **expert_masks(model)} if job.keeps_zeros else {}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    done = run_fit(job, options, model, rows, loss, keeping_zeros(model, masks))
    return work_of(job, model, partial(save_dense, model, job.tokenizer, dtype=job.storage), done, backward=2.0)


# ------------------------------------------------------------------------------------------ what they have in common


def trainable(model: Any, *, frozen: bool = False) -> Any:
    """The model in float32: gradients and the optimizer's steps are lost in 16 bit.

    frozen: its weights are only run, what is trained is added to them. On a GPU, which multiplies in 16 bit, they then
    stay in the type they are stored in: half the memory, and no copy for every forward pass.
    """
    device = next(iter(model.parameters())).device
    return model if frozen and device.type == "cuda" else model.float()


def keeping_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> Callable[[], None] | None:
    """What puts the zeros of layers back after an optimizer step; None where there are none. masks: by layer name, or
    by that of a parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied head has a name, too

    def put_back() -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name if name in parameters else f"{name}.weight"].mul_(mask)

    return put_back if masks else None


def expert_masks(model: nn.Module) -> dict[str, Tensor]:
    """{parameter name: True where it is not zero} of every fused parameter of experts that has zeros."""
    fused = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 3}
    return {name: parameter != 0 for name, parameter in fused.items() if bool((parameter == 0).any())}


def training_rows(job: Job, options: Training) -> Rows:
    """The rows of a step, those of several data mixed, and those it holds out, as the loop wants them."""
    encoded, place = _mixed(job, options)
    packed, events = packing(job, options)
    made = partial(token_rows, pad_id=job.tokenizer.pad_token_id, packed=packed)
    stop = options.stop
    if stop is None:
        return Rows(made(encoded.examples), None, encoded.report, place, events)
    if stop.data is not None:
        held = _encoded(job, options, stop.data).examples
        return Rows(made(encoded.examples), made(held), encoded.report, place, events)
    draw = torch.Generator().manual_seed(job.seed + SEED_OF_SPLIT)
    shuffled = torch.randperm(len(encoded.examples), generator=draw).tolist()
    count = max(1, round(stop.holdout * len(shuffled)))
    if count >= len(shuffled):
        raise StepError(f'data "{" and ".join(options.mixed)}" has {len(shuffled)} row to train on, and `stop` holds '
                        f"out {count}; expected at least two; give more rows, or name held-out data with `stop: "
                        "{data: ...}`")
    kept, out = sorted(shuffled[count:]), shuffled[:count]
    return Rows(made([encoded.examples[index] for index in kept]), made([encoded.examples[index] for index in out]),
                {**encoded.report, "held_out": count}, lambda index: place(kept[index]), events)


def _mixed(job: Job, options: Training) -> tuple[Encoded, Callable[[int], str]]:
    """The examples of all of a step's data, one after the other, their counts added up, and where each row stands."""
    parts = [_encoded(job, options, name) for name in options.mixed]
    stands = [(job.rows(name), row) for name, part in zip(options.mixed, parts, strict=True) for row in part.origin]
    report = {key: (max if key == "longest" else sum)(part.report.get(key, 0) for part in parts)
              for key in dict.fromkeys(key for part in parts for key in part.report)}
    return (Encoded([example for part in parts for example in part.examples], report),
            lambda index: stands[index][0].place(stands[index][1]))


def packing(job: Job, options: Training) -> tuple[bool, tuple[str, ...]]:
    """Whether rows are packed, and what to tell where they were to be and cannot."""
    reason = can_pack(job.model) if options.packing else False
    return reason is True, (f"rows are padded: {reason}",) if isinstance(reason, str) else ()


def _encoded(job: Job, options: Training, data: str) -> Encoded:
    length = min(options.max_length, job.model.config.max_position_embeddings)
    return encode(job.rows(data), job.tokenizer, max_length=length, limits=job.limits(data).limits,
                  progress=job.progress)


def schedule_of(options: Training, rate: float) -> Schedule:
    """The options as the loop knows them."""
    return Schedule(options.epochs, options.max_steps, rate, options.schedule, options.warmup, options.batch_size,
                    options.batch_tokens, options.accumulate, options.weight_decay, options.max_grad_norm,
                    options.optimizer)


def run_fit(job: Job, options: Training, model: Any, rows: Rows, loss: Loss = next_token_loss,
            after_step: Callable[[], None] | None = None,
            rate_scale: Callable[[str], float] | None = None) -> Trained:
    """Train `model` on `rows` as the options say: a learning rate first where it is `auto`, then the loop."""
    events = list(rows.events)
    fuse(model)
    if len(rows.train):
        reason = can_split(model, to_device(rows.train.batch([0]), next(iter(model.parameters())).device))
        if reason is not True and loss is not next_token_loss:
            raise StepError(f"{reason}; expected a model whose logits are its head on its last hidden state, as this "
                            "step takes them, or what it learned would be wrong; use method: lora or full")
        if reason is not True:
            loss = full_logits_loss
            events.append(f"the loss is computed from all logits at once: {reason}")
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if any(not p.requires_grad for p in model.parameters()):
            model.enable_input_require_grads()
    rate = options.learning_rate
    if rate == "auto":
        def search() -> list[Any]:
            found = find_rate(model, rows.train, schedule_of(options, 1.0), seed=job.seed, loss=loss,
                              rate_scale=rate_scale)
            return [found.rate, found.describe()]

        rate, event = job.checkpoints.remember("rate", search) if job.checkpoints is not None else search()
        events.append(event)
    stop = options.stop
    stopping = Stopping(stop.patience, stop.min_gain, stop.min_gain_per_kilojoule, stop.every,
                        stop.share) if stop is not None else None
    noise = noisy_embeddings(model, options.neftune_alpha)
    hooks = Hooks(after_step, noise.see if noise is not None else None, job.progress, job.log, rows.place, job.spent)
    with noise if noise is not None else nullcontext():
        done = fit(model, rows.train, schedule_of(options, rate), seed=job.seed, loss=loss, hooks=hooks,
                   checkpoints=job.checkpoints, held_out=rows.held_out, stopping=stopping, rate_scale=rate_scale)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return Trained(done, rows, events)


def work_of(job: Job, model: Any, save: Callable[[Path], None], trained: Trained, *, backward: float,
            expected: parity.Expected | None = None) -> Work:
    """What a training step gives back. backward: cost of the backward pass in forward passes (1 where weights are
    frozen, 2 where they are trained). expected: what is promised of the folder; default: weights as dense as its
    parent's, in the type the parent is stored in."""
    done = trained.done
    parameters = parity.count_parameters(model)
    flops = Quantity(2 * parameters * ((1 + backward) * done.tokens + done.held_out_tokens), "FLOP", "estimated",
                     f"{2 * (1 + backward):g} x parameters x tokens (Kaplan et al. 2020, attention scores left out)")
    if expected is None:
        expected = parity.Expected(sparsity=_zero_share(job.model) if job.keeps_zeros else None, dtype=job.storage)
    events = [f"{done.steps} steps, {done.tokens:,} tokens in {done.wall_s:.1f} s", *trained.events, *done.events]
    if done.looks:
        events.append(f"looking at the held-out loss took {done.held_out_s / max(1e-9, done.wall_s):.1%} of the time")
    return Work(model, save, expected, done.tokens, flops, done.loss, done.looks,
                {**trained.rows.report, "steps": done.steps}, events)


def _zero_share(model: nn.Module) -> float:
    zeros, total = parity.sparsity(model)
    return zeros / max(1, total)

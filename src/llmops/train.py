"""The one training loop: transformers' Trainer, with the loss as a function.

Every step that trains (LoRA, full fine-tuning, distillation) comes through `fit`. What differs between them is the
loss, so the loss is an argument; the loop names no method. Three things are done differently from the stock loop:

- The loss is token-weighted: each forward pass is divided by the number of trained tokens in the whole optimizer
  step, so that accumulation equals the big batch, also when rows have different lengths.
- The first position of a row never counts as a target (nothing predicts it), in the loss and in the divisor.
- A loss that is not finite stops the step at once and names the rows of the batch.

No checkpoint is written inside a step: a killed run repeats the stage it was in.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llmops.data.render import collate
from llmops.errors import StepError

__all__ = ["IGNORED", "Fit", "Loss", "Progress", "Schedule", "fit", "next_token_loss"]

IGNORED = -100
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]  # -> the SUM of the loss over the batch's trained tokens
Progress = Callable[[int, int, str], None]  # done, total, what to print beside the bar


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, and how much at once. `warmup` is a fraction of the optimizer steps."""

    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    batch_size: int = 8
    accumulate: int = 1
    weight_decay: float = 0.0


@dataclass
class Fit:
    """What a training left behind: steps taken, tokens seen (padding apart) and trained on, the loss of every step."""

    steps: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    wall_s: float = 0.0
    loss: list[tuple[int, float]] = field(default_factory=list)


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum over the trained tokens of -log p(token | those before). batch: input_ids, attention_mask, labels (B, T)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (B, T, V)
    targets = batch["labels"][:, 1:].reshape(-1)
    kept = targets != IGNORED  # rows without a loss are dropped before the softmax: it is the larger half of the memory
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1])[kept].float(), targets[kept],
                                       reduction="sum")


def fit(model: nn.Module, examples: Sequence[Mapping[str, list[int]]], schedule: Schedule, *, pad_id: int, seed: int,
        loss: Loss = next_token_loss, after_step: Callable[[], None] | None = None,
        progress: Progress | None = None, place: Callable[[int], str] = lambda index: f"row {index + 1}") -> Fit:
    """Train the parameters that require a gradient, in place. `after_step` runs after every optimizer step.

    place: names the example of an index, for people. Raises StepError when the loss is not finite, naming the rows.
    """
    rows = [{**example, "row": number} for number, example in enumerate(examples)]
    result = Fit()
    watch = _Watch(result, after_step, progress)
    with tempfile.TemporaryDirectory(prefix="llmops-train-") as scratch:
        trainer = _Trainer(model=model, args=_arguments(schedule, scratch, seed, next(model.parameters()).device),
                           train_dataset=rows, data_collator=lambda batch: _batch(batch, pad_id),
                           callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.prepare(loss, watch, place)
        was_training, use_cache = model.training, getattr(model.config, "use_cache", None)
        model.config.use_cache = False
        started = time.perf_counter()
        try:
            trainer.train()
        finally:
            model.config.use_cache = use_cache
            model.train(was_training)
        result.wall_s = time.perf_counter() - started
    return result


def _batch(examples: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, Tensor]:
    batch = collate([{k: v for k, v in example.items() if k != "row"} for example in examples], pad_id)
    batch["labels"][:, 0] = IGNORED
    batch["row"] = torch.tensor([example["row"] for example in examples])
    return batch


def _arguments(schedule: Schedule, scratch: str, seed: int, device: torch.device) -> TrainingArguments:
    # rows of like length share a batch, so that little of it is padding
    return TrainingArguments(
        output_dir=scratch, train_sampling_strategy="group_by_length",
        num_train_epochs=schedule.epochs, max_steps=schedule.max_steps or -1,
        learning_rate=schedule.learning_rate, warmup_steps=schedule.warmup,
        lr_scheduler_type="constant_with_warmup" if schedule.schedule == "constant" else schedule.schedule,
        per_device_train_batch_size=schedule.batch_size, gradient_accumulation_steps=schedule.accumulate,
        weight_decay=schedule.weight_decay, max_grad_norm=1.0, seed=seed, data_seed=seed, save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, use_cpu=device.type == "cpu",
        bf16=device.type == "cuda", dataloader_pin_memory=device.type == "cuda", logging_strategy="no",
        dataloader_num_workers=0)


class _Trainer(Trainer):  # type: ignore[misc]
    """The stock loop with our loss in it."""

    def prepare(self, loss: Loss, watch: _Watch, place: Callable[[int], str]) -> None:
        self.loss, self.watch, self.place = loss, watch, place
        self.model_accepts_loss_kwargs = True  # makes the loop count the trained tokens of a whole optimizer step

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Tensor:
        rows = inputs.pop("row").tolist()
        trained = int((inputs["labels"] != IGNORED).sum())
        items = num_items_in_batch if num_items_in_batch is not None else max(1, trained)
        loss = self.loss(model, inputs) / items
        value = float(loss.detach())
        if not math.isfinite(value):
            raise StepError(f"the loss became {value} at optimizer step {self.state.global_step + 1}, on the batch of "
                            f"{_few([self.place(row) for row in rows])}; expected a finite number; lower the learning "
                            "rate, or look at these rows with `llmops data show`")
        self.watch.pending += value
        self.watch.result.tokens += int(inputs["attention_mask"].sum())
        self.watch.result.trained_tokens += trained
        # the divisor counts the tokens of all ranks, and gradients are averaged over ranks
        return loss * self.accelerator.num_processes


def _few(rows: list[str]) -> str:
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Notes the loss of each optimizer step, lets masks be kept, and moves the progress bar."""

    def __init__(self, result: Fit, after_step: Callable[[], None] | None, progress: Progress | None) -> None:
        self.result, self.after_step, self.progress = result, after_step, progress
        self.pending = 0.0  # the loss of the optimizer step under way
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after_step is not None:
            self.after_step()
        self.result.steps = state.global_step
        self.result.loss.append((state.global_step, self.pending))
        if self.progress is not None:
            rate = self.result.tokens / max(1e-9, time.perf_counter() - self.started)
            self.progress(state.global_step, state.max_steps, f"loss {self.pending:.3f}, {rate:,.0f} tokens/s")
        self.pending = 0.0

"""The one training loop. Every step that trains (LoRA, full, preferences, distillation) comes through `fit`.

What differs between them is the loss, so the loss is an argument; the loop names no method. Its promises:

- The loss of a step is the sum over its rows divided by the weight of the whole step (its trained tokens), so that
  accumulation, several processes and the big batch give one gradient, also when rows have different lengths.
- A killed run goes on from its last checkpoint and computes, bit for bit on a CPU, what it would have computed. The
  random numbers of a step (dropout, noise) follow from the seed, the step and the rank alone, so there is no state of
  a generator to lose.
- When memory runs out, the forward passes are cut in half and the step is done again: the same rows, the same
  gradient (dropout draws anew). It is noted, never silent.
- A loss or gradient that is not finite stops the training before it touches a weight, and names the rows.

Weights are trained in the type they have; on a GPU the forward pass runs in bfloat16 autocast. Left out: sharding a
model over several devices (every process holds the whole).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from llmops.errors import BudgetReached, StepError
from llmops.models.packed_rows import use_packed_attention
from llmops.models.token_loss import next_token_loss
from llmops.train.checkpoint import Checkpoints, Saved
from llmops.train.passes import Loss, autocast, first_line, mean_loss, out_of_memory
from llmops.train.ranks import add_up_gradients, agree, all_the_same, rank_and_size
from llmops.train.rows import Step, TrainingSet, order, share, shrunk, to_device, tokens_of
from llmops.train.schedule import Schedule, make_optimizer, rate_factor
from llmops.train.stop import NOMINAL_WATTS, Stopping

__all__ = ["Fit", "Hooks", "Loss", "Progress", "fit", "mean_loss"]

Progress = Callable[[int, int, str], None]  # done, total, what to print beside the bar


@dataclass
class Fit:
    """What a training left behind: steps taken, tokens seen (padding apart) and trained on, the loss of every step.

    `wall_s` counts every attempt up to the checkpoint the next one went on from. `looks`: (step, held-out loss per
    token). `resumed`: the steps whose checkpoints it went on from. `events`: what a reader of the row should know.
    """

    steps: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    held_out_tokens: int = 0
    wall_s: float = 0.0
    held_out_s: float = 0.0
    energy_j: float = 0.0
    loss: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Hooks:
    """What the loop tells and asks. All may be left out.

    after_step: runs after every optimizer step (masks are kept by it). before_pass: sees every batch before the
    forward pass. log: (step, figures) for curves and trackers. place: names a row, for people. spent: joules of this
    attempt so far, or None where nobody knows.
    """

    after_step: Callable[[], None] | None = None
    before_pass: Callable[[Mapping[str, Tensor]], None] | None = None
    progress: Progress | None = None
    log: Callable[[int, Mapping[str, float]], None] | None = None
    place: Callable[[int], str] = lambda index: f"row {index + 1}"
    spent: Callable[[], float | None] = lambda: None


def fit(model: nn.Module, rows: TrainingSet, schedule: Schedule, *, seed: int, loss: Loss = next_token_loss,
        hooks: Hooks = Hooks(), checkpoints: Checkpoints | None = None,  # noqa: B008 - frozen
        held_out: TrainingSet | None = None, stopping: Stopping | None = None,
        rate_scale: Callable[[str], float] | None = None) -> Fit:
    """Train the parameters that require a gradient, in place.

    held_out: rows whose loss is looked at as `stopping` says (and kept in `Fit.looks`); without it `stopping` is not
    used. With `stopping` the weights of the best look are what is left in the model. Raises StepError when the loss
    is not finite or one row does not fit into memory, StoreError when a checkpoint cannot be written.
    """
    loop = _Loop(model, rows, schedule, seed, loss, hooks, checkpoints, held_out, stopping, rate_scale)
    was_training, use_cache = model.training, getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    try:
        with use_packed_attention(model) if rows.packed else nullcontext():
            return loop.run()
    finally:
        model.config.use_cache = use_cache
        model.train(was_training)


class _Loop:
    """One training under way."""

    def __init__(self, model: nn.Module, rows: TrainingSet, schedule: Schedule, seed: int, loss: Loss, hooks: Hooks,
                 checkpoints: Checkpoints | None, held_out: TrainingSet | None, stopping: Stopping | None,
                 rate_scale: Callable[[str], float] | None) -> None:
        self.model, self.rows, self.schedule, self.loss, self.hooks = model, rows, schedule, loss, hooks
        self.checkpoints, self.stopping = checkpoints, stopping if held_out is not None else None
        self.trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.device = next(model.parameters()).device
        self.steps = order(rows, schedule, seed)
        self.optimizer = make_optimizer(self.trained.items(), schedule, schedule.learning_rate, rate_scale)
        self.held_out = self._affordable(held_out) if held_out is not None and self.stopping is not None else None
        self.rank, self.size = rank_and_size()
        self.halvings = 0
        self.best: dict[str, Tensor] = {}
        self.done = Fit()
        self.seed, self.foreign = seed, False
        if self.stopping is not None:
            self.stopping.restore({"looks": [], "poor": 0})

    # ------------------------------------------------------------------------------------------------- the walk

    def run(self) -> Fit:
        first = self._resume()
        if self.size > 1:
            agree()
            all_the_same({"the next step": first + 1, "what is trained": self.identity,
                          "the weights": sum(float(value.detach().double().sum()) for value in self.trained.values())})
        if self.foreign and self.rank == 0 and self.checkpoints is not None:
            self.checkpoints.discard()
        self.began, self.before_s, self.before_j = time.perf_counter(), self.done.wall_s, self.done.energy_j
        self.tokens_before = self.done.tokens
        self.model.train()
        for number in range(first, len(self.steps)):
            self._set_rate(number)
            value, norm = self._step(self.steps[number], number)
            if self.hooks.after_step is not None:
                self.hooks.after_step()
            step = number + 1
            self.done.steps = step
            self.done.loss.append((step, value))
            stop = self._look(step)
            try:
                self._tell(step, value, norm)
            except BudgetReached:  # what was paid for is kept
                if self.checkpoints is not None and self.rank == 0:
                    self._save(step, stop)
                raise
            last = stop or step == len(self.steps)
            if self.checkpoints is not None and self.rank == 0 and (last or self.checkpoints.due(step)):
                self._save(step, stop)
            if stop:
                break
        self._clock()
        self._take_best()
        priced = self.stopping is not None and self.stopping.min_gain_per_kilojoule is not None
        if priced and self.hooks.spent() is None:
            self.done.events.append(f"no energy was measured: a second counted as {NOMINAL_WATTS:g} J for "
                                    "min_gain_per_kilojoule")
        if self.done.resumed:
            steps = self.done.resumed
            self.done.events.append("went on from the checkpoint of step " + ", then ".join(map(str, steps[-8:]))
                                    + (f", {len(steps)} times in all" if len(steps) > 8 else ""))
        return self.done

    def _step(self, step: Step, number: int) -> tuple[float, float]:
        """One optimizer step: (loss per unit of weight, norm of the gradient)."""
        while True:
            found = self._try(step, number)
            if not isinstance(found, str):
                return found
            self._halve(step, number, found)

    def _try(self, step: Step, number: int) -> tuple[float, float] | str:
        """The step, or why memory ran out before its gradient was there."""
        weight = max(1, sum(self.rows.weights[index] for one in step for index in one))
        passes = share(shrunk(step, self.halvings), self.rank, self.size)
        torch.manual_seed(random.Random(f"{self.seed}/{number}/{self.rank}").getrandbits(63))
        value, tokens, reason, trouble = 0.0, 0, "", None
        try:
            value, tokens = self._gradient(passes, weight, number)
        except StepError as error:
            if self.size == 1:
                raise
            trouble = str(error)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = first_line(error)  # and leave the handler: the traceback holds the activations
        ran_out, value, counted = agree([float(bool(reason)), value, float(tokens)], trouble)
        if ran_out:
            return reason or "on another rank"
        add_up_gradients(self.trained.values())
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.schedule.max_grad_norm)
        self._refuse("gradient", norm.detach().cpu().reshape(1), [[index for one in step for index in one]], number)
        self._update(number)
        self.done.tokens += int(counted)
        self.done.trained_tokens += weight
        return value, float(norm)

    def _gradient(self, passes: Step, weight: int, number: int) -> tuple[float, int]:
        """Forward and backward over this rank's passes: (its part of the step's loss, its tokens)."""
        values: list[Tensor] = []
        tokens = 0
        for indices in passes:
            batch = self.rows.batch(indices)
            tokens += tokens_of(batch)
            batch = to_device(batch, self.device)
            if self.hooks.before_pass is not None:
                self.hooks.before_pass(batch)
            with autocast(self.device):
                value = self.loss(self.model, batch) / weight
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
            values.append(value.detach().double())
        found = torch.stack(values).cpu() if values else torch.zeros(1, dtype=torch.float64)
        self._refuse("loss", found, passes, number)
        return float(found.sum()), tokens

    def _update(self, number: int) -> None:
        """The optimizer's step. It has no second try: when its memory runs out, some of its state is there already."""
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise StepError(f"memory ran out in the update of optimizer step {number + 1} ({first_line(error)}): the "
                            f"state of {self.schedule.optimizer} does not fit beside the model; take optimizer: "
                            "adamw_8bit or sgd, or train adapters (method: lora)") from None
        self.optimizer.zero_grad(set_to_none=True)

    def _refuse(self, what: str, values: Tensor, passes: Step, number: int) -> None:
        """Stop before a weight is touched when one of `values` is not finite; each belongs to one of `passes`."""
        for value, indices in zip(values.tolist(), passes, strict=False):
            if not math.isfinite(value):
                raise StepError(f"the {what} became {value} at optimizer step {number + 1}, on the batch of "
                                f"{_few([self.hooks.place(index) for index in indices])}; expected a finite number; "
                                "lower the learning rate, or look at these rows with `llmops data show`")

    def _halve(self, step: Step, number: int, reason: str) -> None:
        largest = max(len(one) for one in shrunk(step, self.halvings))
        if largest == 1:
            longest = max((index for one in step for index in one), key=lambda index: self.rows.lengths[index])
            raise StepError(f"memory ran out at optimizer step {number + 1} with one row in a forward pass "
                            f"({reason}); the longest row of the step is {self.hooks.place(longest)} with "
                            f"{self.rows.lengths[longest]:,} tokens: lower max_length, or set gradient_checkpointing: "
                            "true")
        self.optimizer.zero_grad(set_to_none=True)
        self._fewer_rows(f"memory ran out at step {number + 1} ({reason}): forward passes cut to at most "
                         f"{(largest + 1) // 2} rows, accumulation doubled; the gradient is the same")

    def _fewer_rows(self, event: str) -> None:
        self.halvings += 1
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.done.events.append(event)

    def _set_rate(self, number: int) -> None:
        rate = self.schedule.learning_rate * rate_factor(number, len(self.steps), self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    # --------------------------------------------------------------------------------------- looking and stopping

    def _affordable(self, held_out: TrainingSet) -> TrainingSet:
        """As many held-out rows as the share of the training pays for at every look, the one at the end included."""
        assert self.stopping is not None
        whole = sum(self.rows.lengths[index] for step in self.steps for one in step for index in one)
        looks = sum(self.stopping.due(step, len(self.steps)) for step in range(1, len(self.steps) + 1))
        frozen = len(self.trained) < sum(1 for _ in self.model.parameters())
        budget = self.stopping.share * whole / looks * (2 if frozen else 3)
        tokens = count = 0
        while count < len(held_out) and (count == 0 or tokens + held_out.lengths[count] <= budget):
            tokens += held_out.lengths[count]
            count += 1
        return held_out.first(count)

    def _look(self, step: int) -> bool:
        """Take the held-out loss where it is due; whether to stop here."""
        if self.stopping is None or self.held_out is None or not self.stopping.due(step, len(self.steps)):
            return False
        began, value = time.perf_counter(), self._held_out_loss(step)
        self.done.held_out_tokens += sum(self.held_out.lengths)
        self.done.held_out_s += time.perf_counter() - began
        self.done.looks.append((step, value))
        best = self.stopping.best
        if best is None or value < best.loss:
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.trained.items()}
        self._clock()
        stop = self.stopping.see(step, value, self.done.energy_j) and step < len(self.steps)
        stop = agree([float(stop and self.rank == 0)])[0] > 0  # rank 0 alone knows what was spent
        if stop:
            self.done.events.append(self.stopping.reason())
        return stop

    def _held_out_loss(self, step: int) -> float:
        assert self.held_out is not None
        while True:
            size = max(1, self.schedule.batch_size >> self.halvings)
            try:
                return mean_loss(self.model, self.held_out, self.loss, batch_size=size)
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            if size == 1:
                raise StepError(f"memory ran out at the look after step {step} with one held-out row in a forward "
                                f"pass ({reason}); the longest has {max(self.held_out.lengths):,} tokens: lower "
                                "max_length, or leave long rows out of the held-out data")
            self._fewer_rows(f"memory ran out at the look after step {step} ({reason}): passes cut in half")

    def _take_best(self) -> None:
        best = self.stopping.best if self.stopping is not None else None
        if best is None or best.step == self.done.steps:
            return
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.trained[name].copy_(tensor)
        self.done.events.append(f"kept the weights of step {best.step}, where the held-out loss was lowest "
                                f"({best.loss:.4f})")

    # ------------------------------------------------------------------------------------- what is told and kept

    def _clock(self) -> None:
        """Time and energy so far. Where energy is not known, time at a nominal power stands in for stopping."""
        here = time.perf_counter() - self.began
        self.done.wall_s = self.before_s + here
        spent = self.hooks.spent()
        self.done.energy_j = self.before_j + (here * NOMINAL_WATTS if spent is None else spent)

    def _tell(self, step: int, value: float, norm: float) -> None:
        if self.hooks.progress is None and self.hooks.log is None:
            return
        self._clock()
        here = max(1e-9, time.perf_counter() - self.began)
        rate = (self.done.tokens - self.tokens_before) / here
        figures = {"loss": value, "grad_norm": norm, "learning_rate": self.optimizer.param_groups[0]["lr"],
                   "tokens_per_s": rate, "tokens": float(self.done.tokens)}
        text = f"loss {value:.3f}, {rate:,.0f} tokens/s"
        if self.hooks.spent() is not None:
            figures |= {"energy_j": self.done.energy_j, "joules_per_token": self.done.energy_j / self.done.tokens}
            text += f", {_joules(self.done.energy_j)}, {1000 * figures['joules_per_token']:.3g} mJ/token"
        if self.done.looks and self.done.looks[-1][0] == step:
            figures["held_out_loss"] = self.done.looks[-1][1]
        if self.hooks.progress is not None:
            self.hooks.progress(step, len(self.steps), text)
        if self.hooks.log is not None:
            self.hooks.log(step, figures)

    def _save(self, step: int, stopped: bool) -> None:
        assert self.checkpoints is not None
        self._clock()
        done = {key: value for key, value in vars(self.done).items()}
        stopping = self.stopping.as_state() if self.stopping is not None else None
        state = {"done": done, "halvings": self.halvings, "stopping": stopping, "stopped": stopped,
                 "training": self.identity}
        self.checkpoints.save(step, Saved(self.trained, self.optimizer.state_dict()["state"], state, self.best))

    def _resume(self) -> int:
        """Go on from the newest checkpoint, if there is one; the number of the first step to do."""
        found = self.checkpoints.latest() if self.checkpoints is not None else None
        if found is None:
            return 0
        step, saved = found
        if saved.state.get("training") != self.identity:
            self.done.events.append("a checkpoint of another training lay here and was not used")
            self.foreign = True
            return 0
        with torch.no_grad():
            for name, tensor in saved.trained.items():
                self.trained[name].copy_(tensor)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": saved.optimizer})
        self.done = Fit(**saved.state["done"])
        self.done.loss = [(int(at), value) for at, value in self.done.loss]
        self.done.looks = [(int(at), value) for at, value in self.done.looks]
        self.done.resumed.append(step)
        self.halvings, self.best = saved.state["halvings"], saved.best
        if self.stopping is not None and saved.state["stopping"] is not None:
            self.stopping.restore(saved.state["stopping"])
        return len(self.steps) if saved.state["stopped"] else step

    @cached_property
    def identity(self) -> str:
        """A hash over what a checkpoint has to share with this training: rows, their order, settings, parameters."""
        parts = [self.seed, asdict(self.schedule), list(self.rows.lengths), list(self.rows.weights), self.steps,
                 {name: list(value.shape) for name, value in self.trained.items()}]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _few(rows: list[str]) -> str:
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def _joules(value: float) -> str:
    return f"{value / 1000:,.2f} kJ" if value >= 1000 else f"{value:,.0f} J"

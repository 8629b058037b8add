"""The loss of a batch under a teacher, as the loop wants it: summed over its trained tokens.

Three sources of a teacher's word, one loss: the teacher itself beside the student (`live_loss`), the same on answers
that the student has just drawn (`drawn` put in front), and signals from the disk (`offline_loss`). Hidden states and
attention are matched only where the teacher itself runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.build.on_policy import Drawn
from llmops.errors import StepError
from llmops.methods.distill.attention import attention_loss
from llmops.methods.distill.hidden import hidden_loss, projections, uniform_pairs
from llmops.methods.distill.logits import distill_loss, divergence_of, log_softmax_at, mixed
from llmops.methods.distill.options import Logits
from llmops.methods.distill.top_k import outcomes_at
from llmops.models.arch import decoder_layers, text_config
from llmops.models.attention_maps import Attended, attended
from llmops.models.block_outputs import block_outputs
from llmops.models.token_loss import head_of, last_hidden
from llmops.train import IGNORED, Loss

__all__ = ["Stopwatch", "check_columns", "live_loss", "matched_states", "offline_loss"]

PROJECTION = "llmops_projection"  # where the student carries the matrices that it is trained with, and not saved with


@dataclass
class Stopwatch:
    """Seconds spent in `with` blocks, on the device: on a GPU its own clock is asked, and nobody waits for it."""

    device: torch.device
    _seconds: float = 0.0
    _events: list[tuple[Any, Any]] = field(default_factory=list)
    _began: Any = None

    def __enter__(self) -> Stopwatch:
        self._began = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._events.append((self._began, self._now()))
            if len(self._events) > 4096:
                self._seconds, self._events = self.seconds(), []
        else:
            self._seconds += self._now() - self._began

    def seconds(self) -> float:
        """So far; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
        return self._seconds + sum(float(first.elapsed_time(last)) for first, last in self._events) / 1000

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def offline_loss(options: Logits, vocabulary: int) -> Loss:
    """From `signal_ids` and `signal_log_p` of the batch (`build/signals.py`). vocabulary: logits of the student that
    count, at least as many as the signals are over; those beyond belong to the rest."""
    divergence = divergence_of(options.loss, beta=options.beta, skew=options.skew)

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        said, labels = _said(model, last_hidden(model, batch), batch, vocabulary)
        log_q = outcomes_at(log_softmax_at(said, options.temperature), batch["signal_ids"])
        soft = divergence(batch["signal_log_p"], log_q).sum() * options.temperature**2
        return mixed(soft, said, labels, options.hard_weight)

    return loss


@contextmanager
def live_loss(teacher: nn.Module, student: nn.Module, options: Logits, vocabulary: int, watch: Stopwatch,
              seed: int = 0, drawn: Drawn | None = None) -> Iterator[Loss]:
    """With the teacher beside the student. vocabulary: ids that mean the same to both; watch: runs while the teacher
    does; drawn: puts the student's own answers into the batch first."""
    say = partial(distill_loss, temperature=options.temperature, top_k=options.top_k, hard_weight=options.hard_weight,
                  divergence=divergence_of(options.loss, beta=options.beta, skew=options.skew))
    with ExitStack() as stack:
        states = (stack.enter_context(matched_states(teacher, student, seed=seed)) if options.hidden_weight else None)
        looks = _matched_attention(teacher, student) if options.attention_weight else None

        def loss(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
            batch = drawn(model, given) if drawn is not None and torch.is_grad_enabled() else given
            with torch.no_grad(), watch, ExitStack() as seen:
                theirs = seen.enter_context(attended(teacher)) if looks is not None else None
                taught, _ = _said(teacher, last_hidden(teacher, batch), batch, vocabulary)
            with ExitStack() as seen:
                mine = seen.enter_context(attended(model)) if looks is not None else None
                said, labels = _said(model, last_hidden(model, batch), batch, vocabulary)
            total = say(said, taught, labels)
            if states is not None:
                total = total + options.hidden_weight * len(said) * states(batch)
            if looks is not None and mine is not None and theirs is not None:
                total = total + options.attention_weight * len(said) * looks(mine, theirs, batch)
            if batch is not given:  # count as many tokens as the loop divides by
                total = total * ((given["labels"][:, 1:] != IGNORED).sum() / len(said))
            return total

        yield loss


def _said(model: nn.Module, hidden: Tensor, batch: Mapping[str, Tensor], vocabulary: int) -> tuple[Tensor, Tensor]:
    """(logits (N, vocabulary), labels (N,)) of the trained tokens."""
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    return head_of(model)(hidden[:, :-1][kept])[:, :vocabulary], labels[kept]


@contextmanager
def matched_states(teacher: nn.Module, student: nn.Module, *, seed: int = 0
                   ) -> Iterator[Callable[[Mapping[str, Tensor]], Tensor]]:
    """How far the student's hidden states of the last batch are from the teacher's, on all tokens but padding.

    Where the widths differ the student carries a matrix for each pair meanwhile, which is trained with it.
    """
    pairs = uniform_pairs(*(len(decoder_layers(model)[1]) for model in (student, teacher)))
    mine, theirs = (int(text_config(model).hidden_size) for model in (student, teacher))
    device = next(student.parameters()).device
    matrices = None
    if mine != theirs:
        matrices = nn.ParameterList(nn.Parameter(W.to(device))
                                    for W in projections(len(pairs), mine, theirs, seed))
        student.add_module(PROJECTION, matrices)
    try:
        with block_outputs(student) as ours, block_outputs(teacher) as told:

            def distance(batch: Mapping[str, Tensor]) -> Tensor:
                mask = batch.get("attention_mask")
                real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
                return hidden_loss([ours[s][real] for s, _ in pairs], [told[t][real] for _, t in pairs],
                                   [*matrices] if matrices is not None else None)

            yield distance
    finally:
        if matrices is not None:
            delattr(student, PROJECTION)


def _matched_attention(teacher: nn.Module, student: nn.Module
                       ) -> Callable[[Attended, Attended, Mapping[str, Tensor]], Tensor]:
    """How far the student's attention of a batch is from the teacher's, nats a query."""
    pairs = uniform_pairs(*(len(decoder_layers(model)[1]) for model in (student, teacher)))

    def distance(mine: Attended, theirs: Attended, batch: Mapping[str, Tensor]) -> Tensor:
        ours, told = ([each.maps(pair[side], batch) for pair in pairs] for side, each in enumerate((mine, theirs)))
        lengths = [one.shape[-1] for one in ours[0]]
        losses = torch.stack([attention_loss([layer[row] for layer in ours], [layer[row] for layer in told])
                              for row in range(len(lengths))])
        weights = torch.tensor(lengths, device=losses.device, dtype=losses.dtype)
        return (losses * weights).sum() / weights.sum()

    return distance


def check_columns(student: nn.Module, teacher_rows: int, vocabulary: int) -> None:
    """Raises StepError when either has no logit for a token that the tokenizer knows."""
    rows = int(text_config(student).vocab_size)
    if min(rows, teacher_rows) < vocabulary:
        raise StepError(f"the student has {rows:,} logits and the teacher {teacher_rows:,}, and the tokenizer knows "
                        f"{vocabulary:,} tokens; expected one for each: take a student with the same vocabulary")

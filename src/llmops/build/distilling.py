"""The step that distills: the one training loop with a teacher in its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmops.build.job import Job, Work, bar
from llmops.build.training import train_all, trainable, training_rows
from llmops.data.render import prompts_and_answers, with_answers
from llmops.data.sources import Rows
from llmops.errors import StepError
from llmops.evaluate.exact_match import ended_answers
from llmops.methods.distill.hidden import hidden_loss, uniform_pairs
from llmops.methods.distill.logits import distill_loss
from llmops.methods.distill.options import Logits
from llmops.models.arch import decoder_layers, text_config
from llmops.models.block_outputs import block_outputs
from llmops.models.packed_rows import use_packed_attention
from llmops.models.parity import count_parameters
from llmops.models.token_loss import head_of, last_hidden
from llmops.quantity import Quantity
from llmops.train import IGNORED, Loss

__all__ = ["logits_step"]


def logits_step(job: Job, options: Logits, train: Callable[..., Work] = train_all) -> Work:
    """Every weight of the student is trained towards the teacher's distribution, and its hidden states if asked.

    train: `train_all`, or what does the same for another kind of student.
    """
    if job.teacher is None:
        raise StepError("distillation needs a teacher; name one with `teacher:`")
    teacher = trainable(job.teacher(options.teacher), frozen=True)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    told = _Told()
    taught = job if options.answers == "data" else replace(job, rows=_answered(job, options, teacher, told))
    rows = training_rows(taught, options)
    attention = use_packed_attention(teacher) if rows.train.packed else nullcontext()
    with attention, _taught_by(teacher, job.model, options) as loss:
        work = train(job, options, loss, rows)
    work.events += told.events
    forward = 2.0 * count_parameters(teacher) * (work.tokens + told.tokens)
    if work.flops.value is not None:
        work.flops = Quantity(work.flops.value + forward, "FLOP", "estimated",
                              f"{work.flops.method}, and 2 x the teacher's parameters x tokens"
                              + (" read and written" if told.tokens else ""))
    return work


@dataclass
class _Told:
    """What became of a teacher's answers: for the row, and the tokens it read and wrote."""

    events: list[str] = field(default_factory=list)
    tokens: int = 0


def _answered(job: Job, options: Logits, teacher: Any, told: _Told) -> Callable[[str], Rows]:
    """The data by name with the teacher's answers in place of its own; what became of them goes into `told`.

    Answered once, in the first attempt of a build. Answers that do not end within `max_new_tokens` would teach to break
    off, empty ones to say nothing: both are left out. Raises StepError when no answer is left.
    """
    kept: dict[str, Rows] = {}

    def rows(name: str) -> Rows:
        if name not in kept:
            source = job.rows(name)
            prompts = prompts_and_answers(source, job.tokenizer)

            def write() -> list[str | None]:
                return ended_answers(teacher, job.tokenizer, [prompt.input_ids for prompt in prompts],
                                     max_new_tokens=options.max_new_tokens, progress=bar(job))

            answers = job.checkpoints.remember(f"answers-{name}", write) if job.checkpoints is not None else write()
            good = {row: str(answer) for row, answer in enumerate(answers) if answer and answer.strip()}
            lost = len(answers) - len(good)
            told.events.append(f"{options.teacher} answered {len(good):,} of the {len(answers):,} prompts of {name}"
                               + (f"; {lost:,} answers were empty or not done after {options.max_new_tokens} tokens, "
                                  "and are left out" if lost else ""))
            if not good:
                raise StepError(f'data "{name}": {options.teacher} ended none of its {len(answers)} answers within '
                                f"{options.max_new_tokens} tokens; expected a teacher that answers such prompts, or a "
                                "larger max_new_tokens")
            told.tokens += sum(len(prompt.input_ids) for prompt in prompts)
            told.tokens += sum(len(ids) for ids in job.tokenizer([*good.values()])["input_ids"])
            kept[name] = with_answers(source, good, job.tokenizer)
        return kept[name]

    return rows


@contextmanager
def _taught_by(teacher: nn.Module, student: nn.Module, options: Logits) -> Iterator[Loss]:
    """The loss of a batch: summed over its trained tokens, as the loop wants it."""

    def trained_logits(model: nn.Module, hidden: Tensor, kept: Tensor) -> Tensor:  # (N, V)
        return head_of(model)(hidden[:, :-1][kept])

    with ExitStack() as stack:
        states = stack.enter_context(_matched(teacher, student)) if options.hidden_weight else None

        def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            kept = batch["labels"][:, 1:] != IGNORED
            with torch.no_grad():
                taught = trained_logits(teacher, last_hidden(teacher, batch), kept)
            said = trained_logits(model, last_hidden(model, batch), kept)
            total = distill_loss(said, taught, batch["labels"][:, 1:][kept], temperature=options.temperature,
                                 direction=options.loss, hard_weight=options.hard_weight)
            return total if states is None else total + options.hidden_weight * kept.sum() * states(batch)

        yield loss


@contextmanager
def _matched(teacher: nn.Module, student: nn.Module) -> Iterator[Callable[[Mapping[str, Tensor]], Tensor]]:
    """How far the student's hidden states of the last batch are from the teacher's, on all tokens but padding."""
    widths = [int(text_config(model).hidden_size) for model in (student, teacher)]
    if widths[0] != widths[1]:
        raise StepError(f"hidden_weight with a student {widths[0]} wide and a teacher {widths[1]} wide; expected one "
                        "hidden size: leave hidden_weight out")
    pairs = uniform_pairs(*(len(decoder_layers(model)[1]) for model in (student, teacher)))
    with block_outputs(student) as mine, block_outputs(teacher) as theirs:

        def distance(batch: Mapping[str, Tensor]) -> Tensor:
            mask = batch.get("attention_mask")
            real = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
            return hidden_loss([mine[s][real] for s, _ in pairs], [theirs[t][real] for _, t in pairs])

        yield distance

"""The step that distills: the one training loop with a teacher in its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from llmops.build.answers import Answered
from llmops.build.job import Job, Work, bar
from llmops.build.on_policy import Drawn, drawer
from llmops.build.shared import Shared
from llmops.build.signals import Signals, open_signals, write_signals
from llmops.build.teaching import Stopwatch, check_columns, live_loss, offline_loss
from llmops.build.training import Rows as TrainingRows
from llmops.build.training import train_all, trainable, training_rows
from llmops.errors import StepError
from llmops.evaluate.exact_match import ended_answers
from llmops.methods.distill.options import Logits, Student
from llmops.models.packed_rows import attention_implementation, use_packed_attention
from llmops.models.parity import count_parameters
from llmops.models.student import agreed_vocabulary, fresh_student, vocabulary_rows
from llmops.quantity import Quantity
from llmops.train import Loss

__all__ = ["logits_step"]


def logits_step(job: Job, options: Logits, train: Callable[..., Work] = train_all) -> Work:
    """Every weight of the student is trained towards the teacher's distribution, and its states if asked.

    train: `train_all`, or what does the same for another kind of student.
    """
    if job.teacher is None:
        raise StepError("distillation needs a teacher; name one with `teacher:`")
    lesson = _Lesson(job, options)
    if options.student is not None:
        lesson.job = job = replace(job, model=_student(job, options.student, lesson))
    answered = _answered(lesson) if options.answers == "teacher" else None
    rows = training_rows(job if answered is None else replace(job, rows=answered.rows), options)
    with _loss(lesson, rows) as (loss, rows):
        work = train(job, options, loss, rows)
    _charge(work, lesson)
    work.shared += answered.shared if answered is not None else []
    return work


@dataclass
class _Lesson:
    """One student's: its job, what the teacher did for it, and what the row is told of that.

    The teacher is loaded when it is first needed; signals and answers from the disk need none. reads, writes: tokens
    that it ran over in this attempt, beside those of the training.
    """

    job: Job
    options: Logits
    events: list[str] = field(default_factory=list)
    reads: int = 0
    runs_beside: bool = False
    drawn: Drawn | None = None

    @cached_property
    def teacher(self) -> Any:
        assert self.job.teacher is not None
        teacher = trainable(self.job.teacher(self.options.teacher), frozen=True)
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        return teacher

    def compare(self, theirs: int) -> None:
        """Say so where the student has more parameters than its teacher's `theirs`."""
        mine = count_parameters(self.job.model)
        if mine > theirs:
            self.events.append(f"the student has {mine:,} parameters, more than its teacher's {theirs:,}: allowed, but "
                               "it will cost more to run than what it learns from")

    @cached_property
    def watch(self) -> Stopwatch:
        return Stopwatch(next(self.job.model.parameters()).device)

    @property
    def known(self) -> int:
        """Ids that the tokenizer knows; rows beyond them pad a vocabulary."""
        return int(max(self.job.tokenizer.get_vocab().values())) + 1

    def vocabulary(self) -> int:
        """Logits that are compared: all where both have as many, else those of the tokenizer's tokens."""
        return self.columns(vocabulary_rows(self.teacher))

    def columns(self, rows: int) -> int:
        """The same beside a teacher of `rows` logits. Raises StepError when one of the two has too few."""
        if rows == vocabulary_rows(self.job.model):
            return rows
        check_columns(self.job.model, rows, self.known)
        self.events.append(f"{rows:,} logits of the teacher and {vocabulary_rows(self.job.model):,} of the student: "
                           f"the {self.known:,} of the tokenizer's tokens are compared, the others pad")
        return self.known


# ---------------------------------------------------------------------------------------------------------- students


def _student(job: Job, chosen: Student, lesson: _Lesson) -> nn.Module:
    """The student that the step brings itself, where the parent's model was. Raises ModelError when it cannot be."""
    device = next(job.model.parameters()).device
    if chosen.config is not None:
        model = fresh_student(lesson.teacher, chosen.config, seed=job.seed)
        lesson.events.append(f"a fresh student of {count_parameters(model):,} parameters, drawn from seed {job.seed}")
    else:
        assert chosen.model is not None
        model, tokenizer = job.open(chosen.model, chosen.revision)
        known = agreed_vocabulary(job.tokenizer, tokenizer, chosen.model)
        lesson.events.append(f"{chosen.model} is the student: {known:,} tokens mean the same to it; it ships with the "
                             "teacher's tokenizer and template")
    return model.to(device)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- the teacher's word


@contextmanager
def _loss(lesson: _Lesson, rows: TrainingRows) -> Iterator[tuple[Loss, TrainingRows]]:
    """The loss, and the rows that it wants."""
    job, options = lesson.job, lesson.options
    if options.offline is not None:
        signals = _signals(lesson, rows)
        held = rows.held_out
        yield offline_loss(options, lesson.columns(signals.logits)), replace(
            rows, train=signals.beside(rows.train),
            held_out=signals.beside(held, len(rows.train)) if held is not None else None)
        return
    lesson.runs_beside, vocabulary = True, lesson.vocabulary()
    lesson.compare(count_parameters(lesson.teacher))
    if options.on_policy is not None:
        text = [name for name in options.mixed if options.answers == "data" and job.rows(name).kind == "text"]
        if text:
            raise StepError(f'on_policy: data "{text[0]}" is plain text, which asks nothing; expected prompts with '
                            "answers, so that the student can answer, too; name other data, or leave on_policy out")
        lesson.drawn = drawer(job.model, job.tokenizer, options.on_policy, vocabulary,
                              attention_implementation(job.model))
    attention = use_packed_attention(lesson.teacher) if rows.train.packed else nullcontext()
    with attention, live_loss(lesson.teacher, job.model, options, vocabulary, lesson.watch, job.seed,
                              lesson.drawn) as loss:
        yield loss, rows


def _signals(lesson: _Lesson, rows: TrainingRows) -> Signals:
    """From the cache that the recipe names, or from the store's, where they are made if they are not there."""
    job, options = lesson.job, lesson.options
    assert options.offline is not None
    shared, sets = _place(job), [rows.train, *([rows.held_out] if rows.held_out is not None else [])]
    found = open_signals(shared, sets)
    if found is None and options.offline.cache is not None:
        raise StepError(f"{shared.folder}: holds no finished signals (manifest.json is not there); expected a folder "
                        "as runs/signals/KEY of a run that made them: leave `cache` out, and they are made here")
    if found is None:
        with shared.making():
            found = open_signals(shared, sets)  # by another process, while this one waited
            if found is None:
                packed = use_packed_attention(lesson.teacher) if rows.train.packed else nullcontext()
                vocabulary = min(lesson.known, vocabulary_rows(lesson.teacher))  # whichever student comes first
                with packed:
                    lesson.reads += write_signals(
                        shared, lesson.teacher, sets, k=min(options.offline.k, vocabulary), vocabulary=vocabulary,
                        temperature=options.temperature, progress=job.progress)
                found = open_signals(shared, sets)
        assert found is not None
    shared.used()
    manifest = shared.manifest() or {}
    lesson.compare(manifest["teacher_parameters"])
    lesson.events.append(f"signals of {options.teacher}: {manifest['tokens']:,} trained tokens, top {found.k} and the "
                         f"rest, {manifest['bytes_per_token']} bytes a token, {shared.size():,} bytes in "
                         f"{shared.folder.name[:12]}" + ("" if lesson.reads else "; the teacher did not run"))
    return found


def _place(job: Job) -> Shared:
    if job.signals is None:
        raise StepError("offline signals are kept in the folder of a run, and this step is taken in memory; expected "
                        "no `offline` here, so that the teacher runs beside the student")
    return job.signals


def _answered(lesson: _Lesson) -> Answered:
    """The data with the teacher's answers. Where they are kept for others, their cost is, too, and not the watch's."""
    def write(prompts: Sequence[Any]) -> list[str | None]:
        apart = lesson.job.answers is not None or lesson.options.offline is not None
        with nullcontext() if apart else lesson.watch:
            return ended_answers(lesson.teacher, lesson.job.tokenizer, prompts,
                                 max_new_tokens=lesson.options.max_new_tokens, progress=bar(lesson.job))

    def count(tokens: int) -> None:
        lesson.reads += tokens

    return Answered(lesson.job, lesson.options, write, count, lesson.events)


# -------------------------------------------------------------------------------------------------------------- costs


def _charge(work: Work, lesson: _Lesson) -> None:
    """What the teacher did goes into the student's work: events, FLOPs, its share of the time, what is shared."""
    if lesson.drawn is not None:
        lesson.events.append(lesson.drawn.event())
    work.events += lesson.events
    beside = work.tokens if lesson.runs_beside else 0
    if work.flops.value is not None and (beside or lesson.reads):
        forward = 2.0 * count_parameters(lesson.teacher) * (beside + lesson.reads)
        work.flops = Quantity(work.flops.value + forward, "FLOP", "estimated",
                              f"{work.flops.method}, and 2 x the teacher's parameters x tokens"
                              + (" read and written" if lesson.reads else ""))
    how = "offline" if lesson.options.offline is not None else "on_policy" if lesson.drawn is not None else "live"
    work.teaching = {"variant": lesson.options.teacher, "how": how,
                     "beside_s": 0.0 if how == "offline" else lesson.watch.seconds()}
    if lesson.options.offline is not None:
        work.shared.append(("signals", _place(lesson.job)))

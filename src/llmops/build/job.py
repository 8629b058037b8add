"""What a step is given and what it gives back: `(job, options) -> Work` is the shape of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmops.build.shared import Shared
from llmops.data.options import DataSource
from llmops.data.render import calibration_tokens
from llmops.data.sources import Rows
from llmops.measure.meter import Meter
from llmops.methods.prune.options import MASKING as METHODS
from llmops.methods.quantize.floats import AnyWeight
from llmops.models import parity
from llmops.models.load import load
from llmops.quantity import Quantity
from llmops.train import Checkpoints, Progress

__all__ = ["MASKING", "Job", "Work", "bar", "calibrated", "calibration"]

MASKING = tuple(f"prune:{method}" for method in METHODS)  # steps whose zeros every later training has to keep


@dataclass
class Job:
    """What every step needs beside its options: its parent in memory, data by name, seed, and a place to report to.

    base_source, revision: where an adapter's base can be loaded from, and which one; parent_key: of the parent's build,
    None for base. device: where to train, None for where the model is. parent: opens the parent once more, on the CPU
    in the type it is stored in, for steps that change the one in memory and need both. unrounded: of a quantized
    parent, opens the variant that was quantized likewise; gives None where it is not there. memory: a file for what a
    step measures of its parent and builds with another budget can use again; open: (model, tokenizer) of a source by
    its name and revision; signals: where a teacher's signals are kept, None outside of a run, answers: likewise its
    answers to the prompts of data, by name; notes: what a step had to
    do with less than was asked, told in the row.
    """

    model: Any
    tokenizer: Any
    storage: torch.dtype
    chain: list[str]
    rows: Callable[[str], Rows]
    limits: Callable[[str], DataSource]
    seed: int
    teacher: Callable[[str], Any] | None = None
    base_source: str = ""
    revision: str | None = None
    parent_key: str | None = None
    device: torch.device | None = None
    parent: Callable[[], Any] | None = None
    unrounded: Callable[[], Any] | None = None
    progress: Progress | None = None
    checkpoints: Checkpoints | None = None
    spent: Callable[[], float | None] = lambda: None
    memory: Path | None = None
    log: Callable[[int, Mapping[str, float]], None] | None = None
    open: Callable[[str, str | None], tuple[Any, Any]] = lambda source, revision: load(source, revision=revision,
                                                                                        dtype="stored")
    signals: Shared | None = None
    answers: Callable[[str], Shared] | None = None
    meter: Meter | None = None
    zeros: Mapping[str, Tensor] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def pruned_as_quantized(self) -> bool:
        """Whether zeros were made among the codes of a quantized model, so that what was quantized lacks them."""
        at = {step.partition(":")[0] if step not in MASKING else "mask": i for i, step in enumerate(self.chain)}
        return at.get("mask", -1) > at.get("quantize", len(self.chain))

    @property
    def keeps_zeros(self) -> bool:
        return bool(self.zeros) or any(step in MASKING for step in self.chain)


@dataclass
class Work:
    """What a step made: the model in memory, how to save it, what it promises, and what is known of its cost.

    merge: how far each way of keeping a trained adapter is from what was trained, a line of the row's table each;
    allocation: what each choice of bits was found to cost each group of layers, and what was chosen; search: the same
    of sparsities by block, and of shapes. teaching: who taught, how, and the seconds that the teacher ran within this
    step; shared: (what it is, the folder) of everything it used that other builds use, too.
    """

    model: Any
    save: Callable[[Path], None]
    expected: parity.Expected = field(default_factory=parity.Expected)
    tokens: int = 0
    flops: Quantity = field(default_factory=lambda: Quantity.null("FLOP", "nothing was trained"))
    loss: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)
    data: dict[str, int | float] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    packed: dict[str, AnyWeight] = field(default_factory=dict)
    merge: list[dict[str, Any]] = field(default_factory=list)
    allocation: dict[str, Any] = field(default_factory=dict)
    teaching: dict[str, Any] = field(default_factory=dict)
    shared: list[tuple[str, Shared]] = field(default_factory=list)
    search: dict[str, Any] = field(default_factory=dict)


def calibration(job: Job, data: str, length: int) -> Tensor:
    """(samples, length) token ids of the calibration data. Less data than that is noted for the row."""
    source, rows = job.limits(data), job.rows(data)
    length = min(length, job.model.config.max_position_embeddings)
    return calibration_tokens(rows, job.tokenizer, samples=source.samples or 128, length=length, seed=job.seed,
                              note=job.notes.append)


def calibrated(tokens: Tensor) -> str:
    """The event that says on what."""
    return f"calibrated on {tokens.shape[0]} crops of {tokens.shape[1]} tokens"


def bar(job: Job) -> Callable[[int, int], None] | None:
    """The job's progress without a text."""
    progress = job.progress
    return (lambda done, total: progress(done, total, "")) if progress is not None else None

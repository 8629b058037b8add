"""What is trained on: rows, their order, and how an optimizer step is cut into forward passes.

The whole order is known before the first step: it follows from the number and lengths of the rows, the schedule and
the seed, and from nothing else. So "where a run was" is one number, the step, and every rank knows every other's share.

A step is a list of forward passes, each a list of row indices. Cutting a step into more passes (accumulation, several
ranks, or memory that ran out) changes no gradient: the sum of the loss over the step's rows is divided by the step's
own weight, whatever the cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmops.data.render import IGNORED, collate
from llmops.models.packed_rows import pack
from llmops.train.schedule import Schedule

__all__ = ["IGNORED", "Step", "TrainingSet", "order", "share", "shrunk", "token_rows"]

Step = list[list[int]]  # the forward passes of one optimizer step, each a list of row indices
_POOL = 50  # batches that are sorted by length together, where rows are padded


@dataclass(frozen=True)
class TrainingSet:
    """Rows as the loop needs them, whatever they are (conversations, or pairs of a better and a worse answer).

    lengths: tokens of each row. weights: what each adds to the divisor of the loss (its trained tokens; 1 for a pair).
    batch: the tensors of one forward pass over the rows of these indices. packed: whether a pass is one sequence
    without padding, so that rows of unlike length may share it at no cost.
    """

    lengths: Sequence[int]
    weights: Sequence[int]
    batch: Callable[[Sequence[int]], dict[str, Tensor]]
    packed: bool = True

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, count: int) -> TrainingSet:
        """The first `count` rows."""
        return TrainingSet(self.lengths[:count], self.weights[:count], self.batch, self.packed)


def token_rows(examples: Sequence[Mapping[str, list[int]]], *, pad_id: int, packed: bool = True) -> TrainingSet:
    """Rows of next-token prediction. examples: {"input_ids", "labels"} of equal length, labels -100 where no loss is.

    packed: rows follow each other in one sequence, positions restart, attention stays inside a row; otherwise they
    are padded on the right to the longest. The first position of a row is never a target: nothing predicts it.
    """

    def batch(indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = [{key: examples[index][key] for key in ("input_ids", "labels")} for index in indices]
        if packed:
            return pack(chosen)
        padded = collate(chosen, pad_id)
        padded["labels"][:, 0] = IGNORED
        return padded

    return TrainingSet([len(example["input_ids"]) for example in examples],
                       [sum(label != IGNORED for label in example["labels"][1:]) for example in examples], batch,
                       packed)


def order(rows: TrainingSet, schedule: Schedule, seed: int) -> list[Step]:
    """Every optimizer step of the whole training. Each epoch is a new shuffle of all rows.

    A pass holds `batch_size` rows, or with `batch_tokens` as many as that many tokens allow. Where rows are padded,
    rows of like length share a pass, so that little of it is padding.
    """
    draw = random.Random(seed)
    steps: list[Step] = []
    epochs = schedule.epochs if schedule.max_steps is None else float("inf")
    done = 0.0
    while done < epochs and (schedule.max_steps is None or len(steps) < schedule.max_steps):
        indices = list(range(len(rows)))
        draw.shuffle(indices)
        if not rows.packed:
            indices = _alike(indices, rows.lengths, schedule, draw)
        passes = list(_passes(indices, rows.lengths, schedule))
        epoch = [passes[at:at + schedule.accumulate] for at in range(0, len(passes), schedule.accumulate)]
        steps += epoch[:max(1, round(len(epoch) * min(1.0, epochs - done)))]
        done += 1
    return steps[:schedule.max_steps]


def _alike(indices: list[int], lengths: Sequence[int], schedule: Schedule, draw: random.Random) -> list[int]:
    """Shuffled, yet rows of like length stand together: pools of some batches are sorted, and their batches mixed."""
    size = schedule.batch_size * schedule.accumulate
    batches = []
    for at in range(0, len(indices), size * _POOL):
        pool = sorted(indices[at:at + size * _POOL], key=lambda index: lengths[index], reverse=True)
        batches += [pool[start:start + size] for start in range(0, len(pool), size)]
    whole, rest = [batch for batch in batches if len(batch) == size], [b for b in batches if len(b) < size]
    draw.shuffle(whole)
    return [index for batch in (*whole, *rest) for index in batch]


def _passes(indices: Sequence[int], lengths: Sequence[int], schedule: Schedule) -> Iterator[list[int]]:
    held: list[int] = []
    tokens = 0
    for index in indices:
        full = (len(held) >= schedule.batch_size if schedule.batch_tokens is None
                else bool(held) and tokens + lengths[index] > schedule.batch_tokens)
        if full:
            yield held
            held, tokens = [], 0
        held.append(index)
        tokens += lengths[index]
    if held:
        yield held


def shrunk(step: Step, halvings: int) -> Step:
    """The same rows in passes cut in half `halvings` times, single rows left whole."""
    for _ in range(halvings):
        step = [part for one in step for part in (one[:(len(one) + 1) // 2], one[(len(one) + 1) // 2:]) if part]
    return step


def share(step: Step, rank: int, size: int) -> Step:
    """The part of a step that belongs to one of `size` processes: its rows are dealt out one after the other.

    It goes on from pass to pass, so that passes of fewer rows than processes leave nobody idle.
    """
    parts, before = [], 0
    for one in step:
        parts.append(one[(rank - before) % size::size])
        before += len(one)
    return [part for part in parts if part]


def tokens_of(batch: Mapping[str, Tensor]) -> int:
    """Tokens in a batch, padding apart."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel()


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch where the model is; plain numbers stay as they are."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()}

"""A teacher's signals on disk: one pass over the rows, then every student reads them.

The rows of a training come first, those it holds out after them, each with a line for every trained token
(`methods/distill/signals.py`). Shards are arrays of bytes that are mapped into memory, so a student touches the lines
of its batch and no others. Rows are the same rows only when their tokens and labels are: a digest of all of them is
kept and checked, beside the parts of the key (teacher, data, template, temperature, k).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmops.build.shared import Shared
from llmops.errors import StepError, StoreError
from llmops.methods.distill.logits import log_softmax_at
from llmops.methods.distill.signals import bytes_per_token, decode, encode
from llmops.methods.distill.top_k import top_outcomes
from llmops.models.parity import count_parameters
from llmops.models.student import vocabulary_rows
from llmops.models.token_loss import CHUNK_BYTES, head_of, last_hidden
from llmops.recipe.shared_keys import SIGNAL_PARTS, foreign
from llmops.train.passes import autocast
from llmops.train.rows import IGNORED, TrainingSet, to_device

__all__ = ["Signals", "digest", "open_signals", "write_signals"]

SHARD_TOKENS = 32_768  # trained tokens of a shard: what a kill can lose
PASS_TOKENS = 4_096  # tokens that the teacher reads at once


@dataclass(frozen=True)
class Signals:
    """Finished signals over the first `vocabulary` of the teacher's `logits`: those beyond pad, and count as none.

    starts: (rows + 1,) the line where each row begins; edges: (shards + 1,) the same of shards.
    """

    folder: Path
    k: int
    vocabulary: int
    logits: int
    temperature: float
    starts: np.ndarray[Any, np.dtype[np.int64]]
    edges: tuple[int, ...]

    @cached_property
    def shards(self) -> list[np.memmap[Any, np.dtype[np.uint8]]]:
        width = bytes_per_token(self.k, self.vocabulary)
        return [np.memmap(self.folder / _name(number), np.uint8, "r", shape=(last - first, width))
                for number, (first, last) in enumerate(zip(self.edges, self.edges[1:], strict=False)) if last > first]

    def of(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ids (N, k), log-probabilities (N, k + 1)) of the trained tokens of these rows, one row after the other."""
        lines = [self._lines(int(self.starts[row]), int(self.starts[row + 1])) for row in rows]
        return decode(np.concatenate(lines), self.k, self.vocabulary)

    def _lines(self, first: int, last: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        number = int(np.searchsorted(self.edges, first, side="right")) - 1
        shard = self.shards[min(number, len(self.shards) - 1)]
        at = first - self.edges[min(number, len(self.shards) - 1)]
        return np.asarray(shard[at:at + last - first])

    def beside(self, rows: TrainingSet, first: int = 0) -> TrainingSet:
        """The rows with their signals in every batch, as `signal_ids` and `signal_log_p`. first: number of the first
        of them among all."""

        def batch(indices: Sequence[int]) -> dict[str, Tensor]:
            ids, log_p = self.of([first + index for index in indices])
            return {**rows.batch(indices), "signal_ids": ids, "signal_log_p": log_p}

        return TrainingSet(rows.lengths, rows.weights, batch, rows.packed)


def digest(sets: Sequence[TrainingSet], at_once: int = 256) -> str:
    """SHA-256 over tokens and labels of all rows, however they are laid out in batches."""
    found = hashlib.sha256()
    for rows in sets:
        found.update(np.asarray(rows.lengths, "<i8").tobytes())
        for start in range(0, len(rows), at_once):
            batch = rows.batch(range(start, min(start + at_once, len(rows))))
            mask = batch.get("attention_mask")
            for name in ("input_ids", "labels"):
                values = batch[name] if mask is None else batch[name][mask.bool()]
                found.update(values.flatten().numpy().astype("<i4").tobytes())
    return found.hexdigest()


def open_signals(shared: Shared, sets: Sequence[TrainingSet]) -> Signals | None:
    """The finished signals for these rows, or None where they are still to be made.

    Raises StepError for signals of another teacher, template, data or k, or of other rows; StoreError when a shard is
    missing or damaged.
    """
    manifest = shared.manifest()
    if manifest is None:
        return None
    wrong = foreign(manifest["parts"], shared.parts, SIGNAL_PARTS)
    if wrong:
        raise StepError(f"{shared.folder}: signals made with another {wrong}; expected those of this teacher, template "
                        "and data: leave `cache` out, and they are made anew")
    if manifest["tokens_sha256"] != digest(sets):
        raise StepError(f"{shared.folder}: signals of other rows ({manifest['rows']:,} rows, {manifest['tokens']:,} "
                        f"trained tokens; here {sum(map(len, sets)):,} and {_total(sets):,}), although they are called "
                        "the same; expected the very tokens that are trained on: remove that folder, and pin the data "
                        "to a revision where it comes from the hub")
    edges = tuple(manifest["edges"])
    width = bytes_per_token(manifest["k"], manifest["vocabulary"])
    for number, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        path = shared.folder / _name(number)
        if not path.exists() or path.stat().st_size != (last - first) * width:
            raise StoreError(f"{path}: not there, or not {(last - first) * width:,} bytes; remove {shared.folder} and "
                             "run the same command again: the teacher writes them anew")
    return Signals(shared.folder, manifest["k"], manifest["vocabulary"], manifest["logits"], manifest["temperature"],
                   _starts(sets), edges)


def write_signals(shared: Shared, teacher: nn.Module, sets: Sequence[TrainingSet], *, k: int, vocabulary: int,
                  temperature: float, progress: Callable[[int, int, str], None] | None = None) -> int:
    """One pass of the teacher over all rows, shard by shard; returns the tokens it read now. Inside `shared.making`.

    teacher: on its device, with packed attention where the rows are packed. Shards that are there are left alone.
    """
    starts, plan = _starts(sets), list(_shards(sets))
    edges, read, done = [0], 0, 0
    where = np.cumsum([0, *(len(rows) for rows in sets)])
    for number, spans in enumerate(plan):
        tokens = sum(sets[which].lengths[row] for which, rows in spans for row in rows)

        def make(spans: list[tuple[int, list[int]]] = spans) -> bytes:
            lines = [line for which, rows in spans
                     for line in _lines(teacher, sets[which], rows, k, vocabulary, temperature)]
            return np.concatenate(lines).tobytes()

        read += tokens * shared.shard(_name(number), make)
        done += tokens
        last_set, last_rows = spans[-1]
        edges.append(int(starts[where[last_set] + last_rows[-1] + 1]))
        if progress is not None:
            progress(done, sum(sum(rows.lengths) for rows in sets), "signals of the teacher")
    shared.finish({"k": k, "vocabulary": vocabulary, "logits": vocabulary_rows(teacher), "temperature": temperature,
                   "rows": sum(map(len, sets)), "tokens": _total(sets), "edges": edges, "tokens_sha256": digest(sets),
                   "teacher_parameters": count_parameters(teacher), "dtype": "float16 log-probabilities, packed ids",
                   "bytes_per_token": bytes_per_token(k, vocabulary)})
    return read


def _name(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _total(sets: Sequence[TrainingSet]) -> int:
    return sum(sum(rows.weights) for rows in sets)


def _starts(sets: Sequence[TrainingSet]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.cumsum([0, *(weight for rows in sets for weight in rows.weights)], dtype=np.int64)


def _shards(sets: Sequence[TrainingSet]) -> Iterator[list[tuple[int, list[int]]]]:
    """The rows of each shard, by set: whole rows, in their order, as many as fill it."""
    held: list[tuple[int, list[int]]] = []
    tokens = 0
    for which, rows in enumerate(sets):
        for row, weight in enumerate(rows.weights):
            if held and tokens + weight > SHARD_TOKENS:
                yield held
                held, tokens = [], 0
            if not held or held[-1][0] != which:
                held.append((which, []))
            held[-1][1].append(row)
            tokens += weight
    if held:
        yield held


@torch.no_grad()  # type: ignore[untyped-decorator]
def _lines(teacher: nn.Module, rows: TrainingSet, chosen: Sequence[int], k: int, vocabulary: int,
           temperature: float) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    device, head = next(teacher.parameters()).device, head_of(teacher)
    chunk = max(1, CHUNK_BYTES // (4 * vocabulary))
    for indices in _passes(rows, chosen):
        batch: Mapping[str, Tensor] = to_device(rows.batch(indices), device)
        kept = batch["labels"][:, 1:] != IGNORED
        with autocast(device):
            states = last_hidden(teacher, batch)[:, :-1][kept]
            for part in states.split(chunk):
                ids, log_p = top_outcomes(log_softmax_at(head(part)[:, :vocabulary], temperature), k)
                yield encode(ids, log_p, vocabulary)


def _passes(rows: TrainingSet, chosen: Sequence[int]) -> Iterator[list[int]]:
    held: list[int] = []
    for row in chosen:
        longest = max(rows.lengths[each] for each in (*held, row))
        tokens = sum(rows.lengths[each] for each in held) + rows.lengths[row]
        if held and (tokens if rows.packed else longest * (len(held) + 1)) > PASS_TOKENS:
            yield held
            held = []
        held.append(row)
    if held:
        yield held

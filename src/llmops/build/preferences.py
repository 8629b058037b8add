"""The step that learns from pairs of answers, `finetune: {method: dpo}`; its loss is in `methods/finetune/dpo.py`.

It runs through the loop that every training runs through, so a pair is a row like any other: both its sides lie in one
padding-free sequence, a killed run goes on bit for bit, energy is counted, zeros of a pruned parent stay zero.

    the reference is the parent   its log-probabilities of both answers are computed ONCE, before the first step, and
                                  used in every epoch. Cost: one forward pass over the pairs that the training will
                                  come to, instead of one in every epoch beside the training's own, and no second
                                  model in memory; dropout and noise never touch the reference
    they are kept                 beside the checkpoints, so that an attempt that goes on has the same, also on a GPU,
                                  whose sums differ from run to run
    it is looked at before and after   the reward margin, and how often the chosen answer is the likelier one, on a
                                  draw of the training pairs and on the held-out ones: one more forward pass over those

The loss of a step is the sum over its pairs divided by their number, whatever the lengths. Left out: a reference other
than the parent; pairs from sampling (the data are what they are).

Shapes: P pairs, R = 2 P rows, the chosen sides first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmops.build.job import Job, Work
from llmops.build.training import (
    SEED_OF_SPLIT,
    Rows,
    Trained,
    packing,
    run_fit,
    schedule_of,
    train_all,
    trainable,
    work_of,
)
from llmops.data.pairs import EncodedPairs, encode_pairs
from llmops.data.render import IGNORED, collate
from llmops.errors import StepError, StoreError
from llmops.methods.finetune.dpo import dpo_loss, reward_margin
from llmops.methods.finetune.lora import add_lora, merge_lora
from llmops.methods.finetune.options import Dpo
from llmops.models import parity
from llmops.models.packed_rows import evaluating, pack, row_of, use_packed_attention
from llmops.models.save import save_adapter, save_dense
from llmops.models.token_loss import pair_log_probs
from llmops.quantity import Quantity
from llmops.train import Loss, Progress, TrainingSet
from llmops.train.ranks import add_up, agree, rank_and_size
from llmops.train.rows import order, to_device

__all__ = ["Pairs", "adapters_of", "answer_log_probs", "dpo_step", "learn", "pair_loss", "pair_rows",
           "reference_log_probs", "saved_apart"]

PASS_TOKENS = 4096  # of a forward pass without a gradient, unless one pair has more
MEASURED = 512  # training pairs that are looked at again after the training

Example = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Pairs:
    """Training pairs and held-out ones. chosen, rejected: the two sides of pair i at index i; train, held_out: indices.

    pad_id, packed: how a batch of them is made. place: names the i-th training pair, for people.
    """

    chosen: Sequence[Example]
    rejected: Sequence[Example]
    train: list[int]
    held_out: list[int]
    pad_id: int
    packed: bool = True
    report: dict[str, int] = field(default_factory=dict)
    place: Callable[[int], str] = lambda index: f"pair {index + 1}"
    events: tuple[str, ...] = ()

    def tokens(self, index: int) -> int:
        """Tokens of both sides."""
        return len(self.chosen[index]["input_ids"]) + len(self.rejected[index]["input_ids"])

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """The tensors of one forward pass over these pairs; `rows`: the row (R) of every position."""
        sides = [self.chosen[index] for index in indices] + [self.rejected[index] for index in indices]
        if self.packed:
            packed = pack(sides)
            return {**packed, "rows": row_of(packed)}
        padded = collate([{key: list(side[key]) for key in ("input_ids", "labels")} for side in sides], self.pad_id)
        return {**padded, "rows": torch.arange(len(sides))[:, None].expand_as(padded["labels"]).contiguous()}

    def answer_tokens(self, indices: Sequence[int]) -> Tensor:
        """(2, P): trained tokens of the chosen and the rejected sides."""
        return torch.tensor([[sum(label != IGNORED for label in sides[index]["labels"][1:]) for index in indices]
                             for sides in (self.chosen, self.rejected)])


def dpo_step(job: Job, options: Dpo) -> Work:
    """Train towards the better answers, through adapters or (rank: null) in every weight."""
    return learn(job, options, partial(trainable, job.model, frozen=options.rank is not None),
                 train_all if options.rank is None else _train_adapters)


def learn(job: Job, options: Dpo, prepared: Callable[[], Any], train: Callable[..., Work]) -> Work:
    """The step whatever its parent is stored in. prepared: gives the job's model ready to be trained, which is the
    reference as it is then; train: (job, options, loss, rows) -> the work, trained on the job's model."""
    pairs = _pairs(job, options)
    model = prepared()
    began = time.perf_counter()
    needed = _needed(pairs, options, job.seed)
    reference = reference_log_probs(model, pairs, [*needed, *pairs.held_out], _kept(job), job.progress)
    tokens = sum(pairs.tokens(index) for index in (*needed, *pairs.held_out))
    events = [f"reference log-probabilities of {len(needed) + len(pairs.held_out):,} pairs ({tokens:,} tokens) in "
              f"{time.perf_counter() - began:.1f} s, used in every epoch"]
    rows = Rows(pair_rows(pairs, pairs.train, reference),
                pair_rows(pairs, pairs.held_out, reference) if pairs.held_out else None, pairs.report, pairs.place,
                pairs.events)
    curve = _Curve(skip=options.learning_rate == "auto")
    told = replace(job, log=curve.beside(job.log)) if job.log is not None else job
    loss = partial(pair_loss, options=options, seen=curve.see if job.log is not None else None)
    work = train(told, options, loss, rows)
    tokens += _look_again(job, options, work, pairs, needed, reference)
    work.events += events
    _count_forward(work, tokens)
    return work


def pair_loss(model: nn.Module, batch: Mapping[str, Tensor], *, options: Dpo,
              seen: Callable[[Tensor], None] | None = None) -> Tensor:
    """SUM over the pairs of a batch of `pair_rows`. seen: told the reward margins (P,) of passes with a gradient."""
    log_p, reference, count = pair_log_probs(model, batch, batch["rows"]), batch["reference"], batch["answer_tokens"]
    compared = (*_averaged(log_p, count, options).chunk(2), *_averaged(reference, count, options).chunk(2))
    loss = dpo_loss(*compared, beta=options.beta, kind=options.loss, label_smoothing=options.label_smoothing).sum()
    if seen is not None and loss.requires_grad:
        seen(reward_margin(*(part.detach() for part in compared), beta=options.beta))
    if options.sft_weight:
        loss = loss - options.sft_weight * (log_p.chunk(2)[0] / count.chunk(2)[0]).sum()
    return loss


def _averaged(log_p: Tensor, count: Tensor, options: Dpo) -> Tensor:
    return log_p / count if options.average_log_probs else log_p


def pair_rows(pairs: Pairs, indices: Sequence[int], reference: Tensor) -> TrainingSet:
    """Pairs as the loop trains on them: a row is a pair, of weight 1 and the tokens of both sides.

    reference: (2, all pairs), of `reference_log_probs`; a batch carries its part (R,) and the tokens of each answer.
    """
    indices = list(indices)

    def batch(chosen: Sequence[int]) -> dict[str, Tensor]:
        here = [indices[number] for number in chosen]
        return {**pairs.batch(here), "reference": reference[:, here].flatten(),
                "answer_tokens": pairs.answer_tokens(here).flatten()}

    return TrainingSet([pairs.tokens(index) for index in indices], [1] * len(indices), batch, pairs.packed)


# -------------------------------------------------------------------------------------------- log-probabilities, once


def answer_log_probs(model: nn.Module, pairs: Pairs, indices: Sequence[int], progress: Progress | None = None,
                     what: str = "log-probabilities") -> Tensor:
    """(2, P) float32 on the CPU: summed log-probability of each pair's chosen and rejected answer, in eval mode.

    Several processes share the work. Pairs of like length share a pass, of PASS_TOKENS at most.
    """
    device, (rank, size) = next(model.parameters()).device, rank_and_size()
    found, done = torch.zeros(2, len(indices), dtype=torch.float64), 0
    passes = _passes(pairs, indices)
    packed = use_packed_attention(model) if pairs.packed else nullcontext()
    autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda")  # as in the loop
    trouble = None
    try:
        with packed, evaluating(model), torch.no_grad(), autocast:
            for number, places in enumerate(passes):
                if number % size == rank:
                    batch = to_device(pairs.batch([indices[place] for place in places]), device)
                    found[:, places] = pair_log_probs(model, batch, batch["rows"]).view(2, -1).double().cpu()
                done += len(places)
                if progress is not None:
                    progress(done, len(indices), what)
    except Exception as error:
        if size == 1:
            raise
        trouble = f"{type(error).__name__}: {error}"
    agree(trouble=trouble)  # before the sum, so that none waits in it for one that failed
    found = add_up(found)
    bad = (~found.isfinite()).any(0).nonzero().flatten().tolist()
    if bad:
        raise StepError(f"the model gives no finite log-probability to {len(bad)} of {len(indices)} pairs (number "
                        f"{indices[bad[0]] + 1} is the first); expected numbers: look at the weights it starts from")
    return found.float()


def _passes(pairs: Pairs, indices: Sequence[int]) -> list[list[int]]:
    """Places in `indices` that share a forward pass, longest first."""
    passes: list[list[int]] = []
    room = 0
    for place in sorted(range(len(indices)), key=lambda place: -pairs.tokens(indices[place])):
        size = pairs.tokens(indices[place])
        if not passes or size > room:
            passes.append([])
            room = PASS_TOKENS
        passes[-1].append(place)
        room -= size
    return passes


def reference_log_probs(model: nn.Module, pairs: Pairs, indices: Sequence[int], kept: Path | None = None,
                        progress: Progress | None = None) -> Tensor:
    """(2, all pairs): log-probabilities under the weights that the training starts from, which `model` has now.

    NaN for the pairs that are not among `indices`: a loss that met one would stop the training. kept: file that holds
    them between attempts at one build; one of other pairs is not used. Raises StoreError when it cannot be written.
    """
    name = _digest(pairs, indices)
    if kept is not None and kept.exists() and (found := _read(kept, name)) is not None:
        return found
    reference = torch.full((2, len(pairs.chosen)), float("nan"))
    reference[:, list(indices)] = answer_log_probs(model, pairs, indices, progress, "reference log-probabilities")
    if kept is not None and rank_and_size()[0] == 0:
        _write(kept, reference, name)
    return reference


def _needed(pairs: Pairs, options: Dpo, seed: int) -> list[int]:
    """The training pairs that a step will come to: `max_steps` and a part of an epoch may leave some out."""
    if options.learning_rate == "auto":  # the range test walks on its own
        return pairs.train
    sizes = [pairs.tokens(index) for index in pairs.train]
    steps = order(TrainingSet(sizes, [1] * len(sizes), pairs.batch, pairs.packed), schedule_of(options, 1.0), seed)
    return sorted({pairs.train[place] for step in steps for one in step for place in one})


def _kept(job: Job) -> Path | None:
    return job.checkpoints.folder / "reference.safetensors" if job.checkpoints is not None else None


def _digest(pairs: Pairs, indices: Sequence[int]) -> str:
    sides = [[list(side["input_ids"]), list(side["labels"])] for side in (*pairs.chosen, *pairs.rejected)]
    return hashlib.sha256(json.dumps([pairs.packed, list(indices), sides]).encode()).hexdigest()


def _read(path: Path, name: str) -> Tensor | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            same = (file.metadata() or {}).get("pairs") == name
            return file.get_tensor("reference") if same else None
    except (OSError, SafetensorError):
        return None  # cut off while it was written, or of another version: it is computed again


def _write(path: Path, reference: Tensor, name: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    scratch = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"reference": reference.contiguous()}, scratch, metadata={"pairs": name})
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: the reference's log-probabilities could not be written ({error}); free some disk or "
                         "name another place with --runs, and run the same command again") from error
    finally:
        scratch.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- the pairs themselves


def _pairs(job: Job, options: Dpo) -> Pairs:
    """The pairs of a step, and those it holds out, as `stop` says."""
    encoded = _encoded(job, options, options.data)
    count, origin, source = len(encoded.chosen), encoded.origin, job.rows(options.data)
    packed, events = packing(job, options)
    pairs = Pairs(encoded.chosen, encoded.rejected, list(range(count)), [], job.tokenizer.pad_token_id, packed,
                  encoded.report, lambda index: source.place(origin[index]), events)
    if options.stop is None:
        return pairs
    if options.stop.data is not None:
        held = _encoded(job, options, options.stop.data)
        return replace(pairs, chosen=[*encoded.chosen, *held.chosen], rejected=[*encoded.rejected, *held.rejected],
                       held_out=list(range(count, count + len(held.chosen))))
    draw = torch.Generator().manual_seed(job.seed + SEED_OF_SPLIT)
    shuffled = torch.randperm(count, generator=draw).tolist()
    out = max(1, round(options.stop.holdout * count))
    if out >= count:
        raise StepError(f'data "{options.data}" has {count} pair to train on, and `stop` holds out {out}; expected at '
                        "least two; give more pairs, or name held-out data with `stop: {data: ...}`")
    train = sorted(shuffled[out:])
    return replace(pairs, train=train, held_out=shuffled[:out], report={**encoded.report, "held_out": out},
                   place=lambda index: source.place(origin[train[index]]))


def _encoded(job: Job, options: Dpo, data: str) -> EncodedPairs:
    length = min(options.max_length, job.model.config.max_position_embeddings)
    return encode_pairs(job.rows(data), job.tokenizer, max_length=length, limits=job.limits(data).limits,
                        progress=job.progress)


# ------------------------------------------------------------------------------------------- training and what it shows


def _train_adapters(job: Job, options: Dpo, loss: Loss, rows: Rows) -> Work:
    adapted = adapters_of(job, options)
    done = run_fit(job, options, adapted, rows, loss)
    if not options.merge:
        return saved_apart(job, options, adapted, done)
    done.events.append(_trained(adapted, options))
    plain = merge_lora(adapted)
    return work_of(job, plain, partial(save_dense, plain, job.tokenizer, dtype=job.storage), done, backward=1.0)


def adapters_of(job: Job, options: Dpo, **changes: Any) -> Any:
    """The job's model, frozen, with the adapters that the options ask for; `changes` to what `add_lora` is given."""
    assert options.rank is not None
    for parameter in job.model.parameters():
        parameter.requires_grad_(False)
    given: dict[str, Any] = {"rank": options.rank, "alpha": options.alpha, "dropout": options.dropout,
                             "targets": options.targets, "seed": job.seed, "keep_zeros": job.keeps_zeros}
    return add_lora(job.model, **given | changes)


def saved_apart(job: Job, options: Dpo, adapted: Any, done: Trained) -> Work:
    """The work that is stored as a PEFT folder."""
    done.events.append(_trained(adapted, options))
    save = partial(save_adapter, adapted, job.tokenizer, base=job.base_source, revision=job.revision)
    return work_of(job, adapted, save, done, backward=1.0, expected=parity.Expected(adapter_rank=options.rank))


def _trained(adapted: Any, options: Dpo) -> str:
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return f"{count:,} parameters trained (rank {options.rank})"


class _Curve:
    """Reward margin and accuracy of every step, for the curves; of several processes, the share of the first.

    skip: the first step's would hold what a range test saw before it, and is left out.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.margins: list[Tensor] = []

    def see(self, margins: Tensor) -> None:
        self.margins.append(margins)

    def beside(self, log: Callable[[int, Mapping[str, float]], None]) -> Callable[[int, Mapping[str, float]], None]:
        """`log`, told these two figures as well."""

        def told(step: int, figures: Mapping[str, float]) -> None:
            seen = torch.cat(self.margins) if self.margins and not self.skip else None
            self.margins, self.skip = [], False
            log(step, figures if seen is None else {**figures, "reward_margin": float(seen.mean()),
                                                    "reward_accuracy": float((seen > 0).float().mean())})

        return told


def _look_again(job: Job, options: Dpo, work: Work, pairs: Pairs, trained: list[int], reference: Tensor) -> int:
    """Add what the training did to the pairs to `work`; returns the tokens that were run for it."""
    draw = torch.Generator().manual_seed(job.seed)
    chosen = torch.randperm(len(trained), generator=draw)[:MEASURED].tolist()
    tokens = 0
    for title, name, indices in (("training", "", [trained[place] for place in chosen]),
                                 ("held-out", "held_out_", pairs.held_out[:MEASURED])):
        if not indices:
            continue
        after = answer_log_probs(work.model, pairs, indices, job.progress, f"{title} pairs again")
        tokens += sum(map(pairs.tokens, indices))
        count = pairs.answer_tokens(indices)
        now, before = (_averaged(value, count, options) for value in (after, reference[:, indices]))
        margin = reward_margin(*now, *before, beta=options.beta)
        likelier = [float((value[0] > value[1]).float().mean()) for value in (before, now)]
        right = float((margin > 0).float().mean())
        work.data |= {f"{name}pairs_looked_at": len(indices), f"{name}reward_margin": round(float(margin.mean()), 6),
                      f"{name}reward_accuracy": round(right, 6), f"{name}likelier_before": round(likelier[0], 6),
                      f"{name}likelier_after": round(likelier[1], 6)}
        work.events.append(f"{len(indices):,} {title} pairs: reward margin 0 -> {float(margin.mean()):.3g}, the chosen "
                           f"answer rewarded above the other in {right:.1%}; it is the likelier one in "
                           f"{likelier[0]:.1%} -> {likelier[1]:.1%}")
    return tokens


def _count_forward(work: Work, tokens: int) -> None:
    """Add forward passes over `tokens` to the cost."""
    if work.flops.value is not None:
        forward = 2.0 * sum(p.numel() for p in work.model.parameters()) * tokens
        work.flops = Quantity(work.flops.value + forward, "FLOP", "estimated",
                              f"{work.flops.method}, and 2 x parameters x the tokens of the reference and of the look "
                              "after the training")

"""What is kept of an adapter that was trained on a rounded base, and how far each choice is from what was trained.

The adapter B A was fitted to Q, the base as 4 bits hold it. Three things can be handed on:

    dequantized   Q + s B A in 16 bits: what was trained, rounded once; as large as the original
    original      W + s B A in 16 bits: the base is exact again, but the adapter never saw it (where the adapter
                  started at B0 A0 and not at zero, W + s (B A - B0 A0))
    apart         Q in 4 bits and B A beside it: what was trained, bit for bit, small; slower to run

Which is right is a matter of the model, and unnoticed it is the commonest way to lose what was trained. So all three
are made, and each is run on the same tokens as the trained model: KL(trained || artifact), mean and most over tokens,
and the held-out loss where there is one. Cost: the base is loaded once for each, with a few short forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from llmops.models import parity
from llmops.models.packed_rows import use_packed_attention
from llmops.quantity import Quantity
from llmops.train import TrainingSet
from llmops.train.loop import mean_loss

__all__ = ["Candidate", "held_out_rows", "measure_merges"]

Candidate = Callable[[], Any]  # makes the artifact, as it will be loaded
MOST_TOKENS = 512  # whose distributions are compared
MOST_HELD_OUT = 64  # rows whose loss is taken


def held_out_rows(train: TrainingSet, held_out: TrainingSet | None) -> tuple[list[Tensor], str]:
    """(rows of token ids to compare on, each (length,); what they are): held-out ones, else the first trained on."""
    rows = train if held_out is None else held_out
    found: list[Tensor] = []
    for index in range(len(rows)):
        left = MOST_TOKENS - sum(len(row) for row in found)
        if left <= 1:
            break
        found.append(rows.batch([index])["input_ids"][0, :left])
    return found, "training" if held_out is None else "held-out"


def measure_merges(trained: Any, candidates: Mapping[str, Candidate], chosen: str, compared: tuple[list[Tensor], str],
                   held_out: TrainingSet | None) -> tuple[Any, list[dict[str, Any]], list[str]]:
    """(the chosen artifact, a line of the table for each, the same as events).

    trained: the model with its adapters, as it was trained. Every other artifact is let go before the next is made.
    """
    rows, what = compared
    trained.eval()
    log_p = parity.log_probabilities(trained, rows)
    how = f"KL(trained || artifact) on {len(log_p)} {what} tokens"
    loss_then = _loss(trained, held_out)
    kept: Any = None
    table, events = [], []
    for target in sorted(candidates, key=lambda name: name == chosen):  # the chosen one last: it stays in memory
        model = candidates[target]()
        mean, most = parity.divergence(log_p, parity.log_probabilities(model, rows))
        loss = _loss(model, held_out)
        entry = {"target": target, "chosen": target == chosen,
                 "kl_mean": Quantity.measured(mean, "nats", how, n=len(log_p)).as_dict(),
                 "kl_max": Quantity.measured(most, "nats", how, n=len(log_p)).as_dict()}
        text = (f"{'' if target == chosen else 'not '}kept: {target}, KL from what was trained {mean:.2e} nats a "
                f"token, at most {most:.2e}")
        if loss is not None and loss_then is not None:
            entry["held_out_loss"] = Quantity.measured(loss, "nats", "mean over held-out tokens").as_dict()
            text += f"; held-out loss {loss:.4f}, trained {loss_then:.4f}"
        table.append(entry)
        events.append(text)
        if target == chosen:
            kept = model
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return kept, table, events


def _loss(model: Any, held_out: TrainingSet | None) -> float | None:
    if held_out is None:
        return None
    with use_packed_attention(model) if held_out.packed else nullcontext():
        return mean_loss(model, held_out.first(min(MOST_HELD_OUT, len(held_out))))

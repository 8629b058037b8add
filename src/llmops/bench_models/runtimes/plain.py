"""transformers alone, nothing of ours: the folder as a stranger loads it, in the type that it says."""

from __future__ import annotations

import torch

from llmops.bench_models.runtimes import Opened, Wanted
from llmops.bench_models.runtimes.own import in_torch
from llmops.models.plain import plain_model

__all__ = ["open"]


def open(wanted: Wanted) -> Opened:  # noqa: A001
    torch.set_num_threads(wanted.threads)
    model, tokenizer = plain_model(wanted.model, wanted.device)
    return in_torch(model, tokenizer, wanted)

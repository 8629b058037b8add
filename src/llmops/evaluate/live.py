"""What the evaluators ask a live model and its tokenizer; nothing here changes either.

Models are used only as `model(input_ids=...)`: their linear layers may be packed integers, so nobody looks inside.
Logits are the memory hazard: 8 windows x 2,048 tokens x 150,000 words are 5 GB in 16 bits. Batches are cut so that one
forward's logits stay under `MAX_LOGITS`, and the loss converts them to fp32 in slices of `SLICE`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmops.errors import LlmopsError

__all__ = ["accepts", "batch_rows", "context_limit", "device_of", "dtype_name", "item_id", "scoring", "shared_columns",
           "stop_ids", "token_losses", "tokenizer_sha256", "vocabulary_size"]

MAX_LOGITS = 2**27  # elements of one forward's logits (0.25 GB in 16 bits)
SLICE = 2**24  # elements converted to fp32 at a time


@contextmanager
def scoring(*models: Any) -> Iterator[None]:
    """Inference mode, with dropout off; each model's train/eval state is put back afterwards."""
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model in training:
            model.train()


def device_of(model: Any) -> Any:
    """The device that input ids go to."""
    return next(iter(model.parameters())).device


def dtype_name(model: Any) -> str:
    """The dtype activations have, as `bfloat16`."""
    return str(model.dtype).removeprefix("torch.")


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters


def context_limit(model: Any) -> int | None:
    """Positions the model was made for; None when its config does not say."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    return int(limit) if limit else None


def vocabulary_size(model: Any) -> int:
    """Columns of the logits."""
    return int(_text_config(model).vocab_size)


def shared_columns(model: Any, reference: Any, tokenizer: Any = None) -> int:
    """Logits over which two models are compared: all where they have as many, else those of the tokens that their one
    tokenizer knows, for the rows beyond pad a vocabulary.

    Raises LlmopsError when they have not as many and there is no tokenizer, or one of the two lacks a token of it.
    """
    mine, theirs = vocabulary_size(model), vocabulary_size(reference)
    if mine == theirs:
        return mine
    known = int(max(tokenizer.get_vocab().values())) + 1 if tokenizer is not None else None
    if known is None or min(mine, theirs) < known:
        knows = f", and the tokenizer knows {known}" if known is not None else ""
        raise LlmopsError(f"the models have vocabularies of {mine} and {theirs} tokens{knows}, so their distributions "
                          "are over different things; expected two variants of one model, with one tokenizer")
    return known


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def batch_rows(batch_size: int, positions: int, vocabulary: int) -> int:
    """Rows of a batch: at most `batch_size`, at least 1, with rows x positions x vocabulary <= MAX_LOGITS."""
    return max(1, min(batch_size, MAX_LOGITS // max(1, positions * vocabulary)))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats, fp32, a slice of tokens at a time.

    logits: (tokens, vocabulary), any float dtype; targets: (tokens,). Returns (tokens,).
    """
    rows = max(1, SLICE // logits.shape[-1])
    losses = []
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        full = part.float()
        losses.append(full.logsumexp(-1) - full.gather(-1, target[:, None]).squeeze(-1))
    return torch.cat(losses)


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end an answer: those of the model's generation config, and the tokenizer's own."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [*(listed if isinstance(listed, list | tuple) else [listed]), tokenizer.eos_token_id]
    return {int(i) for i in ids if i is not None}


def item_id(*sequences: Iterable[int] | Sequence[int]) -> str:
    """16 hex digits over token ids; the sequences' lengths count, so ([1], [2]) and ([1, 2],) differ."""
    digest = hashlib.sha256()
    for sequence in sequences:
        ids = np.asarray(list(sequence), dtype="<i8")
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.tobytes())
    return digest.hexdigest()[:16]


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of the vocabulary and, where the tokenizer has one, of its fast backend (merges, normalizer, added tokens).

    The backend's padding and truncation are left out: calls change them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = json.loads(backend.to_str())
        body.pop("padding", None)
        body.pop("truncation", None)
    else:
        body = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

"""Perplexity: exp of the mean next-token loss, by a named protocol.

Figures of different protocols are not comparable, even on the same text: they differ in what a token may look back on,
and in what is counted. Two protocols are here, both over one stream (all documents joined by a blank line and
tokenized once, so a BOS token stands at most at its very start):

- `gptq` (Frantar et al. 2022; Wanda, SparseGPT and their successors use the same): windows of `context` tokens that do
  not overlap, the remainder dropped, no BOS put before a window, loss over the context - 1 tokens that have a
  predecessor in their window. All windows weigh the same.
- `sliding`: windows that end `stride` tokens apart; each token of the stream (but its first) is scored once, in the
  window where it has the most context: at least context - stride tokens. The last window is shifted back to be full.

The interval is Student's over windows' mean losses, on the log scale: exp(mean +- t stderr). Windows are treated as
independent. Those of one document are not quite, so it is somewhat narrow; between two variants the paired interval is
the one to read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmops.data.render import text_stream
from llmops.data.sources import Rows
from llmops.errors import DataError, LlmopsError
from llmops.evaluate.live import (
    batch_rows,
    context_limit,
    device_of,
    dtype_name,
    item_id,
    scoring,
    token_losses,
    tokenizer_sha256,
    vocabulary_size,
)
from llmops.evaluate.options import Perplexity
from llmops.evaluate.score import Item, Score
from llmops.evaluate.statistics import summarize

__all__ = ["evaluate", "score_stream", "windows"]

Window = tuple[int, int, int]  # start, end, first position whose token is scored


def evaluate(model: Any, tokenizer: Any, rows: Rows, options: Perplexity, *, id: str, seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> list[Score]:
    """rows: of any kind with text. The seed is not used: nothing is drawn.

    Raises DataError when the text does not fill one window, LlmopsError for a stride longer than the window.
    """
    stream = text_stream(rows, tokenizer, options.separator)
    return [score_stream(model, tokenizer, stream, options, id=id, progress=progress)]


def score_stream(model: Any, tokenizer: Any, stream: Sequence[int], options: Perplexity, *, id: str,
                 progress: Callable[[int, int], None] | None = None) -> Score:
    """The perplexity of a stream of token ids. Raises as `evaluate`."""
    limit = context_limit(model)
    context = min(options.context, limit) if limit is not None else options.context
    stride = options.stride or context
    ids = list(stream)[:options.max_tokens]
    _check(id, len(ids), context, stride, options)
    cut = windows(len(ids), context, options.stride)
    losses = _losses(model, torch.tensor(ids), cut, options.batch_size, progress)
    items = [_item(ids, window, loss) for window, loss in zip(cut, losses, strict=True)]
    bos = tokenizer.bos_token_id
    protocol = {"id": "perplexity/sliding" if options.stride else "perplexity/gptq", "aggregation": "exp_mean",
                "context": context, "stride": stride, "context_asked": options.context, "separator": options.separator,
                "bos": "at the start of the stream" if bos is not None and ids[0] == bos else "none",
                "tokens": sum(end - first for _, end, first in cut), "windows": len(cut), "dtype": dtype_name(model),
                "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    value, stderr = summarize(items, "exp_mean", "perplexity", f"{protocol['id']}, context {context}, stride {stride}")
    return Score(id, "perplexity", False, value, stderr, protocol, items)


def windows(tokens: int, context: int, stride: int | None) -> list[Window]:
    """(start, end, first scored position) of every window over `tokens` tokens; end is exclusive.

    Without a stride: the papers' windows. With one: every position from 1 on is scored exactly once. Needs tokens >=
    context.
    """
    if stride is None:
        return [(start, start + context, start + 1) for start in range(0, tokens - context + 1, context)]
    cut = [(0, context, 1)]
    while (scored := cut[-1][1]) < tokens:
        end = min(scored + stride, tokens)
        cut.append((end - context, end, scored))
    return cut


def _check(id: str, tokens: int, context: int, stride: int, options: Perplexity) -> None:
    if stride > context:
        raise LlmopsError(f"{id}: stride {stride} is longer than the window of {context} tokens, so tokens would be "
                          f"skipped; expected at most {context}; lower stride")
    if tokens < context:
        why = f" (max_tokens is {options.max_tokens})" if options.max_tokens and tokens == options.max_tokens else ""
        raise DataError(f"{id}: the text has {tokens} tokens{why}, one window needs {context}; expected at least one "
                        f"full window; lower context to {tokens} or less, or give more text")


def _losses(model: Any, ids: Tensor, cut: Sequence[Window], batch_size: int,
            progress: Callable[[int, int], None] | None) -> list[float]:
    """Mean loss in nats over the scored tokens of every window."""
    context = cut[0][1] - cut[0][0]
    rows = batch_rows(batch_size, context, vocabulary_size(model))
    device = device_of(model)
    losses: list[float] = []
    with scoring(model):
        for place in range(0, len(cut), rows):
            batch = cut[place:place + rows]
            inputs = torch.stack([ids[start:end] for start, end, _ in batch]).to(device)  # (B, context)
            logits = model(input_ids=inputs, use_cache=False).logits  # (B, context, vocabulary)
            for row, (start, _, first) in enumerate(batch):
                offset = first - start  # the logits at offset - 1 predict the first scored token
                found = token_losses(logits[row, offset - 1:-1], inputs[row, offset:])
                losses.append(float(found.double().mean()))
            if progress is not None:
                progress(len(losses), len(cut))
    return losses


def _item(ids: Sequence[int], window: Window, loss: float) -> Item:
    start, end, first = window
    return Item(item_id(ids[start:end]), loss if math.isfinite(loss) else None,
                detail={"start": start, "weight": end - first})

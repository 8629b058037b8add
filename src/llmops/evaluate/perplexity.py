"""Perplexity: exp of the mean next-token loss, by a named protocol.

Figures of different protocols are not comparable, even on the same text: they differ in what a token may look back on,
and in what is counted. Two protocols are here, both over one stream (all documents joined by a blank line and
tokenized once, so a BOS token stands at most at its very start):

- `gptq` (Frantar et al. 2022; Wanda, SparseGPT and their successors use the same): windows of `context` tokens that do
  not overlap, the remainder dropped, no BOS put before a window, loss over the context - 1 tokens that have a
  predecessor in their window. All windows weigh the same.
- `sliding`: windows that end `stride` tokens apart; each token of the stream (but its first) is scored once, in the
  window where it has the most context: at least context - stride tokens. The last window is shifted back to be full.

Items are windows, and windows that begin in one document are a cluster of it, since they are not independent; where no
document has two, or there is but one, windows stand alone. With `slices` or `cluster` an item is a document's part of a
window: its mean loss, its share of the tokens, and the columns of its row, so that groups, tests and bootstrap see
documents; a row is then its own cluster, unless `cluster` names a coarser one. The figure is the same either way, since
every token is scored in the window where it always was.

The interval is Student's over the items' mean losses (weighted by tokens, over clusters where there are any), on the
log scale: exp(mean +- t stderr). Between two variants the paired interval is the one to read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llmops.data.sources import Rows
from llmops.data.stream import owned_stream
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
from llmops.evaluate.slices import labels
from llmops.evaluate.statistics import summarize

__all__ = ["Part", "evaluate", "parts_of", "score_stream", "windows"]

Window = tuple[int, int, int]  # start, end, first position whose token is scored


@dataclass(frozen=True)
class Part:
    """What one item scores: the tokens from `first` up to `end` of the window that begins at `start`. row: index of
    the document they are from (of a whole window: that it begins in), None where that is not known. whole: everything
    that the window scores."""

    start: int
    first: int
    end: int
    row: int | None
    whole: bool

    def id(self, window: Sequence[int]) -> str:
        """window: all of its tokens."""
        return item_id(window) if self.whole else item_id(window, [self.first - self.start, self.end - self.start])


def evaluate(model: Any, tokenizer: Any, rows: Rows, options: Perplexity, *, id: str, seed: int = 0,
             progress: Callable[[int, int], None] | None = None) -> list[Score]:
    """rows: of any kind with text. The seed is not used: nothing is drawn.

    Raises DataError when the text does not fill one window, LlmopsError for a stride longer than the window.
    """
    stream, owners = owned_stream(rows, tokenizer, options.separator)
    notes = labels(rows.rows, options.slices, options.cluster, rows.name)
    return [score_stream(model, tokenizer, stream, options, id=id, progress=progress, owners=owners, notes=notes)]


def score_stream(model: Any, tokenizer: Any, stream: Sequence[int], options: Perplexity, *, id: str,
                 progress: Callable[[int, int], None] | None = None, owners: Sequence[int] | None = None,
                 notes: Sequence[Mapping[str, Any]] = ()) -> Score:
    """The perplexity of a stream of token ids. owners: index of the document that each token is from; notes: what each
    document adds to the detail of its items, with `slices` or `cluster`. Raises as `evaluate`."""
    limit = context_limit(model)
    context = min(options.context, limit) if limit is not None else options.context
    stride = options.stride or context
    ids = list(stream)[:options.max_tokens]
    _check(id, len(ids), context, stride, options)
    cut = windows(len(ids), context, options.stride)
    apart = bool(options.slices or options.cluster)
    if apart and owners is None:
        raise DataError(f"{id}: the tokenizer ({type(tokenizer).__name__}) does not tell which characters a token "
                        "stands for, so no token has a document; expected a fast one (a tokenizer.json beside the "
                        "model) for slices and cluster; convert it")
    parts = [parts_of(window, owners, apart) for window in cut]
    losses = _losses(model, torch.tensor(ids), parts, context, options.batch_size, progress)
    items = [_item(ids, part, context, loss, notes[part.row] if apart and part.row is not None else {})
             for part, loss in zip((part for each in parts for part in each), losses, strict=True)]
    if not apart:
        items = _clustered(items)
    bos = tokenizer.bos_token_id
    protocol = {"id": "perplexity/sliding" if options.stride else "perplexity/gptq", "aggregation": "exp_mean",
                "context": context, "stride": stride, "context_asked": options.context, "separator": options.separator,
                "bos": "at the start of the stream" if bos is not None and ids[0] == bos else "none",
                "tokens": sum(end - first for _, end, first in cut), "windows": len(cut), "dtype": dtype_name(model),
                "tokenizer_sha256": tokenizer_sha256(tokenizer),
                **({"items": "documents within windows"} if apart else {})}
    value, stderr = summarize(items, "exp_mean", "perplexity", f"{protocol['id']}, context {context}, stride {stride}")
    return Score(id, "perplexity", False, value, stderr, protocol, items)


def parts_of(window: Window, owners: Sequence[int] | None, apart: bool) -> list[Part]:
    """The items of a window: itself, or with `apart` what each of its documents has in it."""
    start, end, first = window
    if not apart or owners is None:
        return [Part(start, first, end, owners[start] if owners is not None else None, True)]
    runs = [list(run) for _, run in groupby(range(first, end), key=lambda place: owners[place])]
    return [Part(start, run[0], run[-1] + 1, owners[run[0]], False) for run in runs]


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


def _losses(model: Any, ids: Tensor, parts: Sequence[Sequence[Part]], context: int, batch_size: int,
            progress: Callable[[int, int], None] | None) -> list[float]:
    """Mean loss in nats over the scored tokens of every part of every window, in their order."""
    rows = batch_rows(batch_size, context, vocabulary_size(model))
    device = device_of(model)
    losses: list[float] = []
    with scoring(model):
        for place in range(0, len(parts), rows):
            batch = parts[place:place + rows]
            inputs = torch.stack([ids[each[0].start:each[0].start + context] for each in batch]).to(device)
            logits = model(input_ids=inputs, use_cache=False).logits  # (B, context, vocabulary)
            for row, each in enumerate(batch):
                offset = each[0].first - each[0].start  # the logits at offset - 1 predict the first scored token
                found = token_losses(logits[row, offset - 1:-1], inputs[row, offset:]).double()
                losses += [float(found[part.first - each[0].first:part.end - each[0].first].mean()) for part in each]
            if progress is not None:
                progress(place + len(batch), len(parts))
    return losses


def _item(ids: Sequence[int], part: Part, context: int, loss: float, note: Mapping[str, Any]) -> Item:
    detail: dict[str, Any] = {"start": part.start, "weight": part.end - part.first}
    if not part.whole:
        detail |= {"from": part.first, "cluster": f"row {(part.row or 0) + 1}"}
    if part.row is not None:
        detail["document"] = part.row + 1
    return Item(part.id(ids[part.start:part.start + context]), loss if math.isfinite(loss) else None,
                detail={**detail, **note})


def _clustered(items: Sequence[Item]) -> list[Item]:
    """Windows as clusters of the documents they begin in, where that says anything: two documents, one of them with
    two windows."""
    windows_of = Counter(item.detail.get("document") for item in items)
    if None in windows_of or not 1 < len(windows_of) < len(items):
        return list(items)
    return [replace(item, detail={**item.detail, "cluster": f"row {item.detail['document']}"}) for item in items]

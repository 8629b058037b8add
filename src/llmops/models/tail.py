"""The end of a model in the calibration walk: an untied output head, and the norm before it.

A head stands behind the decoder blocks, so nothing comes after it that its error could be compared in: it is solved by
what it sees, its own output being the model's. What the blocks have in common with it is the norm before: factors that
an input feature is divided by (AWQ, SmoothQuant) fold into the final norm's gain as they do into a block's, where the
norm's output is the very tensor that the head reads, and the head alone. That is confirmed by the logits, as a block's
links are by its output (`fold.py`).

The head is read by the model's own forward, with every block made a pass-through that gives what the walk has brought
that far, and no farther than to the head: logits, the largest tensor of all, are not computed but for the confirmation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmops.block_stream import Stream, finite, instead, lent, passing
from llmops.models.fold import Link, find_norm

__all__ = ["Tail", "lent_tail", "through"]


@dataclass(frozen=True)
class Tail:
    """A head in its turn. name: of the head in the model; link: the final norm and the head, None where something else
    reads the norm too, or none was found; measure: a statistic of the head's inputs, by name."""

    name: str
    head: nn.Linear
    model: nn.Module
    link: Link | None
    measure: Callable[[str], Tensor]

    def put(self, weight: Tensor) -> None:
        """Put a new weight into the head."""
        self.head.weight.data = finite(weight, f"{self.name}: the new weight holds").to(self.head.weight)


@contextmanager
def lent_tail(stream: Stream, name: str, head: nn.Linear, compute: torch.dtype | None,
              measure: Callable[[str, torch.dtype], Tensor]) -> Iterator[Tail]:
    """Within, the head and the norm linked to it are in `compute`, if given; after, as they were stored.

    measure: (statistic, type that hidden states come in) -> the statistic of the head's inputs.
    """
    finite(head.weight, f"{name}: the weight holds")
    link = find_norm(stream.model, name, partial(through, stream, stream.dtype, 0, 1))
    modules = [head] if link is None else [stream.model.get_submodule(link.source), head]
    dtype = compute if link is not None else None
    with lent(nn.ModuleList(modules), None, dtype):
        yield Tail(name, head, stream.model, link, lambda statistic: measure(statistic, dtype or stream.dtype))


def through(stream: Stream, dtype: torch.dtype, batch: int, crops: int | None = None) -> Any:
    """What the model makes of what the walk has brought to its end: the logits of the first `crops` of a batch."""
    hidden = stream.hidden[batch][:crops].to(dtype)
    with passing(stream.blocks, partial(instead, hidden)):
        return stream.model(input_ids=stream.tokens[batch][:crops], use_cache=False).logits

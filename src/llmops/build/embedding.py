"""Embedding and head around a step that quantizes: what happens to them before its walk, and what joins its weights.

    embeddings: true    the token embedding goes to 8 bits first, so that everything after it is calibrated on what it
                        became. A head that shares it goes along and stays shared.
    lm_head not ignored a shared head is untied first and quantized like any layer. Should both end as the same codes,
                        they are tied again when they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from llmops.block_stream import finite
from llmops.build.job import Job, Work
from llmops.methods.quantize.rtn import rtn
from llmops.methods.quantize.weight import QuantizedWeight
from llmops.models.arch import is_ignored
from llmops.models.embeddings import BITS, embedding_name, head_name, is_tied, same_weight, untie

__all__ = ["joined", "prepared"]


@torch.no_grad()  # type: ignore[untyped-decorator]
def prepared(job: Job, options: Any) -> dict[str, QuantizedWeight]:
    """Untie the head and round the embedding as `options` ask, in place; returns what was rounded, by full name."""
    model = job.model
    tied = is_tied(model)
    if tied and not is_ignored("lm_head", options.ignore):
        untie(model)
    if not getattr(options, "embeddings", False):
        return {}
    name = embedding_name(model)
    embedding = model.get_submodule(name)
    finite(embedding.weight, f"{name}: the weight holds")
    rounded = rtn(embedding.weight, bits=BITS, group_size=-1, dtype=job.storage)
    embedding.weight.copy_(rounded.dequantize())
    return {name: rounded, **({head_name(model): rounded} if is_tied(model) else {})}


def joined(work: Work, rounded: dict[str, QuantizedWeight], was_tied: bool) -> Work:
    """The work with what `prepared` rounded among its weights, and what became of head and embedding told."""
    head = head_name(work.model) if was_tied else ""
    bits = work.expected.bits if isinstance(work.expected.bits, Mapping) else {}
    for name, weight in rounded.items():
        work.packed[name] = weight  # the very mapping that is saved
    told = [f"{name} in {BITS} bits, one scale a token" for name in rounded if name != head]
    if head in rounded:
        told.append(f"{head} shares the codes of the embedding")
    elif head in bits:
        embedding = embedding_name(work.model)
        again = embedding in rounded and same_weight(rounded[embedding], work.packed[head])
        told.append(f"{head} was tied to the embedding: " + (
            "both became the same codes and are tied again" if again else
            f"it has a weight of its own now, in {bits[head]} bits"
            + ("" if rounded else ", beside the embedding in 16 bit")))
    if rounded:
        work.expected = replace(work.expected, bits={**bits, **{name: BITS for name in rounded}})
    work.events[1:1] = told
    return work

"""The step that rounds keys and values alone, and what the option `kv_cache` adds to every other one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from llmops.build.job import Job, Work
from llmops.methods.quantize.options import KvCache
from llmops.models.kv_cache import attach
from llmops.models.save import save_dense

__all__ = ["kv_cache_step", "with_kv_cache"]


def kv_cache_step(job: Job, options: KvCache) -> Work:
    """The weights as they are; `with_kv_cache` does the rest, as it does for the other methods' option."""
    return Work(job.model, partial(save_dense, job.model, job.tokenizer, dtype=job.storage))


def with_kv_cache(work: Work, dtype: str) -> Work:
    """The same work with keys and values in `dtype`, in the model in memory and in what will be saved.

    Weights are solved before, for keys and values as they are.
    """
    attach(work.model, dtype)
    work.expected = replace(work.expected, kv_cache=dtype)
    work.events.append(f"keys and values in {dtype}, a scale for every token and head")
    return work

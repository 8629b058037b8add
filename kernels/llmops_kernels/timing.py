"""How long a call takes on a GPU, without the time that Python takes to launch it and without a warm cache.

The calls, each on data of its own, are captured into one CUDA graph, which is replayed; events around a replay, divided
by the number of calls, give the time of one. With enough copies of the data (`copies`), a call finds nothing of its
own in the L2 cache, as a layer of a model finds it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["copies", "seconds"]

ROTATION = 4  # sizes of the L2 cache that lie between two uses of the same data
LEAST_CALLS = 20  # in a graph, so that its own start is no part of the figure


def copies(footprint: int, device: str) -> int:
    """How many sets of data of `footprint` bytes pass 4 sizes of the L2 cache; 2 on a CPU."""
    if device == "cpu":
        return 2
    cache = int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    return max(2, -(-ROTATION * cache // max(footprint, 1)))


def seconds(calls: Sequence[Callable[[], Any]], repeats: int = 11) -> float:
    """The median of `repeats` replays of all calls one after the other, in seconds a call.

    Without CUDA (a dry run) the median of plain calls, which says nothing about the kernel.
    """
    if not torch.cuda.is_available():
        return statistics.median(_plain(call) for call in calls)
    many = [calls[i % len(calls)] for i in range(max(len(calls), LEAST_CALLS))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and warms up what capturing may not start
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in many:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1000 / len(many))
    return statistics.median(times)


def _plain(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began

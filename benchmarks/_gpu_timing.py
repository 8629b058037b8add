"""Timing on a GPU as benchmarks/gpu.py does it, and on a CPU as far as a rehearsal needs it.

A call is timed as a CUDA graph: launching costs nothing, as in a served model. A graph holds enough calls for a few
hundred microseconds, over copies of the data that together are four times the L2 cache, so nothing is read from it that
a model would read from memory. The figure is the median of the replays, each between two events.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

L2_TIMES = 4
LEAST_CALLS = 16  # in a graph
REPLAYS = 9
LARGEST = 24 << 30  # bytes of copies at most
Call = Callable[[], Any]


def l2_bytes(device: str) -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size) if device == "cuda" else 1 << 20


def copies(footprint: int, device: str) -> int:
    """How many sets of data a case rotates over."""
    if device != "cuda":
        return 1
    wanted = -(-L2_TIMES * l2_bytes(device) // max(footprint, 1))
    return max(1, min(wanted, LARGEST // max(footprint, 1), 64))


def seconds(calls: list[Call], device: str, replays: int = REPLAYS) -> float:
    """Median seconds of one call; `calls` are the same call on sets of data of its own each."""
    if device != "cuda":
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls)
    rounds = max(1, -(-LEAST_CALLS // len(calls)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles, and lets the allocator and cuBLAS settle
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    found = []
    graph.replay()
    for _ in range(replays):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after) / 1000 / (rounds * len(calls)))
    return statistics.median(found)


def ceilings(device: str) -> dict[str, float]:
    """Measured bytes a second of a copy (read and written), and flops of a large matmul by type."""
    size = 1 << (30 if device == "cuda" else 16)
    a, b = torch.empty(size, dtype=torch.uint8, device=device), torch.zeros(size, dtype=torch.uint8, device=device)
    found = {"copy": 2 * size / seconds([lambda: a.copy_(b)], device)}
    n = 8192 if device == "cuda" else 64
    for unit, product in _products(n, device).items():
        try:
            found[unit] = 2 * n ** 3 / seconds([product], device)
        except (RuntimeError, NotImplementedError) as error:
            print(f"no ceiling for {unit}: {str(error).splitlines()[0]}", flush=True)
    return found


def _products(n: int, device: str) -> dict[str, Call]:
    def square(dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(n, n, device=device).to(dtype)

    made: dict[str, Call] = {}
    for unit, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = square(dtype), square(dtype)
        made[unit] = lambda a=a, b=b: a @ b.T
    i, j = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    made["int8"] = lambda: torch._int_mm(i, j.T)
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        x, w = square(torch.float8_e4m3fn), square(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        made["fp8"] = lambda: torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return made


def floor(case: Any, limits: dict[str, float]) -> float:
    """Seconds below which no kernel can be: the longer of moving the bytes and of computing."""
    rate = limits.get(case.unit) or limits.get("bf16", float("inf"))
    return float(max(case.bytes / limits["copy"], case.flops / rate))

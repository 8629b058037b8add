"""`llmops bench kernels`: which op runs a quantized layer here, and how fast it is beside torch on a dense one.

For each scheme, shape and number of tokens a layer with random codes is made as `llmops.load` would make it, and timed
in turns with `torch.nn.functional.linear` on a dense weight of the type that a model computes in here. In turns, since
a machine drifts; the figure is the median of the ratios. On a GPU both run as CUDA graphs of a few calls. The data is
not rotated past the cache, and nothing else is compared: that is what `benchmarks/gpu.py` is for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmops.errors import LlmopsError, unknown
from llmops.methods.quantize import float_packing
from llmops.models.formatted import FormattedLinear
from llmops.models.kernel_tiles import tiles_used
from llmops.models.load import DTYPES, computed_in, pick_device
from llmops.models.packed import PackedLinear
from llmops.ops.bitstream import words

__all__ = ["SCHEMES", "bench_kernels", "lines"]

#: Name -> (bits, group) of packed integers, or a kind of `models/formatted.py`.
SCHEMES: dict[str, tuple[int, int] | str] = {
    "w8a16": (8, -1), "w4a16": (4, 128), "w3a16": (3, 128), "w2a16": (2, 64), "w8a8": "w8a8", "fp8": "fp8-channel",
    "fp8-block": "fp8-block", "mxfp4": "mxfp4"}
SHAPES = {"cpu": ((1024, 1024), (2048, 2048)), "cuda": ((4096, 4096), (6144, 4096), (14336, 4096), (4096, 14336))}
ROWS = {"cpu": (1, 32), "cuda": (1, 16, 64, 256, 4096)}
TURNS = 7
LEAST_S = 0.01  # of one turn


def bench_kernels(schemes: Sequence[str] = (), shapes: Sequence[tuple[int, int]] = (), rows: Sequence[int] = (), *,
                  device: str = "auto", kernel: str = "auto") -> Iterator[dict[str, Any]]:
    """One result for each scheme, shape and number of tokens: {"scheme", "N", "K", "M", "kernel", "tiles", "dense",
    "ratio"}; ratio: torch's time over the op's, above 1 the op is faster. Empty arguments take what suits the device.

    Raises LlmopsError for an unknown scheme, a shape that it cannot take, or a kernel that does not run here.
    """
    where = pick_device(device)
    kind = "cuda" if where.type == "cuda" else "cpu"
    for scheme in schemes:
        if scheme not in SCHEMES:
            raise LlmopsError(unknown("scheme", scheme, SCHEMES))
    name = computed_in("auto", "bfloat16", where)
    dtype = DTYPES["bfloat16" if name == "auto" else name]
    with torch.inference_mode():
        for scheme in schemes or SCHEMES:
            for n, k in shapes or SHAPES[kind]:
                layer = _layer(SCHEMES[scheme], n, k, dtype, where, kernel)
                weight = torch.randn(n, k, device=where).to(dtype)
                for m in rows or ROWS[kind]:
                    x = torch.randn(m, k, device=where).to(dtype)
                    yield {"scheme": scheme, "N": n, "K": k, "M": m, "kernel": layer.kernel,
                           "tiles": next((entry["tiles"] for entry in tiles_used(nn.ModuleList([layer]), m).values()),
                                         None) if kind == "cuda" else None,
                           "dense": str(dtype).removeprefix("torch."), "ratio": _ratio(layer, weight, x)}


def _layer(scheme: tuple[int, int] | str, n: int, k: int, dtype: torch.dtype, device: torch.device,
           kernel: str) -> Any:
    if isinstance(scheme, str):
        return FormattedLinear(_parts(scheme, n, k, dtype, device), scheme, kernel=kernel)
    bits, group = scheme
    if group != -1 and k % group:
        raise LlmopsError(f"{k} inputs in groups of {group}; expected a multiple of {group}")
    packed = torch.randint(-(1 << 31), 1 << 31, (n, words(k, bits)), dtype=torch.int64, device=device).to(torch.int32)
    scale = torch.rand(n, 1 if group == -1 else k // group, device=device).add_(0.5).to(dtype)
    return PackedLinear({"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([n, k])},
                        bits=bits, group_size=group, kernel=kernel)


def _parts(kind: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    from dataclasses import replace

    from llmops.methods.quantize import rtn
    from llmops.methods.quantize.floats import FLOATS

    W = torch.randn(n, k, device=device)
    if kind == "w8a8":
        return float_packing.pack_int8(replace(rtn(W, bits=8), activation_bits=8))
    return float_packing.pack_floats(rtn(W.to(dtype), bits=FLOATS[kind]))


def _ratio(layer: nn.Module, weight: Tensor, x: Tensor) -> float:
    """Median over turns of (seconds of a dense product) / (seconds of the layer)."""
    calls: list[Callable[[], Any]] = [lambda: F.linear(x, weight), lambda: layer(x)]
    timers = [_timer(call, x.device.type == "cuda") for call in calls]
    ratios = []
    for turn in range(TURNS):
        spent = [0.0, 0.0]
        for which in ((0, 1) if turn % 2 else (1, 0)):
            spent[which] = timers[which]()
        ratios.append(spent[0] / spent[1])
    return statistics.median(ratios)


def _timer(call: Callable[[], Any], on_gpu: bool) -> Callable[[], float]:
    """() -> seconds of one call, warmed up: repeated until a turn lasts long enough to be timed."""
    call()
    if on_gpu:
        return _graph_timer(call)
    began = time.perf_counter()
    call()
    count = max(1, int(LEAST_S / max(time.perf_counter() - began, 1e-7)))

    def timed() -> float:
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count

    return timed


def _graph_timer(call: Callable[[], Any], count: int = 20) -> Callable[[], float]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()

    def timed() -> float:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000 / count

    return timed


def lines(results: Sequence[dict[str, Any]]) -> list[str]:
    """The results as a table of text."""
    heads = ("scheme", "outputs x inputs", "tokens", "runs on", "speed against torch")
    rows = [(one["scheme"], f"{one['N']} x {one['K']}", str(one["M"]), one["kernel"],
             f"{one['ratio']:.2f}x {one['dense']}") for one in results]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (heads, *rows)]

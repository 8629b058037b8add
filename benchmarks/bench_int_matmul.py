"""Weight-only integer matmul against dense matmul: `python benchmarks/bench_int_matmul.py [--quick]`.

Every contender of a shape is timed in turn, round after round, so that a machine that slows down slows all of them; the
figures are medians. Ratios are to dense bfloat16 of the same shape: above 1 is faster. Weights are random and each
shape rotates over several copies, so that a layer does not come from the cache that its last call filled. On a CUDA
device the same table compares the Triton kernel.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from llmops.methods.quantize import packing, rtn
from llmops.ops import int_matmul as op

SCHEMES = [("int8 row", 8, -1), ("int4 g128", 4, 128), ("int4 g32", 4, 32), ("int3 g128", 3, 128)]
CACHE_BYTES = 64 << 20


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def contenders(rows: int, columns: int, tokens: int, device: str, copies: int
               ) -> dict[str, Callable[[int], torch.Tensor]]:
    """Name -> a call that takes the number of the round, which picks one of the copies of the weight."""
    dense = [torch.randn(rows, columns, device=device) * 0.02 for _ in range(copies)]
    half = [w.to(torch.bfloat16) for w in dense]
    x = torch.randn(tokens, columns, device=device)
    x16 = x.to(torch.bfloat16)
    calls: dict[str, Callable[[int], torch.Tensor]] = {
        "bf16 dense": lambda i: F.linear(x16, half[i % copies]), "fp32 dense": lambda i: F.linear(x, dense[i % copies])}
    for label, bits, group in SCHEMES:
        weights = [rtn(w, bits=bits, group_size=group) for w in half]
        name = op.choose(rows, columns, bits=bits, group_size=group, symmetric=True, device=device)
        for kernel in dict.fromkeys([name, op.REFERENCE] if (bits, group) == (4, 128) else [name]):
            held = []
            for made in weights:
                weight = op.IntWeight(made.scale, None, bits, group, rows, columns)
                held.append((op.prepare(packing.pack(made)["weight_packed"], weight, kernel), weight))

            def call(i: int, held: list = held, kernel: str = kernel) -> torch.Tensor:
                prepared, weight = held[i % copies]
                return op.int_matmul(x16, prepared, weight, kernel)

            calls[f"{label} {op.describe(kernel, bits)}"] = call
    return calls


def interleaved(calls: dict[str, Callable[[int], torch.Tensor]], device: str, seconds: float) -> dict[str, float]:
    """Median seconds of a call, over as many rounds as fit (at least 5)."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)  # warm up
    began, turn = time.perf_counter(), 0
    while turn < 5 or time.perf_counter() - began < seconds:
        turn += 1
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call(turn)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, half a second each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    shapes = [(1024, 1024)] if asked.quick else [(1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096)]
    print(f"{machine(asked.device)}; torch {torch.__version__}; {datetime.date.today()}")
    print("| out x in | tokens | contender | us | x bf16 dense | rel. error |\n|-|-|-|-:|-:|-:|")
    for rows, columns in shapes:
        copies = max(1, min(4, -(-CACHE_BYTES // (rows * columns * 2))))
        for tokens in (1, 32):
            torch.manual_seed(0)
            calls = contenders(rows, columns, tokens, asked.device, copies)
            medians = interleaved(calls, asked.device, 0.5 if asked.quick else 3.0)
            exact = calls["fp32 dense"](0).double()
            for name, median in medians.items():
                error = float((calls[name](0).double() - exact).norm() / exact.norm())  # quantization included
                print(f"| {rows} x {columns} | {tokens} | {name} | {median * 1e6:.0f} | "
                      f"{medians['bf16 dense'] / median:.2f} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()

"""Weight-only integer matmul against dense matmul: `python benchmarks/bench_int_matmul.py [--quick] [--json FILE]`.

Every contender of a shape is timed in turn, round after round, so that a machine that slows down slows all of them; the
times are medians. Ratios are to dense bfloat16 of the same shape in the same rounds, with their interval: above 1 is
faster. Weights are random and each
shape rotates over several copies, so that a layer does not come from the cache that its last call filled. On a CUDA
device the same table compares the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from _runner.machine import about, said
from _runner.results import Results, parser
from _runner.tables import head, line
from _runner.turns import ratio, shown, timed
from llmops.methods.quantize import packing, rtn
from llmops.ops import int_matmul as op

SCHEMES = [("int8 row", 8, -1), ("int4 g128", 4, 128), ("int4 g32", 4, 32), ("int3 g128", 3, 128)]
CACHE_BYTES = 64 << 20


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


def raced(rows: int, columns: int, tokens: int, device: str, seconds: float) -> list[dict[str, Any]]:
    """A line a contender of one shape, over as many rounds as fit into the seconds (at least 5)."""
    torch.manual_seed(0)
    calls = contenders(rows, columns, tokens, device, max(1, min(4, -(-CACHE_BYTES // (rows * columns * 2)))))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = timed(calls, turns=5, seconds=seconds, synchronize=wait)
    exact = calls["fp32 dense"](0).double()
    return [{"shape": [rows, columns], "tokens": tokens, "contender": name, "median_s": median(found),
             "speed_over_bf16": ratio(times["bf16 dense"], found),  # the error has quantization in it
             "relative_error": float((calls[name](0).double() - exact).norm() / exact.norm())}
            for name, found in times.items()]


@torch.no_grad()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="small shapes, half a second each")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = options.parse_args()
    record = about(asked, ("torch", "triton"), threads=torch.get_num_threads())
    if asked.device == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
    results, lines = Results(asked.out, record), []
    print(said(record) + (f", {record['gpu']}" if "gpu" in record else ""))
    print(head(["out x in", "tokens", "contender", "us", "x bf16 dense", "rel. error"], "lllrrr"))
    for rows, columns in [(1024, 1024)] if asked.quick else [(1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096)]:
        for tokens in (1, 32):
            found = raced(rows, columns, tokens, asked.device, 0.5 if asked.quick else 3.0)
            lines += found
            results.keep(lines=lines)
            for one in found:
                print(line([f"{rows} x {columns}", str(tokens), one["contender"], f"{one['median_s'] * 1e6:.0f}",
                            shown(one["speed_over_bf16"]), f"{one['relative_error']:.1e}"]), flush=True)
    results.end()


if __name__ == "__main__":
    main()

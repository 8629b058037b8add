"""What a `benchmarks/kernels/OP.py` gives: `compiled()`, `checks(device)` and `cases(dry)`.

compiled() -> list[tests.kernels.offline.Compiled]   read by benchmarks/offline.py and by the tests
checks(device) -> Iterator[Check]                    run before any timing, on "cuda" or (interpreter) on "cpu"
cases(dry) -> list[Case]                             timed by benchmarks/gpu.py; dry: one or two tiny shapes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LAYERS", "ROWS", "Case", "Check"]

ROWS = (1, 4, 16, 64, 256, 1024, 4096)  # M
LAYERS = {"8B q,o": (4096, 4096), "8B qkv": (6144, 4096), "8B up": (14336, 4096), "8B down": (4096, 14336),
          "70B q,o": (8192, 8192), "70B up": (28672, 8192), "70B down": (8192, 28672)}  # name -> (N, K)


@dataclass(frozen=True)
class Check:
    """One comparison with float64. It holds when error <= limit; NaN never does."""

    name: str
    error: float
    limit: float


@dataclass(frozen=True)
class Case:
    """One thing to time."""

    op: str
    name: str  # "8B qkv, g128, bf16"
    shape: dict[str, int]  # {"M": 16, "N": 6144, "K": 4096}; whatever describes it
    bytes: int  # the least that one call has to move: the floor is max(bytes / copy bandwidth, flops / matmul rate)
    flops: int
    unit: str  # the matmul ceiling that counts: "bf16", "fp16", "fp8", "int8"
    footprint: int  # bytes of one copy of the inputs; copies rotate over 4x the L2 cache
    make: Callable[[str, int], dict[str, Callable[[], Any]]] = field(repr=False)
    # make(device, seed) -> contender -> call, all on one copy of the data. "llmops" is this package's op; baselines are
    # named after what they are ("cuBLAS bf16", "dequantize + cuBLAS", "torchao", "gemlite", "bitsandbytes") and are
    # there only where they are installed and take the shape.
    config: Callable[[str], dict[str, int]] | None = field(default=None, repr=False)  # device -> the tiles that ran

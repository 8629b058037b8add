"""Run by test_int_linear.py under Triton's interpreter. A JSON line a case: how far the kernel is from float64.

Every call reads x out of a wider buffer whose other columns are NaN, and writes into rows of a wider buffer that is
NaN before: what a kernel reads or writes beyond its own shows.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from llmops_kernels.int_linear import int_linear, launch, pack


def case(bits: int, group: int, ms: list[int], n: int, k: int, dtype: str, zero: bool, bias: bool,
         tile: dict[str, int] | None, seed: int = 0, scales: str | None = None) -> dict[str, Any]:
    made = torch.Generator().manual_seed(seed * 7919 + bits * 1000 + n + k + zero)
    half, typed = 1 << (bits - 1), getattr(torch, dtype)
    codes = torch.randint(-half, half, (n, k), generator=made, dtype=torch.int8)
    codes.view(-1)[: 2 * half] = torch.arange(-half, half).to(torch.int8)  # every code occurs
    size = k if group == -1 else group
    scale = torch.exp(torch.empty(n, k // size).uniform_(-6.9, 0.0, generator=made))  # over three decades
    scale[n // 2] *= 30  # one outlier row
    scale = scale.to(typed if scales is None else getattr(torch, scales))
    points = torch.randint(-half, half, scale.shape, generator=made, dtype=torch.int8) if zero else None
    extra = torch.randn(n, generator=made).to(typed) if bias else None
    shifted = codes.double() if points is None else codes.double() - points.double().repeat_interleave(size, 1)
    dense = shifted * scale.double().repeat_interleave(size, 1)
    packed = pack(codes, scale, points, bits=bits, group_size=group)
    worst, rows, repeat, spilled = 0.0, 0.0, 0.0, 0
    for m in ms:
        wide = torch.full((m, k + 40), torch.nan, dtype=typed)
        wide[:, 8:8 + k] = torch.randn(m, k, generator=made)
        x = wide[:, 8:8 + k]
        if m == 0:  # the op goes to the launch here, as on a GPU
            for y in (launch(x, packed.words, packed.scale, packed.zero, extra, bits, group, n, tile=tile),
                      int_linear(x, packed, extra)):
                spilled += tuple(y.shape) != (0, n) or y.dtype != typed
            continue
        results = []
        for _ in range(2):
            out = torch.full((m, n + 24), torch.nan, dtype=typed)
            launch(x, packed.words, packed.scale, packed.zero, extra, bits, group, n, out=out[:, 16:16 + n], tile=tile)
            spilled += int((~out[:, :16].isnan()).sum()) + int((~out[:, 16 + n:].isnan()).sum())
            results.append(out[:, 16:16 + n].double())
        exact = x.double() @ dense.T + (0 if extra is None else extra.double())
        away = results[0] - exact
        worst = max(worst, float(away.norm() / exact.norm())) if away.isfinite().all() else float("nan")
        rows = max(rows, float((away.norm(dim=0) / exact.norm(dim=0)).max()))  # an outlier row hides nothing
        repeat = max(repeat, float((results[0] - results[1]).abs().max()))
    return {"error": worst, "worst_row": rows, "repeat": repeat, "spilled": spilled}


def far() -> dict[str, Any]:
    """Three rows of x and y, the last past 2^31: most of the buffers is never touched, so it takes no memory."""
    apart, made = (1 << 30) + 64, torch.Generator().manual_seed(0)
    x = torch.empty(2 * apart + 512, dtype=torch.float16).as_strided((3, 256), (apart, 1))
    x.copy_(torch.randn(3, 256, generator=made))
    out = torch.empty(2 * apart + 512, dtype=torch.float16).as_strided((3, 64), (apart, 1))
    codes = torch.randint(-8, 8, (64, 256), generator=made, dtype=torch.int8)
    packed, dense = pack(codes, torch.ones(64, 2), bits=4, group_size=128), codes.double()
    tile = {"BLOCK_M": 16, "BLOCK_N": 64, "PARTS": 1, "num_warps": 4, "num_stages": 2}
    launch(x, packed.words, packed.scale, None, None, 4, 128, 64, out=out, tile=tile)
    exact = x.double() @ dense.T
    return {"error": float((out.double() - exact).norm() / exact.norm()), "worst_row": 0.0, "repeat": 0.0, "spilled": 0}


if __name__ == "__main__":
    for line in json.loads(sys.argv[1]):
        print(json.dumps(far() if line == "far" else case(*line)), flush=True)

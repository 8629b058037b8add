"""Run by test_nf4_linear.py under Triton's interpreter. A JSON line a case: how far the kernel is from float64."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from llmops_kernels.nf4_linear import launch
from llmops_kernels.reference.nf4_linear import TABLES, absmax_of, dequantize


def case(kind: str, blocksize: int, nested: bool, ms: list[int], n: int, k: int, dtype: str, bias: bool,
         tile: dict[str, int] | None, seed: int = 0) -> dict[str, Any]:
    made, typed = torch.Generator().manual_seed(seed * 31 + n + k + blocksize), getattr(torch, dtype)
    codes = torch.randint(0, 256, (n * k // 2, 1), generator=made, dtype=torch.uint8)
    codes[:256, 0] = torch.arange(256, dtype=torch.uint8)  # every pair of codes occurs
    blocks = n * k // blocksize
    parts: tuple[Any, ...]
    if nested:
        parts = (torch.rand(-(-blocks // 256), generator=made) + 0.1,
                 torch.randint(0, 256, (blocks,), generator=made, dtype=torch.uint8),
                 torch.linspace(-1, 1, 256), torch.tensor(1.5))
    else:
        absmax = torch.exp(torch.empty(blocks).uniform_(-6.9, 0.0, generator=made))  # over three decades
        absmax.view(-1)[blocks // 2] *= 30
        parts = (absmax, None, None, None)
    extra = torch.randn(n, generator=made).to(typed) if bias else None
    both = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten().long()
    dense = (torch.tensor(TABLES[kind], dtype=torch.float64)[both].view(-1, blocksize)
             * absmax_of(*parts).double().unsqueeze(1)).view(n, k)
    worst, repeat, spilled = 0.0, 0.0, 0
    for m in ms:
        wide = torch.full((m, k + 40), torch.nan, dtype=typed)
        wide[:, 8:8 + k] = torch.randn(m, k, generator=made)
        x, results = wide[:, 8:8 + k], []
        if m == 0:  # the op goes to the launch here, as on a GPU
            for y in (launch(x, codes, *parts, extra, kind, blocksize, n, tile=tile),
                      torch.ops.llmops.nf4_linear(x, codes, *parts, extra, kind, blocksize, n)):
                spilled += tuple(y.shape) != (0, n) or y.dtype != typed
            continue
        for _ in range(2):
            out = torch.full((m, n + 24), torch.nan, dtype=typed)
            launch(x, codes, *parts, extra, kind, blocksize, n, out=out[:, 16:16 + n], tile=tile)
            spilled += int((~out[:, :16].isnan()).sum()) + int((~out[:, 16 + n:].isnan()).sum())
            results.append(out[:, 16:16 + n].double())
        exact = x.double() @ dense.T + (0 if extra is None else extra.double())
        away = results[0] - exact
        worst = max(worst, float(away.norm() / exact.norm())) if away.isfinite().all() else float("nan")
        repeat = max(repeat, float((results[0] - results[1]).abs().max()))
    return {"error": worst, "repeat": repeat, "spilled": spilled}


def joined(ms: list[int], tile: dict[str, int] | None) -> dict[str, Any]:
    """Two weights below each other, each with an offset of its own: the bits that each gives alone."""
    made, k, sizes = torch.Generator().manual_seed(0), 256, (64, 72)
    weights = []
    for n, offset in zip(sizes, (1.5, 0.25), strict=True):
        blocks = n * k // 64
        weights.append((torch.randint(0, 256, (n * k // 2,), generator=made, dtype=torch.uint8),
                        torch.rand(-(-blocks // 256), generator=made) + 0.1,
                        torch.randint(0, 256, (blocks,), generator=made, dtype=torch.uint8), torch.tensor(offset)))
    table = torch.linspace(-1, 1, 256)
    codes, absmax, nested = (torch.cat([weight[i] for weight in weights]) for i in range(3))
    offsets = torch.cat([weight[3].expand(n) for weight, n in zip(weights, sizes, strict=True)])
    apart = 0.0
    for m in ms:
        x = torch.randn(m, k, generator=made).half()
        y = launch(x, codes, absmax, nested, table, offsets, None, "nf4", 64, sum(sizes), tile=tile)
        each = [launch(x, codes, absmax, nested, table, offset, None, "nf4", 64, n, tile=tile)
                for (codes, absmax, nested, offset), n in zip(weights, sizes, strict=True)]
        apart = max(apart, float((y.double() - torch.cat(each, 1).double()).abs().max()))
    return {"error": apart, "repeat": 0.0, "spilled": 0}


def far() -> dict[str, Any]:
    """Three rows of x and y, the last past 2^31: most of the buffers is never touched, so it takes no memory."""
    apart, made = (1 << 30) + 64, torch.Generator().manual_seed(0)
    x = torch.empty(2 * apart + 512, dtype=torch.float16).as_strided((3, 256), (apart, 1))
    x.copy_(torch.randn(3, 256, generator=made))
    out = torch.empty(2 * apart + 512, dtype=torch.float16).as_strided((3, 64), (apart, 1))
    codes = torch.randint(0, 256, (64 * 128, 1), generator=made, dtype=torch.uint8)
    dense = dequantize(codes, torch.ones(256), "nf4", 64, 64, 256, torch.float64)
    tile = {"BLOCK_M": 16, "BLOCK_N": 128, "PARTS": 1, "num_warps": 4, "num_stages": 2}
    launch(x, codes, torch.ones(256), None, None, None, None, "nf4", 64, 64, out=out, tile=tile)
    exact = x.double() @ dense.T
    return {"error": float((out.double() - exact).norm() / exact.norm()), "worst_row": 0.0, "repeat": 0.0, "spilled": 0}


if __name__ == "__main__":
    for line in json.loads(sys.argv[1]):
        found = far() if line == ["far"] else joined(*line[1:]) if line[0] == "joined" else case(*line)
        print(json.dumps(found), flush=True)
